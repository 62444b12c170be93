"""Post-training low-rank methods: one file each, one line here.

A method is a frozen dataclass under `Method` with `summary`, `paper` and `fit(statistics, probe, ranks, seed) -> LayerBases`; its fields
are its options, on the command line too. An outside method needs no registration: pass the object, or `--method package.module:Class`.
"""

from __future__ import annotations

from lowkey.methods.base import Course, Method
from lowkey.methods.eigenattention import EigenAttention
from lowkey.methods.pca import PCA
from lowkey.methods.stiefattention import StiefAttention

METHODS: dict[str, type[Method]] = {
    "pca": PCA,
    "eigenattention": EigenAttention,
    "stiefattention": StiefAttention,
}

__all__ = ["METHODS", "PCA", "Course", "EigenAttention", "Method", "StiefAttention"]
