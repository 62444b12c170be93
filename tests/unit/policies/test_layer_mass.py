"""ZipVL's layer-adaptive counts: as many tokens of a layer as hold a share of its scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowkey.policies.allocators import LayerMass, MassShare
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


def test_the_mass_of_sinks_may_count():
    """A sink that holds most of the mass makes a layer need little else."""
    a = request([[1.0] * 20, [1.0] * 20], 9.0)
    mass = torch.ones_like(a.scores)
    mass[0, :, -1] = 1000.0
    assert LayerMass().counts(replace(a, mass=mass)).tolist() == [[9, 9], [9, 9]]
    low, high = LayerMass(protected_mass=True).counts(replace(a, mass=mass))[:, 0].tolist()
    assert low == 3 < high == 15


def fewest(weights, tau):
    """How many of the largest weights hold a share of all, counted one by one."""
    held, largest = 0.0, sorted(weights, reverse=True)
    for n, weight in enumerate(largest, 1):
        held += weight
        if held >= tau * sum(weights):
            return n
    return len(weights)


@pytest.mark.defines("token allocators", "mass-share")
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.975])
def test_a_layer_keeps_the_fewest_tokens_that_hold_the_share(tau):
    layers = [[0.8**i for i in range(40)], [1.0 + 0.01 * i for i in range(40)]]
    a = request(layers, 43.0)
    counts = MassShare(tau).counts(a)
    assert counts.tolist() == [[3 + fewest(layer, tau)] * 2 for layer in layers]
    # the set follows from the scores, the count from the mass; which tokens weigh it is all the same
    mass = a.scores.masked_fill(a.scores.isinf(), 5.0)
    a = replace(a, scores=a.scores.masked_fill(a.scores.isfinite(), 1.0), mass=mass)
    assert torch.equal(MassShare(tau).counts(a), counts)
    with_sinks = MassShare(tau, protected_mass=True).counts(a)
    assert with_sinks.tolist() == [[max(3, fewest([*layer, 5.0, 5.0, 5.0], tau))] * 2 for layer in layers]


def test_a_share_of_all_mass_keeps_all():
    a = request([[1.0, 0.0, 0.0], [0.0] * 3], 6.0)
    assert MassShare(1.0).counts(a).tolist() == [[6, 6], [6, 6]]
    assert MassShare(0.99).counts(a).tolist() == [[4, 4], [3, 3]]
    counts = [MassShare(tau).counts(request([[0.9**i for i in range(40)]], 43.0)) for tau in (0.3, 0.6, 0.9)]
    assert counts[0].sum() < counts[1].sum() < counts[2].sum()
