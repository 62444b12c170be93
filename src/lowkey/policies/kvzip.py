"""KVzip (arXiv:2505.23416): keeps what the model attends to while it repeats its context."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.backends.onednn import row_products
from lowkey.backends.segment import softcapped
from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.ops.precision import for_products
from lowkey.policies.base import EvictionContext, Policy, SecondPass, block_of_queries

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
        keys, valid, in_piece = (x[:, :, columns] for x in (context.keys, scored, in_piece))
        # Every query comes behind the columns, so none is hidden from it. Queries of padding get no weight.
        padding = (context.query_positions < 0)[:, None, None]
        lse = context.repetition_lse.masked_fill(padding, torch.inf)
        # The sinks outside the piece, which `repetition_lse` does not include.
        beside = valid & ~in_piece
        queries = for_products(context.queries) * context.scaling
        best = [
            _largest_log_weights(queries[at], for_products(keys[at]), lse[at], beside[at], context.softcap)
            for at in product(*map(range, valid.shape[:2]))
        ]
        weights = torch.stack(best).view(valid.shape).exp().masked_fill(~valid, 0.0)
        previous = context.previous_scores
        return previous.index_copy(2, columns, previous[:, :, columns].maximum(weights))


def _largest_log_weights(
    queries: Tensor, keys: Tensor, lse: Tensor, beside: Tensor, softcap: float | None
) -> Tensor:
    """The largest log weight (n) that each token of one KV head gets.

    Args:
        queries: (g, w, d), scaled.
        keys: (n, d).
        lse: (g, w), log-sum-exp of the logits over the piece and its repetition; inf for queries that do not
            count.
        beside: (n), which tokens are in neither.
        softcap: attention's logit soft cap, or None.
    """
    rows, sums = queries.flatten(0, 1), lse.flatten().unsqueeze(1)
    if bool(beside.any()):
        logits = softcapped(row_products(rows, keys[beside]), softcap)
        sums = torch.logaddexp(sums, logits.logsumexp(1, keepdim=True))
    step = block_of_queries(len(keys), keys.device)
    largest = [
        softcapped(row_products(q, keys), softcap).sub_(total).amax(0)
        for q, total in zip(rows.split(step), sums.split(step), strict=True)
    ]
    return torch.stack(largest).amax(0)
