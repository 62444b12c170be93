"""ThinK (arXiv:2407.21018): drops the key channels that queries hardly use, after the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowkey.core.options import option
from lowkey.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ThinK(SnapKV):
    """ThinK: channel pruning of the keys that SnapKV keeps. Tokens are scored as by `SnapKV`, with its
    options.

    Score of channel c of a head: `mean over q of q_c^2 * sum over kept j of k_jc^2`; the channels of the
    highest scores are kept. Channels are chosen after rotation, each of a rotated pair by itself. Every
    eviction of a chunk chooses channels for the keys that it prunes.

    Args:
        channels: share of the key channels that is kept (default 0.6; the paper drops 30 to 50 %).
        looked: number of recent queries of a row whose squares choose the channels (default 32).

    These stay whole: values; the `recent` newest tokens (32 or 128 in the paper); tokens decoded since the
    last eviction; what a frozen cache is given, such as a question asked over what was kept; and a row that
    fits the budget.

    A budget in `%` or bytes is one of bytes: with `channels=0.6`, 80 % keeps every token, and 10 % keeps 12.5
    % of them, with 60 % of their key channels. A budget in `tokens` counts tokens.

    Source: arXiv:2407.21018.
    """

    summary: ClassVar[str] = "SnapKV, and the weakest key channels go too"
    paper: ClassVar[str] = "arXiv:2407.21018"
    layer: ClassVar[str] = "pruning"
    prunes_channels: ClassVar[bool] = True
    needs_whole_keys: ClassVar[str] = "drops channels of the model's own keys"

    channels: float = option(0.6, above=0, at_most=1)
    looked: int = option(32, at_least=1, at_most=2**24)
