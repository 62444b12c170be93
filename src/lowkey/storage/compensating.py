"""An evicting layer with one token in each head that stands for all dropped ones (RazorAttention,
arXiv:2407.15891).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part, Segment
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import top_mask
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, unlike


class CompensatingLayer(EvictingLayer):
    """An `EvictingLayer` with a compensation token in every head.

    The token is the mean key and the mean value of all tokens that the head dropped. In the softmax it counts
    as often as tokens were dropped: log(dropped) is added to its score.

    Attributes:
        mean_k: (b, h, 1, r_K) in fp32.
        mean_v: (b, h, 1, r_V) in fp32.
        dropped: (b, h, 1), how many tokens each head has dropped.
    """

    mean_k: Tensor
    mean_v: Tensor
    dropped: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.mean_k, self.mean_v = (
            x.new_zeros(b, h, 1, x.shape[-1], dtype=torch.float32) for x in (self.keys, self.values)
        )
        self.dropped = torch.zeros(b, h, 1, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {name: getattr(self, name) for name in ("mean_k", "mean_v", "dropped")}

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, the compensation tokens included."""
        b, h = self.tail_k.shape[:2]
        numbers = self.keys.shape[-1] + self.values.shape[-1] + 1
        return super().index_bytes() + b * h * numbers * self.dropped.element_size()

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the compensation tokens; see `PositionedLayer.own_flaw`."""
        b = len(self.offset)
        return first_flaw(
            unlike("mean_k", self.mean_k, b, heads, 1, key_width),
            unlike("mean_v", self.mean_v, b, heads, 1, value_width),
            unlike("dropped", self.dropped, b, heads, 1),
            "it counts less than nothing dropped" if bool((self.dropped < 0).any()) else None,
        )

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        parts = super()._stored_parts(call, stop)
        if not bool(self.dropped.any()):
            return parts
        query = self.codec.project_query(call.query)
        mean_k, mean_v = self.mean_k.to(query.dtype), self.mean_v.to(query.dtype)
        # where nothing was dropped the bias is log 0 = -inf, which hides the token
        mean = Segment(query, mean_k, mean_v, bias=self.dropped.log())
        out, lse = grouped.partial([mean], call.scaling, call.softcap)
        return [*parts, (self.codec.expand_output(out), lse)]

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As `EvictingLayer.keep_best`, after the means have taken in the tokens that are dropped."""
        # dropped are the real candidates that `super().keep_best` will not choose
        gone = (candidates.valid & ~top_mask(scores, counts)).unsqueeze(-1)
        total = self.dropped + gone.sum(2)
        for name, x in (("mean_k", candidates.keys), ("mean_v", candidates.values)):
            mean = getattr(self, name)
            # the old mean counts as often as tokens went into it
            new_sum = mean.squeeze(2) * self.dropped + (x.float() * gone).sum(2)
            setattr(self, name, (new_sum / total.clamp_min(1)).unsqueeze(2))
        self.dropped = total
        super().keep_best(candidates, scores, counts)
