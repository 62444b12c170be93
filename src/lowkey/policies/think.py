"""ThinK (arXiv:2407.21018): the key channels that queries hardly use are dropped, after the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ThinK(SnapKV):
    """Tokens by SnapKV's score; of the kept keys the share `channels`, chosen per head by mean q^2 over the
    newest `looked` queries of the row times the sum of k^2. Values stay whole, and so do the `recent` newest
    tokens (the paper: 32 or 128), what is decoded until something is evicted again, what a frozen cache is
    given (a question asked over what was kept), and a row that fits the budget whole.

    The budget is of bytes: 80% with channels 0.6 keeps every token, 10% keeps 12.5 % of them with 60 % of
    their key channels; in `tokens` it counts tokens. The paper drops 30 to 50 % of the channels. A channel is
    dropped after rotation, one of a rotated pair by itself. Every eviction of a chunk chooses channels for
    the keys that it prunes.
    """

    summary: ClassVar[str] = "SnapKV, and the weakest key channels go too"
    paper: ClassVar[str] = "arXiv:2407.21018"
    layer: ClassVar[str] = "pruning"

    channels: float = option(0.6, above=0, at_most=1)
    looked: int = option(32, at_least=1, at_most=2**24)
