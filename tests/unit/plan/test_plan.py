"""Plans: exact on the way out and in, and a one-line refusal for everything that is not one."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace

import forging
import pico
import pytest
import torch
from safetensors.torch import load_file

import lowkey
from lowkey.core import files
from lowkey.core.types import Budget, Factors, LowkeyError
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import MAPS, PLAN_FORMAT, PLAN_JSON, PLAN_TENSORS, Plan, plan_card

MODEL = "llama"


def make(rank_k=6, rank_v=9, model=None, **fields) -> Plan:
    return pico.plan(model or pico.stock(MODEL), rank_k, rank_v, **fields)


@pytest.fixture
def folder(tmp_path):
    """A saved plan."""
    make().save(tmp_path / "plan")
    return tmp_path / "plan"


def edit(folder, **changes):
    """Change top-level fields of plan.json, and vouch for it: what is tested is the content, not the
    checksum.
    """
    forging.edit_json(folder / PLAN_JSON, **changes)


def edit_tensor(folder, name, tensor):
    forging.edit_tensors(
        folder / PLAN_TENSORS, lambda tensors: tensors.update({name: tensor}), folder / PLAN_JSON
    )


def write(folder, tensors):
    forging.edit_tensors(
        folder / PLAN_TENSORS, lambda old: [old.clear(), old.update(tensors)], folder / PLAN_JSON
    )


def refused(path, model=None, match=None):
    """Loading gives a LowkeyError of exactly one line."""
    with pytest.raises(LowkeyError, match=match) as refusal:
        Plan.load(path, model)
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


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
    """`os.replace` fails the at-th time; each file is the old one or the new one, and no temporary is left."""
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


# -- refusals


def test_another_model_is_refused(folder):
    other = pico.build(MODEL)
    other.get_output_embeddings().weight.data.mul_(1.5)
    refused(folder, other, "made for model")


def test_make_cache_refuses_another_models_plan():
    import lowkey

    model = pico.attached("qwen3")
    with pytest.raises(LowkeyError, match="made for model"):
        lowkey.make_cache(model, plan=make())


def test_bf16_weights_are_the_same_model(folder):
    Plan.load(folder, pico.build(MODEL).bfloat16())


def test_a_newer_format_is_refused(folder):
    edit(folder, format=PLAN_FORMAT + 1)
    refused(folder, match="newer")


@pytest.mark.parametrize("value", [0, -1, "1", None, 1.5, []])
def test_a_format_that_is_no_number_is_refused(folder, value):
    edit(folder, format=value)
    refused(folder, match="format")


@pytest.mark.parametrize("name", [PLAN_JSON, PLAN_TENSORS])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, match="does not exist")


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", match="does not exist")


@pytest.mark.parametrize("path", ["a\nb", "\0", "x" * 5000], ids=["newline", "nul", "long"])
def test_an_impossible_path_is_refused(path):
    refused(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 0.5, 0.99])
def test_truncated_tensors_are_refused(folder, keep):
    data = (folder / PLAN_TENSORS).read_bytes()
    (folder / PLAN_TENSORS).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(folder)


@pytest.mark.parametrize("size", [2**63, 2**24 + 1, 10**6])
def test_a_huge_header_is_refused(folder, size):
    data = (folder / PLAN_TENSORS).read_bytes()
    (folder / PLAN_TENSORS).write_bytes(struct.pack("<Q", size) + data[8:])
    refused(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "NaN", '{"format": 1}', "\ufeff{}", "[" * 100_000, '{"a":' * 100_000],
    ids=range(10),
)
def test_corrupt_json_is_refused(folder, text):
    (folder / PLAN_JSON).write_text(text, encoding="utf-8")
    refused(folder)


def test_json_that_is_not_utf8_is_refused(folder):
    (folder / PLAN_JSON).write_bytes(b'{"format": "\xff\xfe"}')
    refused(folder)


def test_huge_json_is_refused(folder):
    with (folder / PLAN_JSON).open("wb") as file:
        file.truncate(2**26 + 1)
    refused(folder, match="64 MiB")


FIELDS = [
    "layout",
    "method",
    "allocator",
    "budget",
    "geometry",
    "provenance",
    "profile",
    "orthonormal",
    "sinks",
    "recent",
    "ranks",
]


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(folder, name):
    forging.edit_json(folder / PLAN_JSON, lambda meta: meta.pop(name))
    refused(folder, match=name)


@pytest.mark.parametrize("value", [None, 7, "x", [1]], ids=str)
@pytest.mark.parametrize("name", ["layout", "geometry", "provenance", "ranks", "sinks", "method"])
def test_a_field_of_another_type_is_refused(folder, name, value):
    if (name, value) == ("sinks", 7):
        pytest.skip("seven sinks are fine")
    edit(folder, **{name: value})
    refused(folder, pico.stock(MODEL))


@pytest.mark.parametrize("layout", ["rope", "", "POST_ROPE", None, ["post_rope"]], ids=str)
def test_a_bad_layout_is_refused(folder, layout):
    edit(folder, layout=layout)
    refused(folder, match="layout")


@pytest.mark.parametrize(
    "ranks",
    [
        {"../../x": [6, 9]},
        {"0": [6]},
        {"0": 6},
        {"0": ["a", 9]},
        {"0": [math.inf, 9]},
        {"-1": [6, 9]},
        {"7": [6, 9]},
    ],
    ids=str,
)
def test_bad_ranks_are_refused(folder, ranks):
    edit(folder, ranks=ranks)
    refused(folder)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"kv_heads": math.inf, "head_dim": 16},
        {"kv_heads": "x", "head_dim": 16},
        {"kv_heads": 3, "head_dim": 16},
    ],
    ids=str,
)
def test_bad_geometry_is_refused(folder, geometry):
    edit(folder, geometry=geometry)
    refused(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(folder, value):
    bad = load_file(folder / PLAN_TENSORS)["1.v_down"]
    bad[0, 0, 0] = value
    edit_tensor(folder, "1.v_down", bad)
    refused(folder, match="NaN")


def test_infinities_that_cancel_are_refused(folder):
    bad = load_file(folder / PLAN_TENSORS)["1.v_down"]
    bad[0, 0, 0], bad[0, 1, 0] = math.inf, -math.inf
    edit_tensor(folder, "1.v_down", bad)
    refused(folder, match="NaN")


def test_factors_that_are_not_orthonormal_are_refused(folder):
    edit_tensor(folder, "1.k_down", load_file(folder / PLAN_TENSORS)["1.k_down"] * 1.01)
    refused(folder, match="orthonormal")


@pytest.mark.parametrize(
    "shape",
    [(4, 16, 5), (4, 15, 6), (3, 16, 6), (16, 6), (6,), (4, 16, 0), (0, 16, 6), (1, 4, 16, 6), ()],
    ids=str,
)
def test_wrong_shapes_are_refused(folder, shape):
    edit_tensor(folder, "1.k_down", torch.zeros(shape))
    refused(folder, match="shape")


@pytest.mark.parametrize("rank", [0, 17, -3])
def test_impossible_ranks_are_refused(folder, rank):
    """JSON and tensors agree with each other, but no basis of 16 dimensions has this rank."""
    meta = json.loads((folder / PLAN_JSON).read_text())
    edit(folder, ranks=meta["ranks"] | {"1": [rank, 9]})
    edit_tensor(folder, "1.k_down", torch.zeros(4, 16, max(0, rank)))
    refused(folder)


def test_tensors_of_integers_are_refused(folder):
    """A permutation of whole numbers is orthonormal, but no plan of ours is made of integers."""
    edit_tensor(folder, "1.k_down", torch.eye(16)[:, :6].expand(4, -1, -1).long().contiguous())
    refused(folder)


def test_tensors_that_are_missing_are_refused(folder):
    tensors = load_file(folder / PLAN_TENSORS)
    del tensors["2.v_down"]
    write(folder, tensors)
    refused(folder, match="2.v_down")


def test_a_plan_without_up_maps_that_needs_them_is_refused(folder):
    edit(folder, orthonormal=False)
    refused(folder, match="k_up")


def test_missing_layers_are_refused(folder):
    meta = json.loads((folder / PLAN_JSON).read_text())
    edit(folder, ranks={i: r for i, r in meta["ranks"].items() if i != "1"})
    refused(folder, pico.stock(MODEL), "layers")


def test_a_plan_of_other_heads_is_refused(folder):
    """Consistent in itself, with the right fingerprint, and still not this model's shape."""
    shape = json.loads((folder / PLAN_JSON).read_text())["geometry"]
    edit(folder, geometry=shape | {"kv_heads": 2})
    write(folder, {n: t[:2].contiguous() for n, t in load_file(folder / PLAN_TENSORS).items()})
    refused(folder, pico.stock(MODEL))


def test_a_plan_of_another_head_dim_is_refused(folder):
    shape = json.loads((folder / PLAN_JSON).read_text())["geometry"]
    edit(folder, geometry=shape | {"head_dim": 12})
    write(
        folder,
        {
            n: torch.eye(12)[:, : t.shape[2]].expand(4, -1, -1).contiguous()
            for n, t in load_file(folder / PLAN_TENSORS).items()
        },
    )
    refused(folder, pico.stock(MODEL))


def test_a_plan_for_layers_that_slide_is_refused(tmp_path):
    model = pico.stock("gemma2")
    plan = make(model=model)
    replace(plan, factors={i: pico.factors(4, 6, 9) for i in range(3)}).save(tmp_path)
    refused(tmp_path, model, "layers")


def test_make_cache_refuses_a_plan_that_lacks_layers():
    """A Plan need not come from a file."""
    import lowkey

    with pytest.raises(LowkeyError):
        lowkey.make_cache(pico.attached(MODEL), plan=make(factors={0: pico.factors(4, 6, 9)}))


# -- fingerprints


def test_the_fingerprint_is_the_same_for_the_same_weights():
    assert model_fingerprint(pico.build(MODEL)) == model_fingerprint(pico.attached(MODEL))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_change_in_any_weight_changes_the_fingerprint(name):
    model = pico.build(MODEL)
    before = model_fingerprint(model)
    model.state_dict()[name].mul_(1.1)
    assert model_fingerprint(model) != before


# -- budgets


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("50%", 50, "%"),
        (" 12.5 % ", 12.5, "%"),
        ("100%", 100, "%"),
        ("64 KiB/token", 65536, "bytes/token"),
        ("100 B/token", 100, "bytes/token"),
        ("512 tokens", 512, "tokens"),
        ("1 token", 1, "tokens"),
        ("1.5 GiB", 1.5 * 2**30, "bytes"),
        ("2MiB", 2**21, "bytes"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        "150%",
        "0%",
        "-5%",
        "100.01%",
        "banana",
        "",
        "50",
        0.5,
        50,
        "0.5",
        "50%%",
        "5 kB",
        "1 KB",
        "nan%",
        "inf%",
        "1e3 B",
        "50 %/token",
    ],
    ids=str,
)
def test_other_budgets_are_refused(text):
    with pytest.raises(LowkeyError) as refusal:
        Budget.parse(text)
    assert str(text) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["0 tokens", "0 B/token", "0 GiB", "0.0%"])
def test_a_budget_of_nothing_is_refused(text):
    with pytest.raises(LowkeyError):
        Budget.parse(text)


@pytest.mark.parametrize(
    "text", ["50%", "12.5%", "512 tokens", "64 KiB/token", "100 B/token", "1.5 GiB", "3 MiB/token"]
)
def test_a_budget_is_written_as_it_can_be_read(text):
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_shares_and_bytes_per_token():
    assert Budget.parse("25%").bytes_per_token(400) == 100
    assert Budget.parse("1 KiB/token").bytes_per_token(400) == 1024


@pytest.mark.parametrize("text", ["512 tokens", "1 GiB"])
def test_ranks_cannot_be_bought_with_tokens_or_bytes(text):
    with pytest.raises(LowkeyError, match="token"):
        Budget.parse(text).bytes_per_token(400)


def test_policies_refuse_merged_heads():
    model = pico.attached(MODEL)
    plan = make(model=model, factors={i: pico.merged_factors(4, 6, 9, 2, 4) for i in (0, 1, 2)})
    with pytest.raises(LowkeyError, match="merges heads"):
        lowkey.make_cache(model, plan, lowkey.policies.SnapKV("50%"))
