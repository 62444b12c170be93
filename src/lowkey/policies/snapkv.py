"""SnapKV (arXiv:2404.14469): what the last prompt tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.policies.base import Policy, Scene, check_kernel, pooled
from lowkey.types import LowkeyError


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, over them and over the query heads of a KV head, max-pooled over `kernel` neighbours.

    The paper has window 32 and kernel 7 per query head; the mean over the group keeps storage at KV heads. HeadKV, PyramidKV and Ada-KV use
    this score with window 8, and so do we.
    """

    summary: ClassVar[str] = "attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2404.14469"

    window: int = 8
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)
        if self.window < 1:
            raise LowkeyError(f"window {self.window}: queries that are looked at; give at least 1")

    def score(self, scene: Scene) -> Tensor:
        return pooled(scene.weights(self.window).mean((2, 3)), self.kernel)
