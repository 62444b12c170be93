"""TriAttention (arXiv:2604.04921): keeps keys that the model's typical queries will attend to from afar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.ops.rope import rotate
from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class TriAttention(Policy):
    """TriAttention: keys are scored by the centre of the model's queries before their rotation.

    Before the rotary embedding, the queries of most heads lie close to one centre, whatever the text is. Let
    `E q` be the centre of query head g, `f` a pair of channels that is rotated by `w_f` per position, and
    `|.|_f` the norm of a pair. Score of token j at position p, if the newest is at n:

        S_gj = mean over t in {1, 2, 4, ..., reach} of
                   sum over f of |E q|_f |k_j|_f cos(w_f (n + t - p) + phi_f)
               + sum over f of (E |q|_f - |E q|_f) |k_j|_f,

    with phi_f the angle from the key's pair to the centre's. The first part says at which distances the head
    looks; the second is the part of the norms that the centre does not explain. Scores of a query head are
    normalised over its tokens (mean 0, deviation 1), and a KV head takes the largest of its query heads.

    Args:
        reach: the longest distance into the future that is asked (default 65536).
        aggregation: `max` or `mean` over the query heads of a KV head (default `max`).

    It needs the centres of one model, which `lowkey gates MODEL OUT --method triattention` measures.

    Source: arXiv:2604.04921 and its code (github.com/WeianMao/triattention), which evicts after every 128
    steps (`every=128`) and always keeps the prompt (`protect_prompt=true`). Where we differ: each layer and
    KV head chooses by itself, which is one of the code's modes, and the sinks and newest tokens of the policy
    stay, too.
    """

    summary: ClassVar[str] = "what the centre of the model's queries will attend to"
    paper: ClassVar[str] = "arXiv:2604.04921"
    uses_queries: ClassVar[bool] = False
    learns: ClassVar[str] = "triattention"

    reach: int = option(2**16, at_least=1, at_most=2**20)
    aggregation: Literal["max", "mean"] = "max"

    @property
    def uses_rotations(self) -> bool:
        """The centres are rotated to coming positions."""
        return True

    def gate_shapes(self, heads: int, groups: int, width: int, rotated: int) -> dict[str, tuple[int, ...]]:
        """The centre of each query head, and the mean norm of each pair; see `Policy.gate_shapes`."""
        return {"centre": (heads, groups, width), "norms": (heads, groups, width - rotated // 2)}

    def score(self, context: EvictionContext) -> Tensor:
        """Normalised scores of the centres (b, h, s); see `Policy.score`."""
        keys = context.keys.float()
        centre, spread = (context.gates[name].to(keys.device) for name in ("centre", "norms"))
        newest = context.positions.masked_fill(~context.valid, -1).amax((1, 2))
        steps = 2 ** torch.arange(self.reach.bit_length(), device=keys.device)
        coming = newest.clamp_min(0)[:, None] + steps
        rotations = [x.float() for x in context.rope(coming, context.keys)]  # (b, 1, n, p) each
        # cos and sin may be scaled, as YaRN scales, at all positions alike
        scale = torch.hypot(*rotations)[:, :, 0]  # (b, 1, p)
        # the mean of rotations is one linear map
        cos, sin = (x.mean(2, keepdim=True) for x in rotations)
        alike = centre.unsqueeze(-2).expand(len(keys), -1, -1, -1, -1)
        ahead = rotate(alike, cos.unsqueeze(2), sin.unsqueeze(2)).squeeze(3)
        scores = ahead @ keys.mT  # (b, h, g, s)
        unexplained = spread - pair_norms(centre, cos.shape[-1])
        scaled = pair_norms(keys, cos.shape[-1])
        half = cos.shape[-1] // 2
        scaled[..., :half] *= scale[..., :half].unsqueeze(2)
        scores = (scores + unexplained @ scaled.mT) * context.scaling
        return self._aggregated(scores, context.valid.unsqueeze(2))

    def _aggregated(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Scores (b, h, g, s) of query heads -> of KV heads (b, h, s), normalised over what is valid."""
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        centred = scores - scores.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / count
        variance = centred.masked_fill(~valid, 0.0).square().sum(-1, keepdim=True) / count
        normal = centred / variance.sqrt().clamp_min(1e-6)
        return normal.amax(2) if self.aggregation == "max" else normal.mean(2)


def pair_norms(x: Tensor, rotated: int) -> Tensor:
    """Norms of the pairs of channels (..., d) that are rotated together, and of each other channel.

    Args:
        x: (..., d).
        rotated: how many of the first channels are rotated, channel j with channel j + rotated / 2.

    Returns:
        (..., d - rotated / 2).
    """
    half = rotated // 2
    pairs = torch.hypot(x[..., :half], x[..., half:rotated])
    return torch.cat([pairs, x[..., rotated:].abs()], -1)
