"""Default allocators, layouts and ranks of methods are those of their papers; allocators as objects."""

from __future__ import annotations

import pytest
from calibrated_ranks import CHEAP, calibrate
from pico import LAYERS

from lowkey.allocation.allocators import RANK_ALLOCATORS, Tail, UniformRanks
from lowkey.allocation.base import RankAllocator
from lowkey.core.types import LowkeyError
from lowkey.methods import KQSVD, METHODS, StiefAttention

# -- defaults


DEFAULTS = {  # of the papers: allocator, layout, candidate ranks, options
    "pca": ("greedy", "post_rope", "8", {}),
    "eigenattention": (
        "threshold",
        "pre_rope",
        "8",
        {"form": "paper", "key_bases": "shared", "value_bases": "per_head"},
    ),
    "stiefattention": (
        *("weighted-pareto", "pre_rope", "50%,60%,70%,80%,90%"),
        {"parametrisation": "mlp", "key_bases": "shared", "value_bases": "per_head"},
    ),
    "kq-svd": ("tail", "post_rope", "8", {"outputs": "stacked", "weighting": "none", "group": 1}),
    "stiefattention-joint": ("spectrum", "pre_rope", "8", {"group": 0, "steps": 96}),
    "fisher-svd": ("spectrum", "pre_rope", "8", {"group": 0}),
    "palu": ("fisher", "pre_rope", "8", {"group": 4}),
    "lorc": ("condition", "pre_rope", "8", {"scope": "layer", "whiten": False}),
    "recalkv": ("fisher", "pre_rope", "8", {"group": 4, "iterations": 1}),
    "matryoshka": ("greedy", "post_rope", "8", {"centred": True, "kl": 0.25, "lr": 1e-3}),
    "kv-latent": ("uniform", "post_rope", "8", {"choose": "stride", "values": "stride"}),
    "kv-head-svd": (
        "uniform",
        "post_rope",
        "8",
        {"group": 0, "keys": "layer", "heads": "consecutive", "basis": "activations", "whole": True},
    ),
    "mea": ("uniform", "post_rope", "8", {"basis": "weights"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_a_method_are_those_of_its_paper(name):
    kind = METHODS[name]
    allocator, layout, ranks, options = DEFAULTS[name]
    assert (kind.allocator, kind.layout, kind.grid) == (allocator, layout, ranks)
    assert {key: getattr(kind(), key) for key in options} == options


@pytest.mark.parametrize("name", METHODS)
def test_calibration_uses_the_defaults_of_its_method(name):
    plan = calibrate(CHEAP[name], budget="93.7%")
    assert (plan.allocator["name"], plan.layout) == DEFAULTS[name][:2]


def test_the_papers_protocol_of_stiefattention():
    """Windows per step and epochs, told by counting: 6 fitting windows, 2 epochs, ranks 8 and 12, keys one by
    one and values by four.
    """
    from lowkey.methods import stiefattention as stief

    assert (stief.EPOCHS["mlp"], stief.PATIENCE["mlp"], stief.DELTA, stief.WEIGHT_DECAY) == (
        50,
        5,
        1e-6,
        1e-4,
    )
    sizes = []

    class Counting(StiefAttention):
        def fit(self, statistics, probe, ranks, seed):
            batches = probe.batches

            def counted(size, generator):
                sizes.append(size)
                return batches(size, generator)

            probe.batches = counted
            return super().fit(statistics, probe, ranks, seed)

    calibrate(Counting(epochs=2), ranks=[8, 12], budget="75%")
    assert sizes == ([1] * 4 + [4] * 4) * LAYERS


# -- allocators as objects


def test_an_allocator_object_with_options():
    plan = calibrate(KQSVD(), budget="50%", allocator=Tail("squared"))
    assert plan.allocator == {"name": "tail", "parameters": {"energy": "squared"}}
    plan = calibrate(budget="50%", allocator=UniformRanks("measured"))
    assert plan.allocator["parameters"] == {"split": "measured"}


def test_an_object_that_is_no_allocator_is_refused():
    class Half:
        summary, required_signals = "", ()

        def under_bytes(self, profile, limit):
            return []

    with pytest.raises(
        LowkeyError, match=r"allocator Half: lacks .*derive it from lowkey\.allocation\.base\.RankAllocator"
    ):
        calibrate(allocator=Half())


def test_every_allocator_says_what_it_bounds_and_does_so():
    for kind in RANK_ALLOCATORS.values():
        assert issubclass(kind, RankAllocator) and kind.bounds and kind.summary
