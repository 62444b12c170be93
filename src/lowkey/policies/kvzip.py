"""KVzip (arXiv:2505.23416): keeps what the model attends to while it repeats its context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, SecondPass

Softmax = Literal["piece", "context"]


@dataclass(frozen=True)
class KVzip(Policy):
    """KVzip: reconstruction attention. It depends on no question, so one compressed cache serves many.

    Score of token j: `max over g, q of a[g, q, j]`, with a the attention weights of query head g of the KV
    head and query q, over all queries of a second pass in which the model repeats the context in pieces.
    `lowkey.prefill` makes that pass; a cache that was filled in another way refuses to evict. With allocator
    `global`, which policy `kvzip` uses, all layers and heads share one threshold: the paper's non-uniform
    mode.

    Args:
        chunk: number of tokens of each piece (default 2000).
        bridge: number of tokens before a piece that are given with the request, so that the model knows where
            to begin (default 8).
        prompt: text that asks for the repetition.
        softmax: over which tokens weights add up to one. `piece`: the sinks, the piece and its repetition, as
            in the paper; the cost of scoring is then linear in the length of the context. `context`: the
            whole context and the repetition (default `piece`).

    Source: arXiv:2505.23416.
    """

    summary: ClassVar[str] = "what the model needs to repeat its context"
    paper: ClassVar[str] = "arXiv:2505.23416"
    stateful: ClassVar[bool] = True

    chunk: int = option(2000, at_least=1, at_most=2**24)
    bridge: int = option(8, at_least=0, at_most=2**24)
    prompt: str = option("\n\nRepeat the previous context exactly.\n\n", any_text=True)
    softmax: Softmax = "piece"

    @property
    def second_pass(self) -> SecondPass:
        """The request to repeat the context, with these options."""
        return SecondPass(self.chunk, self.bridge, self.prompt, self.softmax == "context")

    def score(self, context: EvictionContext) -> Tensor:
        """The largest weight (b, h, s) that a query of any second pass gave; see `Policy.score`.

        Raises:
            LowkeyError: there was no second pass.
        """
        if not context.queries.shape[3]:
            return context.previous_scores
        if context.repeated_span is None or context.repetition_lse is None:
            raise LowkeyError(
                "policy kvzip: needs a second pass over the context; fill the cache with "
                "lowkey.prefill(model, tokenizer, cache, ids)"
            )
        first, stop = context.repeated_span[:, None, None].unbind(-1)
        in_piece = (context.positions >= first) & (context.positions < stop)
        scored = context.valid & (in_piece | (context.positions < self.sinks))
        # Only the columns that some row or head needs: the cost is that of the piece, not of the context.
        columns = scored.any(0).any(0).nonzero().squeeze(1)
        keys, positions, valid, in_piece = (
            x[:, :, columns] for x in (context.keys, context.positions, scored, in_piece)
        )
        # The columns of sinks outside the piece: `repetition_lse` does not include them.
        sink_columns = (valid & ~in_piece).any(0).any(0).nonzero().squeeze(1)
        best = torch.full(valid.shape, -torch.inf, device=keys.device)  # largest log weight of each token
        narrowed = replace(context, keys=keys, positions=positions, valid=valid, visible=None)
        for block, logits in narrowed.logits():
            lse = context.repetition_lse[:, :, :, block].unsqueeze(-1)
            if len(sink_columns):
                sinks = logits[..., sink_columns].masked_fill(
                    in_piece[:, :, None, None, sink_columns], -torch.inf
                )
                lse = torch.logaddexp(lse, sinks.logsumexp(-1, keepdim=True))
            # A padding query has only -inf logits and an lse of -inf; their difference would be NaN.
            top = (logits - lse.masked_fill(lse.isneginf(), 0.0)).amax((2, 3))
            best[:, :, : top.shape[-1]] = best[:, :, : top.shape[-1]].maximum(top)
        previous = context.previous_scores
        return previous.index_copy(2, columns, previous[:, :, columns].maximum(best.exp()))
