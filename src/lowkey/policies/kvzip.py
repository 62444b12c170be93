"""KVzip (arXiv:2505.23416): what the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import LowkeyError
from lowkey.policies.base import EvictionContext, Policy

Softmax = Literal["piece", "context"]


@dataclass(frozen=True)
class KVzip(Policy):
    """Largest attention that a token gets, over all queries and query heads of its KV head, while the model
    repeats the context.

    So nothing depends on a question, and one cache serves many. The repetition is a second pass over the
    context in pieces of `chunk` tokens, which `lowkey.prefill` makes; a cache that was filled otherwise
    refuses to evict. Each piece is asked for with `prompt` and the `bridge` tokens before it. softmax: over
    the sinks, the `piece` and its repetition, as in the paper, so that the cost of scoring is linear in the
    length of the context; or over the whole `context` and the repetition. All layers and heads share one
    threshold (`global`), as in the paper's non-uniform mode.
    """

    summary: ClassVar[str] = "what the model needs to repeat its context"
    paper: ClassVar[str] = "arXiv:2505.23416"
    stateful: ClassVar[bool] = True
    needs_second_pass: ClassVar[bool] = True

    chunk: int = option(2000, at_least=1, at_most=2**24)
    bridge: int = option(8, at_least=0, at_most=2**24)
    prompt: str = option("\n\nRepeat the previous context exactly.\n\n", any_text=True)
    softmax: Softmax = "piece"

    def score(self, context: EvictionContext) -> Tensor:
        if not context.queries.shape[3]:
            return context.previous_scores
        if context.repeated_span is None or context.repetition_lse is None:
            raise LowkeyError(
                "policy kvzip: needs a second pass over the context; fill the cache with "
                "lowkey.prefill(model, tokenizer, cache, ids)"
            )
        first, stop = context.repeated_span[:, None, None].unbind(-1)
        piece = (context.positions >= first) & (context.positions < stop)
        met = context.valid & (piece | (context.positions < self.sinks))
        at = met.any(0).any(0).nonzero().squeeze(1)
        keys, positions, valid, piece = (x[:, :, at] for x in (context.keys, context.positions, met, piece))
        # sinks of which `repeating` does not know
        beside = (valid & ~piece).any(0).any(0).nonzero().squeeze(1)
        found = torch.full(valid.shape, -torch.inf, device=keys.device)
        for some, logits in replace(
            context, keys=keys, positions=positions, valid=valid, visible=None
        ).logits():
            lse = context.repetition_lse[:, :, :, some].unsqueeze(-1)
            if len(beside):
                sinks = logits[..., beside].masked_fill(piece[:, :, None, None, beside], -torch.inf)
                lse = torch.logaddexp(lse, sinks.logsumexp(-1, keepdim=True))
            top = (logits - lse.masked_fill(lse.isneginf(), 0.0)).amax((2, 3))
            found[:, :, : top.shape[-1]] = found[:, :, : top.shape[-1]].maximum(top)
        return context.previous_scores.index_copy(
            2, at, context.previous_scores[:, :, at].maximum(found.exp())
        )
