"""Files of head scores come back as they were saved, or are refused in one line."""

from __future__ import annotations

import json

import forging
import pico
import pytest
import torch
from head_recording import random_scores, refused, scores, small
from pico import attached

from lowkey.heads.scores import HeadScores


def test_what_is_loaded_is_what_was_saved(tmp_path):
    found = random_scores(12, kind="copy", task="recall", drawn=40, seed=7, settings={"lengths": [1, 2]})
    found.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert torch.equal(again.values, found.values) and again.values.dtype == torch.float64
    assert again.describe() == found.describe()
    assert (again.kind, again.task, again.accepted, again.drawn, again.seed) == ("copy", "recall", 12, 40, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]


def test_a_file_holds_six_digits(tmp_path):
    scores([[[1 / 3, 2 / 3e9], [0.0, 1.0]]]).save(tmp_path / "heads.json")
    assert json.loads((tmp_path / "heads.json").read_text())["values"] == [
        [[0.333333, 6.66667e-10], [0.0, 1.0]]
    ]
    random_scores(100, 32, 32, 8).save(tmp_path / "heads.json")
    assert (tmp_path / "heads.json").stat().st_size < 100 * 32 * 32 * 13


def test_a_file_tells_how_it_was_made(tmp_path):
    found = random_scores(12, drawn=30)
    found.save(tmp_path / "heads.json")
    meta = json.loads((tmp_path / "heads.json").read_text())
    assert meta["format"] == 1 and meta["accepted"] == 12 and meta["drawn"] == 30 and meta["zero_heads"] == 0
    assert meta["split_half"] == pytest.approx(found.split_half(), abs=1e-4) and len(meta["top"]) == 5


DAMAGE = {
    "newer": ({"format": 2}, "format 2 is newer than 1"),
    "no format": ({"format": "1"}, "format '1', which is not a number"),
    "no kind": ({"kind": None}, "field 'kind' is missing or not of type str"),
    "heads as text": ({"kv_heads": "4"}, "field 'kv_heads' is missing or not of type int"),
    "layers as text": ({"layers": ["a", "b", "c"]}, "field 'layers' holds something other than indices"),
    "other layers": ({"layers": [0, 1]}, "do not fit 2 layers with 4 KV heads"),
    "other heads": ({"kv_heads": 3}, "do not fit 3 layers with 3 KV heads"),
    "no heads": ({"kv_heads": 0}, "do not fit 3 layers with 0 KV heads"),
    "no values": ({"values": None}, "field 'values' is not a table of numbers"),
    "ragged": ({"values": [[[0.1, 0.2]], [[0.1]]]}, "field 'values' is not a table of numbers"),
    "words": ({"values": [[["a"]]]}, "field 'values' is not a table of numbers"),
    "huge": ({"values": [[[10**400]]]}, "a whole number of 401 digits"),
    "flat": ({"values": [0.1, 0.2]}, r"\(2,\) must be \(cases, layers, query heads\)"),
    "empty": ({"values": []}, "must be .cases, layers, query heads., none of them 0"),
    "nan": ({"values": [[[float("nan")] * 8] * 3]}, "NaN is no number of JSON"),
    "infinite": ({"values": [[[float("inf")] * 8] * 3]}, "Infinity is no number of JSON"),
    "negative": ({"values": [[[-0.1] * 8] * 3]}, "must lie between 0 and 1"),
    "too large": ({"values": [[[1.1] * 8] * 3]}, "must lie between 0 and 1"),
    "zeros": ({"values": [[[0.0] * 8] * 3]}, "are all 0"),
    "more than drawn": ({"drawn": 3}, "are of more cases than the 3 drawn"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    change, match = DAMAGE[name]
    place = tmp_path / "heads.json"
    random_scores(12).save(place)
    forging.edit_json(place, **change)
    refused(lambda: HeadScores.load(place), str(place), match)


@pytest.mark.parametrize(
    "content", ["", "hello", "[1, 2]", None, "\0\1"], ids=["empty", "text", "list", "truncated", "binary"]
)
def test_what_is_no_object_is_refused(content, tmp_path):
    place = tmp_path / "heads.json"
    random_scores(12).save(place)
    place.write_text(place.read_text()[:500] if content is None else content)
    refused(lambda: HeadScores.load(place), str(place), "damaged or not one of ours")


def test_a_missing_file_is_refused(tmp_path):
    refused(
        lambda: HeadScores.load(tmp_path / "none.json"),
        "none.json",
        "run `lowkey heads MODEL --kind r2 --out .*none.json`",
    )
    refused(lambda: HeadScores.load(tmp_path), str(tmp_path), "no such file")


def test_another_models_scores_are_refused(tmp_path, accepting):
    found = small(attached("llama"))
    found.save(tmp_path / "heads.json")
    assert torch.equal(HeadScores.load(tmp_path / "heads.json", attached("llama")).values, found.values)
    refused(
        lambda: HeadScores.load(tmp_path / "heads.json", pico.build("llama", initializer_range=0.1)),
        "this one is",
        "run `lowkey heads .*--kind r2` and pass its file",
    )


@pytest.mark.parametrize("change", [{"layers": [0, 2, 1]}, {"kv_heads": 2}])
def test_scores_that_do_not_cover_the_model_are_refused(change, tmp_path, accepting):
    small(attached("llama")).save(tmp_path / "heads.json")
    forging.edit_json(tmp_path / "heads.json", **change)
    refused(
        lambda: HeadScores.load(tmp_path / "heads.json", attached("llama")),
        "do not cover the layers and heads",
    )
