"""Fast KVzip (arXiv:2601.17668): a small gate tells at once what KVzip would find by a second pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.ops.rope import unrotate
from lowkey.ops.sink_gate import WIDTH, sink_gate
from lowkey.policies.base import EvictionContext, Policy


@dataclass(frozen=True)
class FastKVzip(Policy):
    """Fast KVzip: the score that a gate, trained on KVzip's scores, gives each token as it comes.

    Score of token j: `sink_gate(x_j)` of its layer (see `lowkey.ops.sink_gate`), which is kept with it.
    With allocator `global`, which policy `fast-kvzip` uses, all layers and heads share one threshold, and
    counts are exact. It has no options of its own.

    It needs gates of one model, which `lowkey gates MODEL OUT --method fast-kvzip` trains.

    Source: arXiv:2601.17668 and its code (github.com/Janghyun1230/FastKVzip). Where we differ: x is not the
    hidden state, which a cache layer does not see, but the queries and keys before their rotation and the
    values that were made of it, side by side. They are linear in the hidden state, so the gate can say the
    same of them; where a model normalises queries and keys, it sees their directions. Levels `pair`, `layer`
    and `head` are allocators `global`, `ada` with `alpha=0`, and `uniform`; counts are exact, and of equal
    scores the earlier token stays. The published code evicts every 128 steps while decoding (`every=128`)
    and does not protect the prompt.
    """

    summary: ClassVar[str] = "a gate that was trained on what KVzip finds"
    paper: ClassVar[str] = "arXiv:2601.17668"
    stateful: ClassVar[bool] = True
    learns: ClassVar[str] = "fast-kvzip"

    @property
    def uses_rotations(self) -> bool:
        """Queries and keys are seen as they were before their rotation."""
        return True

    def gate_shapes(self, heads: int, groups: int, width: int, rotated: int) -> dict[str, tuple[int, ...]]:
        """The tensors of `sink_gate`, with 16 sinks; see `Policy.gate_shapes`."""
        seen = heads * (groups + 2) * width
        return {
            "query": (heads, groups, WIDTH, seen),
            "query_bias": (heads, groups, WIDTH),
            "key": (heads, WIDTH, seen),
            "key_bias": (heads, WIDTH),
            "query_norm": (WIDTH,),
            "key_norm": (WIDTH,),
            "sinks": (heads, 16, WIDTH),
            "bias": (heads, groups),
        }

    def score(self, context: EvictionContext) -> Tensor:
        """The gate's scores of new tokens, and those that the others have (b, h, s); see `Policy.score`."""
        new = context.queries.shape[3]
        if not new:
            return context.previous_scores
        gate = {name: t.to(context.keys.device) for name, t in context.gates.items()}
        found = sink_gate(self._inputs(context, new), gate).transpose(1, 2)
        return torch.cat([context.previous_scores[..., :-new], found], 2)

    def _inputs(self, context: EvictionContext, new: int) -> Tensor:
        """Queries, keys and values (b, w, z) of the newest w tokens, not rotated."""
        at = context.query_positions.clamp_min(0)
        cos, sin = (x.float() for x in context.rope(at, context.queries))
        queries = unrotate(context.queries.float(), cos.unsqueeze(1), sin.unsqueeze(1))
        keys = unrotate(context.keys[:, :, -new:].float(), cos, sin)
        return gate_inputs(queries, keys, context.values[:, :, -new:].float())


def gate_inputs(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What the gate sees of each token.

    Args:
        queries: (b, h, g, t, d), not rotated.
        keys: (b, h, t, d), not rotated.
        values: (b, h, t, d).

    Returns:
        (b, t, h (g + 2) d).
    """
    parts = (queries.flatten(1, 2), keys, values)
    return torch.cat([x.transpose(1, 2).flatten(2) for x in parts], -1)
