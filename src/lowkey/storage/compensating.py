"""An evicting layer in which one token of each head stands for all that were dropped (RazorAttention,
arXiv:2407.15891).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import grouped
from lowkey.backends.segment import Part, Segment
from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import top_mask
from lowkey.storage.evicting import Candidates, EvictingLayer


class CompensatingLayer(EvictingLayer):
    """Held besides: mean_k, mean_v (b, h, 1, r), the mean key and value of all tokens dropped so far, and
    dropped (b, h, 1), how many.

    In the softmax the mean key's exponential counts as often as tokens were dropped, that is, log(dropped) is
    added to its score.
    """

    mean_k: Tensor
    mean_v: Tensor
    dropped: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        b, h = key_states.shape[:2]
        self.mean_k, self.mean_v = (
            x.new_zeros(b, h, 1, x.shape[-1], dtype=torch.float32) for x in (self.keys, self.values)
        )
        self.dropped = torch.zeros(b, h, 1, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        more = ("mean_k", "mean_v", "dropped")
        return super().tensors() | (
            {name: getattr(self, name) for name in more} if self.is_initialized else {}
        )

    def index_bytes(self) -> int:
        b, h = self.tail_k.shape[:2]
        widths = self.keys.shape[-1] + self.values.shape[-1] + 1
        return super().index_bytes() + b * h * widths * self.dropped.element_size()

    def _stored_parts(self, call: Call, stop: int) -> list[Part]:
        parts = super()._stored_parts(call, stop)
        if not bool(self.dropped.any()):
            return parts
        query = self.codec.project_query(call.query)
        mean_k, mean_v = self.mean_k.to(query.dtype), self.mean_v.to(query.dtype)
        # log 0 = -inf: nothing was dropped there
        mean = Segment(query, mean_k, mean_v, bias=self.dropped.log())
        out, lse = grouped.partial([mean], call.scaling, call.softcap)
        return [*parts, (self.codec.expand_output(out), lse)]

    def keep_best(self, found: Candidates, scores: Tensor, counts: Tensor) -> None:
        gone = (found.valid & ~top_mask(scores, counts)).unsqueeze(-1)
        total = self.dropped + gone.sum(2)
        for name, x in (("mean_k", found.keys), ("mean_v", found.values)):
            mean = getattr(self, name)
            grown = mean.squeeze(2) * self.dropped + (x.float() * gone).sum(2)
            setattr(self, name, (grown / total.clamp_min(1)).unsqueeze(2))
        self.dropped = total
        super().keep_best(found, scores, counts)
