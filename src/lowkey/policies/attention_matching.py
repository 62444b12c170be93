"""Attention Matching (arXiv:2602.16284): a bias and new values of kept tokens stand for the dropped ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.policies.base import EvictionContext, Policy, SecondPass, attention_sums


@dataclass(frozen=True)
class AttentionMatching(Policy):
    """Attention Matching: the tokens of the highest attention stay, and stand for all others.

    Score of token j: `sqrt(mean over g, q of a[g, q, j]^2)`, with a the attention weights of the *reference
    queries*. The kept tokens, but for `sinks` and `recent`, then get

    - a bias `log w_j` of their attention scores, which keeps the attention mass: w minimises the sum over g
      and q of `(sum over kept j of w_j a[g, q, j] - sum over all j of a[g, q, j])^2`, within the bound;
    - new values, which keep the outputs: least squares of the outputs of all tokens by the weights that the
      kept tokens have with their biases.

    With allocator `global`, which policy `attention-matching` uses, all layers and heads share one threshold.
    What the reference queries do not decide stays as it was, by the ridge. Keys stay as they are. The bias is
    held in one more channel of every stored key.

    Args:
        keys: which tokens a head keeps, once the allocator has said how many. `highest`: those of the highest
            scores. `pursuit`: orthogonal matching pursuit, which takes one token after the other, each time
            the one whose attention has the largest product with the mass that is still lacking, and weighs
            all taken ones anew. It takes memory for the square of a context's tokens (default `highest`).
        queries: the reference queries. `prompt`: those since the last eviction, each over the tokens before
            it. `repeat`: those of a second pass in which the model repeats the context, as `lowkey.prefill`
            makes it, which the paper calls repeat-prefill (default `repeat`).
        references: number of reference queries at most, spread evenly (default 1024).
        bound: largest absolute value that one eviction adds to a bias (default 3).
        ridge: how strongly weights are drawn to 1 and values to those of the token itself, as a multiple of
            the mean squared weight of a token (default 0.001).
        chunk: number of tokens of each piece that is repeated (default 2000).
        bridge: number of tokens before a piece that are given with the request (default 8).
        prompt: text that asks for the repetition.

    Source: arXiv:2602.16284, the variants of the highest attention keys and of orthogonal matching pursuit
    (OMP). Where we differ: masses are matched relative to each query's own, where the published code weighs
    queries by their mass over their largest logit; the bounded problem is solved, where it takes two steps
    from the clamped solution of the unbounded one; the ridge, of which it has none; one threshold decides how
    many tokens a head keeps, where it reads that from a table made for each model; the pursuit takes and
    weighs one token at a time at any length, where it takes up to four beyond 300; references are those of
    one pass over the full cache, not of a pass over layers that are compacted already.
    """

    summary: ClassVar[str] = "highest attention; a bias and new values stand for what was dropped"
    paper: ClassVar[str] = "arXiv:2602.16284"
    layer: ClassVar[str] = "matching"
    holds_biases: ClassVar[bool] = True
    needs_whole_keys: ClassVar[str] = "holds a bias beside each of the model's own keys, and fits values"

    keys: Literal["highest", "pursuit"] = "highest"
    queries: Literal["prompt", "repeat"] = "repeat"
    references: int = option(1024, at_least=1, at_most=2**24)
    bound: float = option(3.0, above=0, at_most=16)
    ridge: float = option(1e-3, above=0, at_most=1e6)
    chunk: int = option(2000, at_least=1, at_most=2**24)
    bridge: int = option(8, at_least=0, at_most=2**24)
    prompt: str = option("\n\nRepeat the previous context exactly.\n\n", any_text=True)

    @property
    def second_pass(self) -> SecondPass | None:
        """The request to repeat the context; None where the prompt's own queries are the references."""
        if self.queries == "prompt":
            return None
        return SecondPass(self.chunk, self.bridge, self.prompt, whole_context=True)

    def score(self, context: EvictionContext) -> Tensor:
        """The root of the mean squared attention (b, h, s) of the reference queries; see `Policy.score`.

        Raises:
            LowkeyError: `queries=repeat`, and there was no second pass.
        """
        queries = (context.query_positions >= 0).sum(1).clamp_min(1)
        if self.queries == "repeat" and context.queries.shape[3] and context.repeated_span is None:
            raise LowkeyError(
                "policy attention-matching: needs a second pass over the context; fill the cache with "
                "lowkey.prefill(model, tokenizer, cache, ids), or give it queries=prompt"
            )
        return (attention_sums(context, squared=True).mean(2) / queries[:, None, None]).sqrt()
