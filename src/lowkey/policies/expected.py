"""Expected Attention (arXiv:2510.00636): keeps what future queries are expected to attend to, given the
distribution of past ones.
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

QUERY_BLOCK = 1024  # queries held in fp32 at once


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Expected Attention: the attention that a random future query is expected to pay. No question is needed.

    Score of token j: `(mean over g of a[g, j] + epsilon) * |v_j|`, with a the softmax over j of
    `log E[exp(c q.k_j)] = c mu.k_j + c^2 / 2 * k_j' Sigma k_j`. q is a Gaussian query of query head g with
    mean mu and covariance Sigma; c is the scaling of attention. Mean and covariance are those of the recorded
    queries: their own rotation is undone and replaced by the mean of the rotations of the next `future`
    positions.

    Args:
        future: number of coming positions whose rotations are averaged (default 512).
        epsilon: added to the expected attention, so that values count for tokens that nobody is expected to
            attend to (default 0.01; the authors evaluate with 0.01 to 0.02).
        covariance: use Sigma, as in the paper; without it only the mean query counts (default True).

    Recorded queries are those of the current chunk, or all since the last eviction.

    Source: arXiv:2510.00636. As in the authors' code, sinks and their queries are left out of the statistics
    and of the softmax, since they are outliers, and `|v|` stands for the paper's `|W_O v|`: a cache layer has
    no W_O. Where we differ: logit soft-capping is left out, since it has no closed form.
    """

    summary: ClassVar[str] = "attention expected of queries still to come"
    paper: ClassVar[str] = "arXiv:2510.00636"

    future: int = option(512, at_least=1, at_most=2**17)
    epsilon: float = option(0.01, at_least=0, at_most=1)
    covariance: bool = True

    @property
    def uses_rotations(self) -> bool:
        """True: rotations of coming positions would make a rope of type `dynamic` grow before its time."""
        return True

    def score(self, context: EvictionContext) -> Tensor:
        """Expected attention times value norms (b, h, s); see the class and `Policy.score`."""
        candidates = context.valid & (context.positions >= self.sinks)
        logits = self._expected_logits(context).masked_fill(~candidates.unsqueeze(2), -torch.inf)
        attention = logits.softmax(-1).nan_to_num(0.0).mean(2)
        return (attention + self.epsilon) * norms(context.values)

    def _expected_logits(self, context: EvictionContext) -> Tensor:
        """log E[exp(c q.k)] for every query head and candidate (b, h, g, s)."""
        mean, covariance = self._query_statistics(context)
        keys = context.keys.float()
        logits = (mean @ keys.mT) * context.scaling
        if self.covariance:
            # One query head at a time: (b, h, s, d) exists once instead of g times.
            quadratic = [((keys @ covariance[:, :, i]) * keys).sum(-1) for i in range(covariance.shape[2])]
            logits += torch.stack(quadratic, 2) * (context.scaling**2 / 2)
        return logits

    def _query_statistics(self, context: EvictionContext) -> tuple[Tensor, Tensor]:
        """Mean (b, h, g, d) and covariance (b, h, g, d, d) of the queries with the mean future rotation."""
        b, h, g, _, d = context.queries.shape
        mean = context.keys.new_zeros(b, h, g, d, dtype=torch.float32)
        covariance = context.keys.new_zeros(b, h, g, d, d, dtype=torch.float32)
        count = (context.query_positions >= self.sinks).sum(1).clamp_min(1)[:, None, None, None]
        for queries, used in self._rotated_queries(context):
            mean += queries.masked_fill(~used, 0).sum(3) / count
        if self.covariance:
            # A second pass over centred queries: E[q q'] - mu mu' would cancel in fp32.
            for queries, used in self._rotated_queries(context):
                centred = (queries - mean.unsqueeze(3)).masked_fill(~used, 0)
                covariance += centred.mT @ centred / count.unsqueeze(4)
        return mean, covariance

    def _rotated_queries(self, context: EvictionContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries with the mean of the coming rotations in the place of their own, in blocks.

        Returns:
            For each block, the queries (b, h, g, n, d) and which of them are used (b, 1, 1, n, 1): those that
            are neither padding nor sinks.
        """
        at = context.query_positions
        coming = at.amax(1, keepdim=True) + 1 + torch.arange(self.future, device=at.device)
        mean_cos, mean_sin = (
            x.mean(2, keepdim=True).unsqueeze(1) for x in context.rope(coming, context.queries)
        )
        for start in range(0, at.shape[1], QUERY_BLOCK):
            block = at[:, start : start + QUERY_BLOCK]
            cos, sin = (x.unsqueeze(1) for x in context.rope(block.clamp_min(0), context.queries))
            plain = unrotate(context.queries[:, :, :, start : start + QUERY_BLOCK].float(), cos, sin)
            yield (
                rotate(plain, mean_cos.expand_as(cos), mean_sin.expand_as(sin)),
                (block >= self.sinks)[:, None, None, :, None],
            )
