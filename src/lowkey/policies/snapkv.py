"""SnapKV (arXiv:2404.14469): what the last prompt tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.options import option
from lowkey.policies.base import Policy, Scene, pooled


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, over them and over the query heads of a KV head, max-pooled over `kernel` neighbours.

    The paper has window 32 and kernel 7 per query head; the mean over the group keeps storage at KV heads. HeadKV, PyramidKV and Ada-KV use
    this score with window 8, and so do we.
    """

    summary: ClassVar[str] = "attention of the last prompt tokens"
    paper: ClassVar[str] = "arXiv:2404.14469"

    window: int = option(8, at_least=1, at_most=2**24)
    kernel: int = option(7, odd=True, at_least=1, at_most=4095)  # odd, so that a token is in the middle of its neighbours

    def score(self, scene: Scene) -> Tensor:
        return pooled(scene.weights(self.window).mean((2, 3)), self.kernel)
