"""Which tokens a layer keeps as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowkey.core.options import Checked, option


@dataclass(frozen=True, eq=False)
class SinkPoints:
    """The values (h, d) of a layer's attention sinks lie within `radius` (m) of one of the m points `centres`
    (m, h, d).
    """

    centres: Tensor
    radius: Tensor

    def near(self, values: Tensor) -> Tensor:
        """Which of the tokens with values (b, h, t, d) are sinks: (b, t). Each is judged by itself, whatever
        comes with it.
        """
        away = [(values.float() - c.unsqueeze(1)).square().sum((1, 3)) for c in self.centres]
        return (torch.stack(away) < self.radius.square()[:, None, None]).any(0)

    def to(self, device: torch.device) -> SinkPoints:
        return replace(self, centres=self.centres.to(device), radius=self.radius.to(device))


@dataclass(frozen=True, eq=False)
class SinkRule:
    """How a model's attention sinks show in its cache, from `lowkey.find_sinks`. layers: the points of each
    layer in which they show; channels: the outlier channels of the residual stream; emergence: the first
    layer whose input has them; model_sha256: of the model it was learnt from."""

    layers: dict[int, SinkPoints]
    channels: tuple[int, ...]
    emergence: int
    model_sha256: str


@dataclass(frozen=True)
class Exact(Checked):
    """Tokens stored as they are: `sinks` of each row and the last `recent`.

    The sinks are a row's first tokens, padding not counted; with a `rule`, the first of its tokens that the
    rule takes for attention sinks, wherever they are (in layers where it cannot tell, again the first).
    Recent are the newest tokens seen, so that a row may end in padding but not go on behind it, unless tokens
    are stored as they are anyway.
    prefill: what a chunk of several tokens sees of itself: `compressed` what will be stored (compression
    everywhere), `exact` its own exact keys, which are compressed afterwards (decode-only compression).
    """

    sinks: int = option(0, at_least=0, at_most=2**12)
    recent: int = option(0, at_least=0, at_most=2**24)
    prefill: Literal["compressed", "exact"] = "compressed"
    rule: SinkRule | None = None

    def visible(self, tokens: int) -> Exact:
        """What of this shows in windows of so many tokens: nothing, where no token would be left to compress."""
        return self if tokens > self.sinks + self.recent else NOTHING

    def near(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """(tokens, tokens): which earlier tokens each token sees exactly, when a row's sinks are its first
        tokens.
        """
        at = torch.arange(tokens, device=device)
        return (at < self.sinks) | (at.unsqueeze(1) - at < self.recent)


NOTHING = Exact()
DEFAULT_WINDOW = Exact(
    sinks=4, recent=32
)  # beside every low-rank or integer cache, unless one asks for another
