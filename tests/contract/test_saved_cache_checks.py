"""Every rule that a saved cache must keep is broken once, with checksums that fit."""

from __future__ import annotations

import shutil

import forging
import pytest
import torch
from cache_kinds import KINDS, feed
from pico import attached, prompt

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.storage.exact import Exact

MADE = {name: KINDS[name] for name in ("snapkv", "razor", "h2o", "every", "every-matching", "stock")} | {
    "think": lambda m: lowkey.make_cache(
        m, policy=make_policy("think", "40%", {"recent": "4", "looked": "8"})
    ),
    "kivi": lambda m: lowkey.make_cache(m, bits="kivi4", exact=Exact(4, 8)),
}
SIZES = (48, 12, 1)  # two prompts, which prune twice, and a step


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One saved cache of each kind."""
    folder, model = tmp_path_factory.mktemp("caches"), attached("llama")
    for name, make in MADE.items():
        cache = make(model)
        for i, size in enumerate(SIZES):
            feed(model, cache, prompt(size, batch=1, seed=i))
        cache.save(folder / name)
    return folder


def put(name, place, value):
    def change(tensors):
        tensors[f"1.{name}"][place] = value

    return change


def narrowed(name, dim=-1):
    def change(tensors):
        t = tensors[f"1.{name}"]
        tensors[f"1.{name}"] = t.narrow(dim, 0, t.shape[dim] - 1).contiguous()

    return change


def replaced(name, t):
    def change(tensors):
        tensors[f"1.{name}"] = t

    return change


def flipped(name, dim=-1):
    def change(tensors):
        tensors[f"1.{name}"] = tensors[f"1.{name}"].flip(dim).contiguous()

    return change


def repeated(name):
    """The second of the first row is where the first is."""

    def change(tensors):
        tensors[f"1.{name}"][1] = tensors[f"1.{name}"][0]

    return change


def cast(name, dtype):
    def change(tensors):
        tensors[f"1.{name}"] = tensors[f"1.{name}"].to(dtype)

    return change


def added(name):
    def change(tensors):
        tensors[name] = torch.zeros(1)

    return change


def emptied(layer):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            del tensors[name]

    return change


def counted(name, more):
    """more: on top of the count, or None for a name that is none."""

    def change(about):
        counts = about["layers"][1]
        counts[name] = 0 if more is None else counts[name] + more

    return change


SEEN = sum(SIZES)
BROKEN = [
    ("snapkv", put("rows_keys", (0, 0), torch.nan), "NaN or infinite"),
    ("snapkv", put("values", (0, 0, 0, 0), torch.inf), "NaN or infinite"),
    ("snapkv", put("offset", (0, 0), SEEN + 1), "offset puts tokens where no positions are"),
    ("snapkv", put("offset", (0, 0), SEEN - 2**31), "offset puts tokens where no positions are"),
    ("snapkv", put("first", (0, 0), SEEN + 1), "first is not among the tokens seen"),
    ("snapkv", put("first", (0, 0), -1), "first is not among the tokens seen"),
    ("snapkv", put("rows_starts", 0, 1), "rows do not begin"),
    ("snapkv", put("rows_starts", 1, 2**40), "rows do not begin"),
    ("snapkv", put("rows_starts", -1, 3), "rows do not begin"),
    ("snapkv", put("rows_positions", 0, -1), "positions are not among"),
    (
        "snapkv",
        put("rows_positions", 3, SEEN - 1),
        "positions are not among",
    ),  # that one is among the dense ones
    ("snapkv", repeated("rows_positions"), "positions of a row do not rise"),
    ("snapkv", flipped("rows_positions"), "positions of a row do not rise"),
    ("snapkv", narrowed("keys"), "keys is of shape"),
    ("snapkv", narrowed("values", 1), "values is of shape"),
    ("snapkv", narrowed("rows_keys", 0), "rows_keys is of shape"),
    ("snapkv", narrowed("rows_values", 2), "rows_values is of shape"),
    ("snapkv", narrowed("rows_positions"), "rows_positions is of shape"),
    ("snapkv", narrowed("rows_starts"), "rows_starts is of shape"),
    ("h2o", narrowed("rows_scores"), "rows_scores is of shape"),
    ("h2o", narrowed("dense_scores", 1), "dense_scores is of shape"),
    ("every", narrowed("asked"), "asked is of shape"),
    ("every", narrowed("asked", 2), "asked is of shape"),  # another number of query heads
    ("razor", put("dropped", (0, 0, 0), -1), "less than nothing dropped"),
    ("razor", narrowed("mean_k"), "mean_k is of shape"),
    ("razor", narrowed("mean_v", 1), "mean_v is of shape"),
    ("every-matching", narrowed("rows_keys"), "rows_keys is of shape"),  # without the channel of biases
    ("every-matching", put("rows_keys", (0, 0, -1), torch.inf), "NaN or infinite"),
    ("every-matching", replaced("reference_real", torch.ones(3).bool()), "it asks by no queries"),
    (
        "every-matching",
        replaced("reference_queries", torch.ones(1, 4, 2, 3, 9)),
        "reference_queries is of shape",
    ),
    ("every-matching", replaced("reference_queries", torch.ones(1, 4, 2, 3, 16)), "reference_real is of"),
    ("think", flipped("channels"), "channels are not those of a key, ascending"),
    ("think", put("channels", (0, 0, 0, -1), 16), "channels are not those of a key, ascending"),
    ("think", put("channels", (0, 0, 0, 0), -1), "channels are not those of a key, ascending"),
    ("think", put("channels", (0, 0, 0, 1), 0), "channels are not those of a key, ascending"),
    ("think", flipped("until"), "a pruning went less far than the one before"),
    ("think", put("until", slice(None), 1), "tokens lost channels that no pruning took"),
    ("think", repeated("thin_where"), "positions of a row do not rise"),
    ("think", put("thin_starts", 1, 2**40), "rows do not begin"),
    ("think", narrowed("thin_k"), "thin_k is of shape"),
    ("think", narrowed("thin_v"), "thin_v is of shape"),
    ("think", narrowed("sure"), "sure is of shape"),
    ("kivi", put("sink_at", (0, 0), SEEN), "sink_at is not among"),
    ("kivi", put("sink_at", (0, 0), -1), "sink_at is not among"),
    ("kivi", narrowed("sink_k", 2), "sink_k is of shape"),
    ("kivi", narrowed("recent_v", 2), "recent_v is of shape"),
    ("kivi", narrowed("keys_codes"), "keys_codes is of shape"),
    ("kivi", narrowed("keys_scale"), "keys_scale is of shape"),
    ("kivi", narrowed("values_low", 1), "values_low is of shape"),
    ("stock", narrowed("keys", 1), "keys is of shape"),
    ("stock", narrowed("values", 2), "values is of shape"),
    ("snapkv", counted("seen", 1), "keys is of shape"),
    ("snapkv", counted("front_start", 99), "it counts more than"),
    ("snapkv", counted("front_start", -1), "keys is of shape"),
    ("snapkv", counted("steps", 99), "it counts more than"),
    ("snapkv", counted("kept", 1), "rows_positions is of shape"),
    ("think", counted("prunings", 1), "channels is of shape"),
    ("think", counted("thin", 1), "thin_k is of shape"),
    ("snapkv", counted("kept", -(2**20)), "counters of its layers are missing or no counts"),
    ("snapkv", counted("kept", 2**31), "counters of its layers are missing or no counts"),
    ("snapkv", counted("kept", 0.0), "counters of its layers are missing or no counts"),
    ("snapkv", counted("frozen", 2), "counters of its layers are missing or no counts"),
    ("snapkv", counted("new", None), "counters of its layers are missing or no counts"),
    ("snapkv", cast("rows_positions", torch.float32), "rows_positions is of torch.float32"),
    ("snapkv", cast("keys", torch.int32), "keys is of torch.int32"),
    ("snapkv", added("3.keys"), "which is of no layer"),
    ("snapkv", added("01.keys"), "which is of no layer"),
    ("snapkv", added("1.thin_k"), "layer 1 holds other things"),
    ("snapkv", emptied(1), "some of its layers hold something and others nothing"),
]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    BROKEN,
    ids=[f"{i}-{kind}-{says[:25]}" for i, (kind, _, says) in enumerate(BROKEN)],
)
def test_a_cache_that_breaks_a_rule_is_refused(kept, tmp_path, kind, change, says):
    folder = shutil.copytree(kept / kind, tmp_path / kind)
    if change.__qualname__.startswith("counted"):
        forging.edit_json(folder / "cache.json", change)
    else:
        forging.edit_tensors(folder / "cache.safetensors", change, folder / "cache.json")
    with pytest.raises(LowkeyError, match=says):
        lowkey.load_cache(folder, attached("llama"))


@pytest.mark.parametrize("kind", MADE)
def test_a_cache_that_keeps_every_rule_is_loaded(kept, tmp_path, kind):
    folder = shutil.copytree(kept / kind, tmp_path / kind)
    forging.edit_tensors(folder / "cache.safetensors", lambda tensors: None, folder / "cache.json")
    assert lowkey.load_cache(folder, attached("llama")).get_seq_length() == SEEN
