"""`lowkey generate`: what it prints over every kind of cache, and the arguments it refuses."""

from __future__ import annotations

import pico
import pytest
from commands import done, printed, refused

from lowkey.cache.cache import make_cache
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import Plan

# -- bad arguments


@pytest.mark.parametrize(
    "words, says",
    [
        (["--prompt", ""], ["prompt ''", "empty"]),
        (["--prompt", "a", "--tokens", 0], ["tokens 0", "at least 1"]),
        (["--prompt", "a", "--bits", 3], ["bits '3'", "int8"]),
        (["--prompt", "a", "--plan", "missing"], ["missing", "does not exist"]),
        ([], ["--prompt", "--help"]),
    ],
    ids=str,
)
def test_bad_arguments_of_generate(model, here, words, says):
    line = refused("generate", model, *words)
    assert [s for s in says if s not in line] == []


def test_a_policy_together_with_bits_holds_less_than_either(model):
    held = []
    for words in (["--policy", "snapkv", "--budget", "50%"], ["--bits", 8]):
        held.append(words)
    held.append([*held[0], *held[1]])
    told = [
        printed("generate", model, "--prompt", "a" * 90, "--tokens", 2, *words)["bytes_held"]
        for words in held
    ]
    assert told[2] < min(told[:2])


# -- without what a plan has


def test_generate_without_the_plans_policy_or_integers(model, full_plan):
    words = ("generate", model, "--prompt", "Once upon a time" * 8, "--plan", full_plan, "--tokens", 5)
    whole, plain = ("--policy", "none"), ("--bits", "none")
    own, all_tokens, unpacked, neither = (
        printed(*words, *options)["bytes_held"] for options in ((), whole, plain, whole + plain)
    )
    assert own < min(all_tokens, unpacked) and max(all_tokens, unpacked) < neither
    loaded = attach(pico.build("llama", pad_token_id=None))
    cache = make_cache(loaded, Plan.load(full_plan, loaded), "none")
    pico.feed(loaded, pico.prompt(16 * 8 + 5 - 1, batch=1), cache, splits=[16 * 8, 1, 1, 1, 1])
    assert all_tokens == cache.nbytes()


def test_generate_without_a_policy_that_there_is_none_of(model):
    told = [
        printed("generate", model, "--prompt", "It was", "--tokens", 3, *words)
        for words in ([], ["--policy", "none"])
    ]
    assert told[0]["text"] == told[1]["text"] and told[0]["bytes_held"] == told[1]["bytes_held"]
    line = refused("generate", model, "--prompt", "It was", "--policy", "none", "--budget", "25%")
    assert line.endswith("is for a policy; leave it out\n")


# -- the others


def test_generate_prints_what_it_wrote_and_held(model, made):
    told = printed("generate", model, "--prompt", "Once upon a time" * 8, "--plan", made[0], "--tokens", 5)
    assert told["new_tokens"] == 5 and told["tokens_per_s"] > 0
    assert 0 < told["bytes_held"] < told["bytes_full"]


def test_generate_streams_the_same_text(model, made):
    words = ("generate", model, "--prompt", "Once upon a time", "--plan", made[0], "--tokens", 5)
    ran = done(*words)
    assert ran.out.rstrip("\n") == printed(*words)["text"].rstrip("\n")
    assert "tokens/s" in ran.err


def test_generate_over_packed_integers(model):
    """Beside the first 4 tokens and the last 32, which are held whole.

    The fourth step made room for four: they have slots, and what will leave the window is stored already.
    """
    told = printed("generate", model, "--prompt", "Once upon a time" * 8, "--bits", 8, "--tokens", 5)
    tokens, whole = 16 * 8 + 5 - 1, 2 * 4 * pico.HEAD_DIM * 4
    places = 3 * 8 + 4 * 4  # of a row, and of each of its sinks
    assert told["bytes_full"] == pico.LAYERS * tokens * whole
    assert told["bytes_held"] == pico.LAYERS * (
        (tokens - 1 - 32 + 4) * whole * (16 + 8) / 64 + (4 + 32 + 4) * whole + places
    )


@pytest.mark.parametrize("bits", ["int4", "kivi4", "hadamard4"])
def test_generate_over_packed_latents(model, made, bits):
    whole, packed = (
        printed("generate", model, "--prompt", "Once upon a time " * 8, "--plan", made[0], *b)
        for b in ((), ("--bits", bits))
    )
    assert packed["bytes_held"] < whole["bytes_held"]


def test_generate_over_the_full_cache(model):
    told = printed("generate", model, "--prompt", "Once upon a time", "--tokens", 5)
    assert told["bytes_held"] == told["bytes_full"] == pico.LAYERS * 2 * 4 * pico.HEAD_DIM * 4 * (16 + 5 - 1)


@pytest.mark.parametrize("cache", [["--bits", 2], ["--policy", "snapkv", "--budget", "25%"]], ids=str)
def test_verified_text_is_that_of_the_full_cache(model, cache):
    words = ("generate", model, "--prompt", "Once upon a time" * 8, "--tokens", 12)
    plain, told = printed(*words), printed(*words, *cache, "--verify", "full", "--draft", 3)
    assert told["text"] == plain["text"] and told["bytes_held"] < told["bytes_full"]
    assert told["verifications"] * (1 + told["accepted_per_verification"]) == pytest.approx(11)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--verify", "half"], "verify 'half': give full"),
        (["--draft", 2], "draft 2: is of --verify; give --verify full"),
        (["--verify", "full", "--draft", 0], "draft 0"),
    ],
    ids=str,
)
def test_bad_verification_is_refused(model, words, says):
    assert says in refused("generate", model, "--prompt", "a", *words)
