"""An evicting layer with one token in each head that stands for all dropped ones (RazorAttention,
arXiv:2407.15891).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part, Segment
from lowkey.backends.stored import StepSegment
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import top_mask
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, unlike
from lowkey.storage.rebuilding import Rotation
from lowkey.storage.rows import exact_segment


class CompensatingLayer(EvictingLayer):
    """An `EvictingLayer` with a compensation token in every KV head.

    The token is the mean key and the mean value of all tokens that the head dropped, as they are read: in the
    model's own width, whatever form the others are stored in. In the softmax it counts as often as tokens
    were dropped: log(dropped) is added to its score.

    Attributes:
        mean_k: (b, h, 1, d) in fp32, heads in the model's order.
        mean_v: (b, h, 1, d) in fp32.
        dropped: (b, h, 1), how many tokens each head has dropped.
    """

    mean_k: Tensor
    mean_v: Tensor
    dropped: Tensor
    has_dropped: bool | None = None  # whether any head has; None until somebody looks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.mean_k, self.mean_v = (
            x.new_zeros(b, h, 1, x.shape[-1], dtype=torch.float32) for x in (key_states, value_states)
        )
        self.dropped = torch.zeros(b, h, 1, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {name: getattr(self, name) for name in ("mean_k", "mean_v", "dropped")}

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, the compensation tokens included."""
        return super().index_bytes() + self._mean_bytes()

    def predicted_nbytes(self) -> int:
        """As `EvictingLayer`'s, with the compensation tokens."""
        return super().predicted_nbytes() + (self._mean_bytes() if self.is_initialized else 0)

    def _mean_bytes(self) -> int:
        return self.dropped.numel() * (2 * self.mean_k.shape[-1] + 1) * self.dropped.element_size()

    def own_flaw(self, heads: int, key_width: int, value_width: int) -> str | None:
        """Check the compensation tokens; see `PositionedLayer.own_flaw`."""
        b = len(self.offset)
        return first_flaw(
            unlike("mean_k", self.mean_k, b, heads, 1, key_width),
            unlike("mean_v", self.mean_v, b, heads, 1, value_width),
            unlike("dropped", self.dropped, b, heads, 1),
            "it counts less than nothing dropped" if bool((self.dropped < 0).any()) else None,
        )

    def _row_segments(self, rotation: Rotation | None) -> list[StepSegment]:
        one = exact_segment(self.mean_k, self.mean_v)
        lane = self._in_codec_order(one.keys.lane.view(self.dropped.shape[:2])).flatten()
        keys, values = (replace(side, lane=lane) for side in (one.keys, one.values))
        dropped = self.dropped.flatten()[lane]
        bias = dropped.clamp_min(1).log()
        return [*super()._row_segments(rotation), StepSegment(keys, values, (dropped > 0).long(), bias=bias)]

    def _row_parts(self, call: Call, split: bool = False) -> list[Part]:
        parts = super()._row_parts(call, split)
        if self.has_dropped is None:
            self.has_dropped = bool(self.dropped.any())
        if not self.has_dropped:
            return parts
        # where nothing was dropped the bias is log 0 = -inf, which hides the token
        query = self._in_model_order(call.query)
        mean_k, mean_v = self.mean_k.to(query.dtype), self.mean_v.to(query.dtype)
        segment = Segment(query, mean_k, mean_v, bias=self.dropped.log())
        out, lse = grouped.partial([segment], call.scaling, call.softcap)
        part = self._in_codec_order(out), self._in_codec_order(lse)
        return [*parts, *([(part[0], torch.full_like(lse, -torch.inf))] if split else []), part]

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """As `EvictingLayer.keep_best`, after the means have taken in the tokens that are dropped."""
        gone = self._of_heads(candidates.valid & ~top_mask(scores, counts)).unsqueeze(-1)
        total = self.dropped + gone.sum(2)
        read = self._candidates_as_read(candidates, None)
        for name, x in zip(("mean_k", "mean_v"), read, strict=True):
            mean = getattr(self, name)
            # the old mean counts as often as tokens went into it
            new_sum = mean.squeeze(2) * self.dropped + (x.float() * gone).sum(2)
            setattr(self, name, (new_sum / total.clamp_min(1)).unsqueeze(2))
        self.dropped, self.has_dropped = total, None
        super().keep_best(candidates, scores, counts)
