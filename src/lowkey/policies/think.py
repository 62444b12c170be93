"""ThinK (arXiv:2407.21018): the key channels that queries hardly use are dropped, after the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.options import option
from lowkey.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ThinK(SnapKV):
    """Tokens by SnapKV's score; of the kept keys the share `channels`, chosen per head by mean q^2 over the newest `looked` queries
    times the sum of k^2. Values stay whole, and the `recent` newest tokens too (the paper: 32 or 128).

    The budget is of bytes: 80% with channels 0.6 keeps every token, 10% keeps 12.5 % of them with 60 % of their key channels.
    The paper drops 30 to 50 % of the channels. A channel is dropped after rotation, one of a rotated pair by itself.
    """

    summary: ClassVar[str] = "SnapKV, and the weakest key channels go too"
    paper: ClassVar[str] = "arXiv:2407.21018"
    layer: ClassVar[str] = "pruning"

    channels: float = option(0.6, above=0, at_most=1)
    looked: int = option(32, at_least=1, at_most=2**24)
