"""Text in, Plan out: from end to end on a pico model, and resumed after a stop."""

from __future__ import annotations

import importlib
import string
from dataclasses import replace
from typing import ClassVar

import pico
import pytest
import torch

import lowkey
from lowkey import Sample
from lowkey.allocation.rank_grid import grid, multiples
from lowkey.core.types import LowkeyError
from lowkey.methods import PCA, EigenAttention, StiefAttention
from lowkey.models import attention_interface, families
from lowkey.plan.plan import Plan

module = importlib.import_module("lowkey.calibration.calibrate")
TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
SMALL = Sample(windows=8, length=24, batch=4)


def calibrate(model=None, method=None, **kwargs) -> Plan:
    options = {"method": method or PCA(), "sample": SMALL, **kwargs}
    return lowkey.calibrate(model or pico.attached("llama"), pico.tokenizer(), TEXT, **options)


def same(a: Plan, b: Plan) -> bool:
    maps = [
        (f, g)
        for i in a.factors
        for f, g in zip(vars(a.factors[i]).values(), vars(b.factors[i]).values(), strict=True)
    ]
    return a.describe() == b.describe() and all(f is g or torch.equal(f, g) for f, g in maps)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_a_plan_within_its_budget_saves_loads_and_runs(tmp_path, name, layout):
    model = pico.attached(name)
    plan = calibrate(model, EigenAttention(), layout=layout, budget="50%", sinks=2, recent=3)
    shape = families.geometry(model)
    assert sorted(plan.factors) == list(shape.compressible)
    assert (plan.sinks, plan.recent) == (2, 3)
    assert 0 < plan.bytes_per_token(4) <= 0.5 * shape.full_bytes_per_token(4)
    plan.save(tmp_path)
    cache = lowkey.make_cache(model, plan=Plan.load(tmp_path, model))
    pico.feed(model, pico.prompt(), cache, splits=[30, 1, 9])
    assert cache.nbytes() == cache.predicted_nbytes()


def test_a_full_budget_gives_the_stock_logits():
    model, ids = pico.attached("llama"), pico.prompt()
    plan = calibrate(budget="100%")
    out = pico.feed(model, ids, lowkey.make_cache(model, plan=plan))
    assert torch.allclose(out, pico.feed(pico.stock("llama"), ids), atol=5e-5)


def test_an_error_budget_bounds_every_layer():
    plan = calibrate(error_budget=0.05, allocator="pareto")
    ranks = plan.profile["ranks"]
    for surface, (k, v) in zip(plan.profile["surface"], plan.profile["chosen"], strict=True):
        assert surface[ranks.index(k)][ranks.index(v)] <= 0.05


def test_ranks_are_multiples_of_the_rank_multiple():
    assert all(r % 8 == 0 for pair in calibrate(rank_multiple=8, budget="60%").ranks.values() for r in pair)


@pytest.mark.parametrize(
    ("d", "multiple", "expected"),
    [(16, 1, [2, 4, 6, 8, 10, 12, 14, 16]), (16, 8, [8, 16]), (16, 5, [5, 10, 15, 16]), (4, 1, [1, 2, 3, 4])],
)
def test_candidate_ranks(d, multiple, expected):
    assert grid(8, multiples(d, multiple)) == expected


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_candidates_are_few_and_end_at_the_head_dim(d):
    found = grid(8, multiples(d, 1))
    assert len(found) in (8, 9) and found[-1] == d


@pytest.mark.parametrize("multiple", [0, -1, 17])
def test_an_impossible_rank_multiple_is_refused(multiple):
    with pytest.raises(LowkeyError, match="rank multiple"):
        calibrate(rank_multiple=multiple)


class Scaled(PCA):
    """Ends with maps that are each other's transposes and not orthonormal."""

    has_finish: ClassVar[bool] = True

    def finish(self, factors, context):
        return {i: replace(f, k_down=2 * f.k_down, k_up=2 * f.k_up) for i, f in factors.items()}


def test_a_plan_that_is_not_orthonormal_is_loaded_as_it_was(tmp_path):
    plan = calibrate(method=Scaled())
    plan.save(tmp_path)
    again = Plan.load(tmp_path, pico.attached("llama"))
    assert not again.orthonormal and torch.equal(again.factors[0].k_up, plan.factors[0].k_up)


def test_a_seed_gives_the_same_plan():
    """StiefAttention's grid begins at half the head dim, which with a window of exact tokens is more than
    half the bytes.
    """
    one, other = (calibrate(method=StiefAttention("free", epochs=1), budget="60%") for _ in range(2))
    assert same(one, other)


def test_another_seed_is_another_sample():
    a, b = calibrate(), calibrate(sample=Sample(8, 24, 1, 4))
    assert a.provenance["data_sha256"] != b.provenance["data_sha256"]


def test_every_layer_is_fitted_with_the_seed_of_the_sample(monkeypatch):
    told, fit = [], PCA.fit
    monkeypatch.setattr(
        PCA,
        "fit",
        lambda self, statistics, probe, ranks, seed: (
            told.append(seed) or fit(self, statistics, probe, ranks, seed)
        ),
    )
    calibrate(sample=Sample(8, 24, seed=5))
    assert told == [5] * pico.LAYERS


def test_an_unattached_model_is_attached():
    model = pico.build("llama")
    calibrate(model)
    assert attention_interface.attached(model)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "banana"},
        {"budget": "512 tokens"},
        {"budget": "1%"},
        {"budget": "50%", "error_budget": 0.1},
        {"error_budget": 0.0},
        {"error_budget": 1.5},
        {"error_budget": float("nan")},
        {"allocator": "best"},
        {"sample": Sample(8, 2000)},
        {"sample": {"length": 1}},
        {"sample": {"length": 0}},
        {"sample": {"windows": 0}},
        {"sinks": -1},
        {"recent": -1},
        {"layout": "rope"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_one_line(options):
    with pytest.raises(LowkeyError) as refusal:
        if isinstance(given := options.get("sample"), dict):
            options = {"sample": Sample(**given)}
        calibrate(**options)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_quarter_of_the_windows_only_judges(monkeypatch):
    """Neither the statistics nor the fitting windows contain them."""
    told, fit = [], PCA.fit
    monkeypatch.setattr(
        PCA,
        "fit",
        lambda self, statistics, probe, *rest: (
            told.append((statistics, probe)) or fit(self, statistics, probe, *rest)
        ),
    )
    calibrate()
    for statistics, probe in told:
        assert statistics.tokens == 6 * 24 and (probe.training_count, probe.held_out) == (6, 2)


# -- resuming


class StoppedError(Exception):
    pass


def stop_after(layers):
    """A progress that gives up after so many fitted layers."""

    def progress(items, label, total=None):
        for i, item in enumerate(items):
            if label.startswith("fitting") and i == layers:
                raise StoppedError
            yield item

    return progress


@pytest.mark.parametrize(
    "method",
    [PCA(), StiefAttention("free", epochs=1), StiefAttention("mlp", epochs=1)],
    ids=["pca", "free", "mlp"],
)
def test_a_stopped_calibration_resumes_to_the_same_plan(tmp_path, method):
    with pytest.raises(StoppedError):
        calibrate(method=method, work=tmp_path, progress=stop_after(2), rank_multiple=8, budget="60%")
    resumed, straight = (
        calibrate(method=method, work=w, rank_multiple=8, budget="60%") for w in (tmp_path, None)
    )
    assert same(resumed, straight)


def test_a_resumed_calibration_fits_no_layer_twice(tmp_path, monkeypatch):
    with pytest.raises(StoppedError):
        calibrate(work=tmp_path, progress=stop_after(2))
    fitted, fit = [], PCA.fit
    monkeypatch.setattr(PCA, "fit", lambda *a: fitted.append(1) or fit(*a))
    calibrate(work=tmp_path)
    assert len(fitted) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"method": EigenAttention()},
        {"layout": "pre_rope"},
        {"rank_multiple": 4},
        {"sample": Sample(8, 24, 1, 4)},
    ],
    ids=str,
)
def test_a_work_folder_of_another_job_is_not_reused(tmp_path, other):
    calibrate(work=tmp_path)
    assert same(calibrate(work=tmp_path, **other), calibrate(**other))


def test_a_work_folder_of_another_model_is_not_reused(tmp_path):
    calibrate(work=tmp_path)
    other = pico.attached("llama-mha")
    assert same(calibrate(other, work=tmp_path), calibrate(other))
