"""Post-training low-rank methods: one file each, one line here.

A method is a frozen dataclass with `summary`, `paper` and `fit(statistics, probe, ranks, seed) -> LayerBases`; its fields are its
options, on the command line too. An outside method needs no registration: pass the object, or `--method package.module:Class`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from lowkey.methods.eigenattention import EigenAttention
from lowkey.methods.pca import PCA
from lowkey.methods.stiefattention import StiefAttention
from lowkey.probe import Probe
from lowkey.types import LayerBases, LayerStatistics


class Method(Protocol):
    """What calibration asks of a method."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    allocator: ClassVar[str]

    def fit(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], seed: int) -> LayerBases:
        """Bases of one layer for the candidate `ranks`, from its second moments and, if need be, its recorded inputs."""
        ...


METHODS: dict[str, type[Method]] = {
    "pca": PCA,
    "eigenattention": EigenAttention,
    "stiefattention": StiefAttention,
}

__all__ = ["METHODS", "PCA", "EigenAttention", "Method", "StiefAttention"]
