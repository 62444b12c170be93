"""Whatever is not a valid plan is refused in one line."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace

import forging
import pico
import pytest
import torch
from plan_folders import MODEL, make
from safetensors.torch import load_file

from lowkey.core.types import LowkeyError
from lowkey.plan.plan import Plan
from lowkey.plan.reading import PLAN_FORMAT, PLAN_JSON, PLAN_TENSORS


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


@pytest.mark.parametrize("name", ["k_mean", "v_mean", "frequencies"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.int64, 7), (torch.float16, 0.0), (torch.float64, 1e300), (torch.complex64, complex(math.nan, 1))],
    ids=str,
)
def test_means_and_frequencies_are_in_float32(tmp_path, name, dtype, value):
    size = (3,) if name == "frequencies" else (4, 16)
    maps = {i: replace(pico.factors(4, 6, 9), **{name: torch.ones(size)}) for i in range(3)}
    make(factors=maps).save(tmp_path)
    Plan.load(tmp_path, pico.stock(MODEL))
    edit_tensor(tmp_path, f"1.{name}", torch.full(size, value, dtype=dtype))
    refused(tmp_path)


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
