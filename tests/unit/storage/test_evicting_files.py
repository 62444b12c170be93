"""Evicting caches in files, and the input that they refuse."""

from __future__ import annotations

import forging
import pytest
import torch
from evicting_caches import HEADS, PADS, made, policy
from pico import attached, feed, generate, prompt

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES, SnapKV, policy_from_dict, policy_to_dict

# -- make_cache and files


@pytest.mark.parametrize(
    "make",
    [
        lambda: made(SnapKV("25%", "ada", every=4)),
        lambda: made(policy("headkv-r2", "20 tokens", sinks=1, recent=2)),
        lambda: made(policy("pyramidkv", "25%")),
        lambda: made(bits=4),
        lambda: made(),
    ],
)
def test_a_saved_cache_continues_with_identical_logits(tmp_path, make):
    model, cache = attached("llama"), make()
    feed(model, prompt(60), cache, PADS, [57, 1, 1, 1])
    cache.save(tmp_path / "c")
    again = lowkey.load_cache(tmp_path / "c", model)
    assert again.nbytes() == cache.nbytes() and again.get_seq_length() == 60
    more = prompt(12, seed=4)
    expected = feed(model, more, cache, PADS, [1] * 6 + [6])
    assert torch.equal(feed(model, more, again, PADS, [1] * 6 + [6]), expected)


@pytest.fixture
def saved(tmp_path):
    cache = made(SnapKV("25%"))
    feed(attached("llama"), prompt(60), cache)
    cache.save(tmp_path / "c")
    return tmp_path / "c"


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    forging.edit_json(file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda p: (p / "cache.safetensors").write_bytes((p / "cache.safetensors").read_bytes()[:-9]),
            "damaged",
        ),
        (lambda p: (p / "cache.json").write_text("{"), "damaged"),
        (lambda p: edit(p / "cache.json", '"format": 2', '"format": 9'), "newer"),
        (lambda p: edit(p / "cache.json", '"name": "snapkv"', '"name": "nobody"'), "not known"),
        (lambda p: (p / "cache.json").unlink(), "does not exist"),
        (lambda p: edit(p / "cache.json", '"front_start"', '"front"'), "damaged"),
        (lambda p: edit(p / "cache.json", '"format": 2', '"format": 1'), "make it again"),
    ],
)
def test_a_damaged_cache_is_refused(saved, damage, says):
    damage(saved)
    with pytest.raises(LowkeyError, match=says):
        lowkey.load_cache(saved, attached("llama"))


def test_another_models_cache_is_refused(saved):
    with pytest.raises(LowkeyError, match="made for model"):
        lowkey.load_cache(saved, attached("qwen2"))


def test_a_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LowkeyError, match="other files"):
        made(SnapKV("25%")).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_json(name):
    one = policy(name, "12.5%", every=7)
    assert policy_from_dict(policy_to_dict(one)).with_head_scores(HEADS) == one


# -- refusals


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: SnapKV("8 tokens"), "do not hold the 4 sinks and 8 recent"),
        (lambda: SnapKV("120%"), "120%"),
        (lambda: SnapKV("10%", "adda"), "adda"),
        (lambda: SnapKV("10%", sinks=-1), "sinks -1"),
        (lambda: made(make_policy("headkv-r2", "10%", {})), "lowkey heads"),
        (lambda: make_policy("snapvk", "10%", {}), "did you mean 'snapkv'"),
        (lambda: make_policy("snapkv", "10%", {"windw": "3"}), "windw"),
        (lambda: make_policy("headkv-r2", "10%", {"beta": "0.5"}), "beta='0.5'"),
        (lambda: made().kept_positions(0), "keeps every token"),
    ],
)
def test_bad_input_is_one_clear_line(act, says):
    with pytest.raises(LowkeyError, match=says) as refused:
        act()
    assert "\n" not in str(refused.value)


def test_crop_behind_an_eviction_is_refused():
    model = attached("llama")
    cache = made(SnapKV("50%"))
    feed(model, prompt(20), cache)
    with pytest.raises(LowkeyError, match=r"crop\(-2\): tokens were evicted since; at most 0 can be removed"):
        cache.crop(-2)


def test_static_caches_are_refused():
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(attached("llama"), prompt(20), 4, made(SnapKV("50%")), cache_implementation="static")
