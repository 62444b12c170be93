"""ZipVL's layer-adaptive counts: as many tokens of a layer as hold a share of its scores."""

from __future__ import annotations

import pytest
import torch

from lowkey.policies.allocators import LayerMass
from lowkey.policies.sharing import AllocationRequest


def request(shares, mean, heads=2, protected=3):
    """Layers whose heads all have these scores, in mixed order, beside tokens that stay in any case."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor(s)[torch.randperm(len(s), generator=generator)] for s in shares]
    scores = torch.stack([row.expand(heads, -1) for row in rows]).clone()
    stays = torch.full((len(rows), heads, protected), torch.inf)
    return AllocationRequest(torch.cat([scores, stays], 2), mean, scores.shape[2] + protected, 0, len(rows))


@pytest.mark.defines("token allocators", "layer-mass")
def test_layers_keep_the_same_share_of_their_mass():
    """By hand: tokens are dealt one by one to the layer that holds the smallest share of its mass so far."""
    peaked = [0.9**i for i in range(40)]
    flat = [1.0 + 0.001 * i for i in range(40)]
    middle = [0.97**i for i in range(40)]
    layers = [peaked, flat, middle]
    for mean in (8.0, 14.0, 25.0):
        a = request(layers, mean)
        counts = LayerMass().counts(a)
        assert int(counts.sum()) == a.share() and bool((counts[:, :1] == counts).all())
        held = [
            sum(sorted(layer, reverse=True)[: int(n) - 3]) / sum(layer)
            for layer, n in zip(layers, counts[:, 0], strict=True)
        ]
        # one token more or less of any layer is the largest difference there can be
        step = max(max(layer) / sum(layer) for layer in layers)
        assert max(held) - min(held) < 2 * step
        assert counts[0, 0] < counts[2, 0] < counts[1, 0]


def test_layers_without_scores_keep_what_is_protected_first():
    a = request([[0.0] * 20, [1.0] * 20], 8.0)
    assert LayerMass().counts(a).tolist() == [[3, 3], [13, 13]]


def test_sinks_hold_no_mass():
    """What stays in any case says nothing of how many others a layer needs."""
    a = request([[1.0] * 20, [1.0] * 20], 13.0)
    assert LayerMass().counts(a).tolist() == [[13, 13], [13, 13]]
