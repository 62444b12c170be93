"""Post-training low-rank methods: one file each, and one line each in METHODS.

A method is a frozen dataclass derived from `Method`; its fields are its options, on the command line too. A
method from outside the package needs no registration: pass the object, or `--method package.module:Class`.
"""

from __future__ import annotations

from lowkey.methods.base import CalibrationContext, Method
from lowkey.methods.dynakv import GateTraining
from lowkey.methods.eigenattention import EigenAttention
from lowkey.methods.fishersvd import FisherSVD
from lowkey.methods.kqsvd import KQSVD
from lowkey.methods.kvheads import KVHeadSVD
from lowkey.methods.kvlatent import KVLatent
from lowkey.methods.lorc import LoRC
from lowkey.methods.matryoshka import MatryoshkaKV
from lowkey.methods.mea import MEA
from lowkey.methods.palu import Palu
from lowkey.methods.pca import PCA
from lowkey.methods.recalkv import ReCalKV
from lowkey.methods.stiefattention import StiefAttention
from lowkey.methods.stiefjoint import StiefJoint

METHODS: dict[str, type[Method]] = {
    "pca": PCA,
    "eigenattention": EigenAttention,
    "stiefattention": StiefAttention,
    "stiefattention-joint": StiefJoint,
    "kq-svd": KQSVD,
    "fisher-svd": FisherSVD,
    "palu": Palu,
    "lorc": LoRC,
    "recalkv": ReCalKV,
    "matryoshka": MatryoshkaKV,
    "kv-latent": KVLatent,
    "kv-head-svd": KVHeadSVD,
    "mea": MEA,
}

# Methods that give every token a rank of its own, by the options of their training; see `lowkey dynamic` and
# `lowkey.calibration.dynamic`.
DYNAMIC_METHODS: dict[str, type[GateTraining]] = {"dynakv": GateTraining}

__all__ = [
    "DYNAMIC_METHODS",
    "KQSVD",
    "MEA",
    "METHODS",
    "KVHeadSVD",
    "PCA",
    "CalibrationContext",
    "EigenAttention",
    "FisherSVD",
    "KVLatent",
    "MatryoshkaKV",
    "LoRC",
    "Method",
    "Palu",
    "ReCalKV",
    "StiefAttention",
    "StiefJoint",
]
