"""Points of the Stiefel manifold as the Q of a QR decomposition, from free matrices or from a small network."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowkey.ops.bases import orthonormal


class RankedMatrices(nn.Module):
    """A matrix for each of `count` ranks: one that all share, from `start` (h, d, d), plus each rank's own
    departure from it.

    The shared part is moved by every rank's gradient, so it learns fast; the departures, zero at first, lift
    the constraint that one nested basis serve all. Called with rank indices (n), it gives their orthonormal Q
    (n, h, d, d).
    """

    def __init__(self, start: Float[Tensor, "h d d"], count: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(start.float().clone())
        self.own = nn.Parameter(torch.zeros(count, *start.shape))

    def forward(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n h d d"]:
        return orthonormal(self.shared + self.own[index])


class Predictor(nn.Module):
    """arXiv:2601.21686, Eq. 13-17: statistics [mean; variance] (h, 2d) -> three hidden layers -> (h, d, d) ->
    Q.

    Hidden widths are not given in the paper; `width` is ours. One network per head, run as a batch.
    """

    def __init__(
        self, statistics: Float[Tensor, "h p"], d: int, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.d = d
        sizes = [statistics.shape[1], width, width, width]
        self.statistics = nn.Buffer(statistics.float())
        self.weights = nn.ParameterList(
            _kaiming(len(statistics), i, o, generator) for i, o in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(len(statistics), 1, width) for _ in sizes[1:])
        self.head = nn.Parameter(_kaiming(len(statistics), width, d * d, generator))
        self.shift = nn.Parameter(torch.eye(d).expand(len(statistics), d, d).clone())

    def forward(self) -> Float[Tensor, "h d d"]:
        x = self.statistics.unsqueeze(1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = nn.functional.gelu(nn.functional.layer_norm(x @ weight + bias, weight.shape[-1:]))
        return orthonormal((x @ self.head).view(-1, self.d, self.d) + self.shift)


def _kaiming(heads: int, fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
    return torch.randn(heads, fan_in, fan_out, generator=generator) * fan_in**-0.5
