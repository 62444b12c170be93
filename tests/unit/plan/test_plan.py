"""Plans are saved and loaded exactly, and written whole or not at all; fingerprints of their models."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pico
import pytest
import torch
from plan_folders import MODEL, make

from lowkey.core import files
from lowkey.core.types import Factors, LowkeyError
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.card import plan_card
from lowkey.plan.plan import Plan
from lowkey.plan.reading import MAPS, PLAN_JSON, PLAN_TENSORS

# -- save and load


@pytest.mark.parametrize("layout", ["post_rope", "pre_rope"])
def test_a_plan_comes_back_as_it_was(tmp_path, layout):
    plan = make(layout=layout, sinks=3, recent=5, profile={"ranks": [8, 16], "surface": [[[0.1, 0.0]]]})
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path, pico.stock(MODEL))
    for name in (
        "layout",
        "method",
        "allocator",
        "budget",
        "provenance",
        "profile",
        "orthonormal",
        "sinks",
        "recent",
    ):
        assert getattr(loaded, name) == getattr(plan, name)
    assert loaded.geometry == json.loads(json.dumps(plan.geometry))


def test_factors_come_back_bit_for_bit(tmp_path):
    plan = make()
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.ranks == plan.ranks == dict.fromkeys((0, 1, 2), (6, 9))
    for i, f in plan.factors.items():
        assert all(torch.equal(getattr(f, n), getattr(loaded.factors[i], n)) for n in MAPS)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_merged_heads_come_back_bit_for_bit(tmp_path, orthonormal):
    """Two heads share a latent of keys, four one of values; grouped in an order of their own, and centred."""
    maps = {i: pico.merged_factors(4, 6, 9, 2, 4, seed=i) for i in (0, 1, 2)}
    if not orthonormal:
        maps = {i: replace(f, k_up=2 * f.k_up, v_down=f.v_down + 1) for i, f in maps.items()}
    plan = make(factors=maps, orthonormal=orthonormal)
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert (
        loaded.ranks == dict.fromkeys((0, 1, 2), (6, 9)) and loaded.bytes_per_token(2) == 3 * 4 * (6 + 9) * 2
    )
    for i, f in maps.items():
        assert all(torch.equal(t, getattr(loaded.factors[i], n)) for n, t in vars(f).items() if t is not None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"order": torch.tensor([0, 1, 1, 3])}, "order"),
        ({"k_mean": torch.zeros(4, 15)}, "means"),
        ({"v_mean": torch.full((4, 16), torch.nan)}, "NaN"),
        ({"k_up": torch.zeros(4, 11, 16)}, "shape"),
    ],
)
def test_damaged_merges_are_refused(tmp_path, damage, says):
    make(
        factors={i: replace(pico.merged_factors(4, 6, 9, 2, 4), **damage) for i in (0, 1, 2)},
        orthonormal=False,
    ).save(tmp_path)
    with pytest.raises(LowkeyError, match=says):
        Plan.load(tmp_path)


def test_factors_that_are_not_orthonormal_come_back_bit_for_bit(tmp_path):
    maps = {
        i: Factors(*(2 * x + 1 for x in vars(f).values() if x is not None)) for i, f in make().factors.items()
    }
    make(factors=maps, orthonormal=False).save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert all(torch.equal(getattr(maps[i], n), getattr(loaded.factors[i], n)) for i in maps for n in MAPS)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    make().save(tmp_path / "a")
    Plan.load(tmp_path / "a").save(tmp_path / "b")
    for name in (PLAN_JSON, PLAN_TENSORS, "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_loaded_plan_gives_the_logits_of_the_made_one(folder):
    model, ids = pico.attached(MODEL), pico.prompt()
    import lowkey

    a, b = (
        pico.feed(model, ids, lowkey.make_cache(model, plan=p)) for p in (make(), Plan.load(folder, model))
    )
    assert torch.equal(a, b)


def test_bytes_per_token_by_hand():
    assert make(6, 9).bytes_per_token(2) == 3 * 4 * (6 + 9) * 2  # 3 layers, 4 heads, bf16


def test_the_card_says_the_numbers():
    text = plan_card(make(8, 8))
    assert "384 of 768 bytes per token" in text and "(50.0 %)" in text and "| 2 | 8 | 8 |" in text


def test_nothing_but_its_files_is_left_behind(folder):
    assert sorted(p.name for p in folder.iterdir()) == [files.MANIFEST, "README.md", PLAN_JSON, PLAN_TENSORS]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# -- atomic


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_write_leaves_every_file_whole(folder, monkeypatch, at):
    """`os.replace` fails the at-th time; each file is the old or the new one, and no temporary is left."""
    new = folder.parent / "new"
    make(4, 4).save(new)
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    fail_at(monkeypatch, at)
    with pytest.raises(LowkeyError, match="no space"):
        make(4, 4).save(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(old)
    assert all(p.read_bytes() in (old[p.name], (new / p.name).read_bytes()) for p in folder.iterdir())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_save_leaves_the_old_plan(folder, monkeypatch, at):
    """Not half of each: after the failure the folder still loads, as the old plan."""
    fail_at(monkeypatch, at)
    with pytest.raises(LowkeyError):
        make(4, 4).save(folder)
    assert Plan.load(folder).ranks == make().ranks


def test_two_plans_of_the_same_ranks_are_never_mixed(folder, monkeypatch):
    """New factors under the old plan.json would pass every check of shapes: they are the wrong factors all
    the same.
    """
    turned = {i: pico.factors(4, 6, 9, seed=i + 9) for i in range(3)}
    fail_at(monkeypatch, 3)
    with pytest.raises(LowkeyError):
        make(factors=turned).save(folder)
    try:
        loaded = Plan.load(folder)
    except LowkeyError:
        return
    assert torch.equal(loaded.factors[0].k_down, make().factors[0].k_down)


def fail_at(monkeypatch, at):
    real, count = os.replace, []

    def replace_or_fail(source, target):
        count.append(target)
        if len(count) == at:
            raise OSError(28, "no space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)


def test_a_failure_while_tensors_are_written_leaves_the_old_file(folder, monkeypatch):
    before = (folder / PLAN_TENSORS).read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(LowkeyError, match="no space"):
        make(4, 4).save(folder)
    assert (folder / PLAN_TENSORS).read_bytes() == before
    assert len(list(folder.iterdir())) == 4


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LowkeyError) as refusal:
        make().save(tmp_path / "file")
    assert "\n" not in str(refusal.value)


# -- fingerprints


def test_the_fingerprint_is_the_same_for_the_same_weights():
    assert model_fingerprint(pico.build(MODEL)) == model_fingerprint(pico.attached(MODEL))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_change_in_any_weight_changes_the_fingerprint(name):
    model = pico.build(MODEL)
    before = model_fingerprint(model)
    model.state_dict()[name].mul_(1.1)
    assert model_fingerprint(model) != before
