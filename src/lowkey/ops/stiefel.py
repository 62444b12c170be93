"""Orthonormal matrices that can be trained: the Q of a QR decomposition of free parameters.

Matrices with orthonormal columns are the points of the Stiefel manifold.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowkey.ops.bases import orthonormal


class RankedMatrices(nn.Module):
    """An orthonormal matrix for each candidate rank, of a shared part and one departure for each rank.

    The gradients of all ranks move the shared part, so it learns fast. The departures start at zero; they
    lift the constraint that one nested basis must serve all ranks.

    Args:
        start: the shared part at the start.
        count: number of ranks.
    """

    def __init__(self, start: Float[Tensor, "h d d"], count: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(start.float().clone())
        self.departures = nn.Parameter(torch.zeros(count, *start.shape))

    def forward(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n h d d"]:
        """The orthonormal matrices of the ranks with these numbers."""
        return orthonormal(self.shared + self.departures[index])


class Predictor(nn.Module):
    """Predicts an orthonormal matrix for each head from statistics (arXiv:2601.21686, equations 13 to 17).

    Three hidden layers with layer norm and GELU, then a linear map to d x d, then QR. Each head has a network
    of its own; all run as one batch. The paper does not give the hidden width.

    Args:
        statistics: what the networks read, [mean; variance] of each head.
        d: head dim.
        width: of the hidden layers.
        generator: for the initial weights.
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
        """The orthonormal matrix of each head."""
        x = self.statistics.unsqueeze(1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = nn.functional.gelu(nn.functional.layer_norm(x @ weight + bias, weight.shape[-1:]))
        return orthonormal((x @ self.head).view(-1, self.d, self.d) + self.shift)


def _kaiming(heads: int, fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
    """Initial weights of variance 1 / fan_in, for each head."""
    return torch.randn(heads, fan_in, fan_out, generator=generator) * fan_in**-0.5
