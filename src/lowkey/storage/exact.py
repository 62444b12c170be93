"""Which tokens a layer keeps exactly, beside the compressed ones: sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowkey.core.options import Checked, option


@dataclass(frozen=True, eq=False)
class SinkPoints:
    """Where the values of a layer's attention sinks lie: within a radius of one of m points.

    Args:
        centres: (m, h, d), the points.
        radius: (m), the largest Euclidean distance from each, over all heads together.
    """

    centres: Tensor
    radius: Tensor

    def match(self, values: Tensor) -> Tensor:
        """Which tokens are sinks, each judged by its own values alone.

        Args:
            values: (b, h, t, d).

        Returns:
            (b, t), True for sinks.
        """
        # one point at a time: all differences at once would take m times the memory of the values
        squared = [(values.float() - c.unsqueeze(1)).square().sum((1, 3)) for c in self.centres]
        return (torch.stack(squared) < self.radius.square()[:, None, None]).any(0)

    def to(self, device: torch.device) -> SinkPoints:
        """The same points on another device."""
        return replace(self, centres=self.centres.to(device), radius=self.radius.to(device))


@dataclass(frozen=True, eq=False)
class SinkRule:
    """How the attention sinks of a model show in its cache, as `lowkey.find_sinks` learns it.

    Args:
        layers: the points of every layer in which sinks can be told from other tokens, by layer index.
        channels: the outlier channels of the residual stream.
        emergence: the first layer whose input has those outliers.
        model_sha256: fingerprint of the model that the rule was learnt from.
    """

    layers: dict[int, SinkPoints]
    channels: tuple[int, ...]
    emergence: int
    model_sha256: str


@dataclass(frozen=True)
class Exact(Checked):
    """The tokens that are stored as the model made them: `sinks` of each sequence and the last `recent`.

    Recent tokens are the newest tokens seen. A sequence may therefore end in padding but not go on behind
    it, unless all tokens are stored exactly anyway.

    Args:
        sinks: number of sinks. They are the first tokens of a sequence, padding not counted; with a `rule`,
            the first tokens that the rule takes for attention sinks, wherever they are. In layers where the
            rule cannot tell, they are again the first tokens.
        recent: number of newest tokens.
        prefill: what a chunk of several tokens sees of itself. `compressed`: what will be stored (compression
            everywhere). `exact`: its own exact keys, which are compressed afterwards (decode-only
            compression).
        rule: how sinks are recognised, or None.
    """

    sinks: int = option(0, at_least=0, at_most=2**12)
    recent: int = option(0, at_least=0, at_most=2**24)
    prefill: Literal["compressed", "exact"] = "compressed"
    rule: SinkRule | None = None

    def for_length(self, tokens: int) -> Exact:
        """These settings for windows of some tokens; no exact tokens if none were left to compress."""
        return self if tokens > self.sinks + self.recent else NO_EXACT_TOKENS

    def exact_mask(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """(tokens, tokens): which earlier tokens each token sees exactly, with the first tokens as sinks."""
        index = torch.arange(tokens, device=device)
        return (index < self.sinks) | (index.unsqueeze(1) - index < self.recent)


NO_EXACT_TOKENS = Exact()
DEFAULT_WINDOW = Exact(sinks=4, recent=32)  # of every low-rank or integer cache, unless others are asked for
