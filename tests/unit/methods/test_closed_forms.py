"""Properties that every closed-form method (KQ-SVD, Palu, LoRC, ReCalKV) has."""

from __future__ import annotations

import copy
from functools import cache

import pico
import pytest
import torch
from closed_forms import (
    LENGTH,
    METHOD,
    MODELS,
    RANKS,
    ROWS,
    fitted,
    joint_rows,
    model_of,
    prepared,
    rebuilt,
    recorded,
)
from hypothesis import given
from hypothesis import strategies as st
from pico import HEAD_DIM, feed
from torch import Tensor

import lowkey
from lowkey import Sample
from lowkey.core.types import LowkeyError
from lowkey.methods import KQSVD, METHODS, Palu, ReCalKV
from lowkey.models import families
from lowkey.ops.products import group_size
from lowkey.plan.plan import Plan

DATA_FREE = ["lorc", "lorc-head"]
ON_DATA = ["palu", "palu-2", "lorc-whitened", "recalkv", "recalkv-2"]
GROUPS = {"kq-svd-4": 4, "palu-2": 2, "recalkv-2": 2}
KV_HEADS = {name: families.geometry(pico.build(name, **MODELS[name])).kv_heads for name in MODELS}
SERVED = [
    (method, name)
    for method in METHOD
    for name in MODELS
    if (method not in DATA_FREE or name != "qwen3") and KV_HEADS[name] % GROUPS.get(method, 1) == 0
]


@cache
def exact_logits(name: str) -> Tensor:
    model = copy.deepcopy(model_of(name))
    model.set_attn_implementation("eager")
    return feed(model, ROWS)


def test_all_are_registered():
    assert {METHODS[name] for name in ("kq-svd", "palu", "lorc", "recalkv")} == {
        type(m) for m in METHOD.values()
    }


@pytest.mark.parametrize(("method", "name"), SERVED)
def test_full_rank_gives_the_stock_logits(method, name, layout):
    model = model_of(name)
    full = families.geometry(model).compressible
    maps = {i: fitted(method, name, layout, i).at(HEAD_DIM, HEAD_DIM) for i in full}
    out, reference = feed(model, ROWS, pico.lowrank(model, maps, layout)), exact_logits(name)
    assert torch.allclose(out, reference, atol=1e-4), float((out - reference).abs().max())


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2"])
@pytest.mark.parametrize("method", METHOD)
def test_lower_ranks_cost_the_bytes_that_were_predicted(method, name, layout):
    model = model_of(name)
    past = pico.lowrank(
        model, {i: fitted(method, name, layout, i).at(4, 8) for i in range(pico.LAYERS)}, layout
    )
    feed(model, ROWS[:2], past, splits=[13, 1, 6])
    heads, offsets = families.geometry(model).kv_heads, 2 * 2 * 8 * pico.LAYERS
    assert (
        past.nbytes() == past.predicted_nbytes() == 2 * LENGTH * heads * (4 + 8) * 4 * pico.LAYERS + offsets
    )


@pytest.mark.parametrize("method", METHOD)
def test_a_smaller_rank_has_a_larger_error(method, layout):
    _, probe = prepared("llama", layout)
    bases = fitted(method, "llama", layout)
    full, half, least = (probe.held_out_error(bases.at(r, r)) for r in (16, 8, 4))
    assert full < 1e-5 < half < least < 1


@pytest.mark.parametrize("method", METHOD)
def test_fitting_again_gives_the_same(method, layout):
    first, again = fitted(method, "llama", layout), METHOD[method].fit(*prepared("llama", layout), RANKS, 0)
    for a, b in ((first.keys, again.keys), (first.values, again.values)):
        assert all(torch.equal(x, y) for x, y in zip(a.at(8), b.at(8), strict=True)) and torch.equal(
            a.spectrum, b.spectrum
        )


@pytest.mark.parametrize("method", METHOD)
def test_signs_are_settled(method):
    """A solver may turn any column round; the largest entry of each is positive."""
    bases = fitted(method, "llama", "pre_rope")
    for basis in (bases.keys, bases.values):
        largest = basis.columns.gather(-2, basis.columns.abs().argmax(-2, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("method", METHOD)
def test_spectra_have_one_energy_per_rank_and_fall(method, layout):
    bases = fitted(method, "llama-mha", layout)
    for basis in (bases.keys, bases.values):
        assert basis.spectrum.shape == (8 // basis.merge, HEAD_DIM)
        assert bool((basis.spectrum.diff(dim=-1) <= 1e-9 * basis.spectrum.amax()).all()) and bool(
            (basis.spectrum >= 0).all()
        )


@pytest.mark.parametrize("method", ON_DATA)
def test_the_spectrum_past_a_rank_is_the_calibration_error(method):
    bases, seen = fitted(method, "llama-mha", "pre_rope"), recorded("llama-mha", "pre_rope")
    for basis, name in ((bases.keys, "keys"), (bases.values, "values")):
        x = joint_rows(seen[name])
        error = (x - rebuilt(x, basis, 4, bases.order)).square().sum()
        assert torch.allclose(error, basis.spectrum[:, 4:].sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["palu", "lorc", "recalkv", "kq-svd"])
def test_a_plan_comes_out_saves_and_runs(tmp_path, name):
    model, chars = model_of("llama-mha"), "".join(chr(32 + (i * i + 7 * i) % 95) for i in range(900))
    plan = lowkey.calibrate(
        model, pico.tokenizer(), chars, method=METHODS[name](), budget="50%", sample=Sample(8, 24, batch=4)
    )
    assert plan.layout == METHODS[name].layout and plan.allocator["name"] == METHODS[name].allocator
    plan.save(tmp_path)
    past = lowkey.make_cache(model, plan=Plan.load(tmp_path, model))
    feed(model, ROWS, past, splits=[15, 1, 4])
    assert past.nbytes() == past.predicted_nbytes()


@given(heads=st.integers(1, 40))
def test_the_usual_group_is_lowered_to_the_largest_divisor(heads):
    t = group_size(heads, 4, 4)
    assert heads % t == 0 and t <= 4 and not any(heads % u == 0 for u in range(t + 1, min(4, heads) + 1))


@given(heads=st.integers(1, 40), wanted=st.integers(-2, 50))
def test_a_group_that_does_not_divide_names_the_divisors(heads, wanted):
    if wanted >= 1 and heads % wanted == 0:
        assert group_size(heads, wanted) == wanted
        return
    with pytest.raises(
        LowkeyError, match=f"group {wanted}: must divide the model's {heads} KV heads; choose one of 1(, |$)"
    ):
        group_size(heads, wanted)


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        *((kind, group) for kind in (Palu, ReCalKV, KQSVD) for group in (3, 8)),
        (Palu, 0),
        (ReCalKV, 0),
        (KQSVD, -1),
    ],
)
def test_an_invalid_group_is_refused_before_anything_is_read(kind, group):
    with pytest.raises(LowkeyError, match=f"group {group}"):
        lowkey.calibrate(model_of("llama"), None, "", method=kind(group=group))
