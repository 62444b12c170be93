"""Expected Attention (arXiv:2510.00636): what queries still to come will look at, from the distribution of
those that came.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.ops.rope import rotate, unrotate
from lowkey.policies.base import EvictionContext, Policy, norms

BLOCK = 1024  # queries held in fp32 at once


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """(a + epsilon) |v|, with a the attention that a query drawn from a Gaussian is expected to pay.

    The Gaussian is that of the context's queries without their rotation, rotated by the mean of the rotations
    of the next `future` positions. Then E[exp(c q.k)] = exp(c mu.k + c^2/2 k' Sigma k), c the scaling; a is
    that, normalised over tokens, in the mean over the query heads of a KV head. The paper's |W_O v| is |v| in
    the authors' code and here: a layer's cache has no W_O.

    epsilon: how much a token counts that nobody is expected to look at; the authors evaluate with 0.01 to
    0.02. covariance: with Sigma, as in the paper; without it only the mean query counts. Sinks and their
    queries are outliers: they are left out of the statistics and of the normalisation, as in the authors'
    code. Logit soft-capping has no closed form and is left out. Queries are those of the current chunk (or
    since the last eviction), taken where they are made, so QK-norm needs nothing special.
    """

    summary: ClassVar[str] = "attention expected of queries still to come"
    paper: ClassVar[str] = "arXiv:2510.00636"

    future: int = option(512, at_least=1, at_most=2**17)
    epsilon: float = option(0.01, at_least=0, at_most=1)
    covariance: bool = True

    @property
    def uses_rotations(self) -> bool:
        """Whether the score asks the model for rotations; those of coming positions would make a `dynamic`
        rope grow before its time.
        """
        return True

    def score(self, context: EvictionContext) -> Tensor:
        candidates = context.valid & (context.positions >= self.sinks)
        logits = self._expected(context).masked_fill(~candidates.unsqueeze(2), -torch.inf)
        attention = logits.softmax(-1).nan_to_num(0.0).mean(2)
        return (attention + self.epsilon) * norms(context.values)

    def _expected(self, context: EvictionContext) -> Tensor:
        """log E[exp(c q.k)], (b, h, g, s)."""
        mean, cov = self._statistics(context)
        keys = context.keys.float()
        logits = (mean @ keys.mT) * context.scaling
        if self.covariance:
            quadratic = [((keys @ cov[:, :, i]) * keys).sum(-1) for i in range(cov.shape[2])]
            logits += torch.stack(quadratic, 2) * (context.scaling**2 / 2)
        return logits

    def _statistics(self, context: EvictionContext) -> tuple[Tensor, Tensor]:
        """Mean (b, h, g, d) and covariance (b, h, g, d, d) of the averagely rotated queries; two passes, for
        the sake of fp32.
        """
        b, h, g, _, d = context.queries.shape
        mean, cov = (
            context.keys.new_zeros(b, h, g, d, dtype=torch.float32),
            context.keys.new_zeros(b, h, g, d, d, dtype=torch.float32),
        )
        count = (context.query_positions >= self.sinks).sum(1).clamp_min(1)[:, None, None, None]
        for queries, used in self._turned(context):
            mean += queries.masked_fill(~used, 0).sum(3) / count
        for queries, used in self._turned(context) if self.covariance else ():
            centred = (queries - mean.unsqueeze(3)).masked_fill(~used, 0)
            cov += centred.mT @ centred / count.unsqueeze(4)
        return mean, cov

    def _turned(self, context: EvictionContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of queries (b, h, g, n, d) with the mean of the coming rotations in the place of their own;
        (b, 1, 1, n, 1): used?
        """
        at = context.query_positions
        coming = at.amax(1, keepdim=True) + 1 + torch.arange(self.future, device=at.device)
        mean_cos, mean_sin = (
            x.mean(2, keepdim=True).unsqueeze(1) for x in context.rope(coming, context.queries)
        )
        for start in range(0, at.shape[1], BLOCK):
            block = at[:, start : start + BLOCK]
            cos, sin = (x.unsqueeze(1) for x in context.rope(block.clamp_min(0), context.queries))
            plain = unrotate(context.queries[:, :, :, start : start + BLOCK].float(), cos, sin)
            yield (
                rotate(plain, mean_cos.expand_as(cos), mean_sin.expand_as(sin)),
                (block >= self.sinks)[:, None, None, :, None],
            )
