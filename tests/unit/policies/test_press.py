"""Presses as policies keep what the same press keeps in hooks of a stock model, and free the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pico
import presses
import pytest
import torch
from commands import printed, refused
from policy_contexts import build, evicted, piece
from presses import FuturePress, PlainKeysPress, SharePress, WindowPress, cache_of_press, kept_by_policy
from reach import held
from score_definitions import attention, each
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import ATTENTION_NAME, attach
from lowkey.policies import policy_name, policy_to_dict
from lowkey.policies.press import press_policy

TESTS = Path(presses.__file__).parent
IDS = 1 + torch.randperm(pico.VOCAB - 1, generator=torch.Generator().manual_seed(3))[:60].unsqueeze(
    0
)  # no token twice, so no ties
PRESSES = {
    "window": (WindowPress, {"window": 6}),
    "future": (FuturePress, {"coming": 20}),
    "without values": (FuturePress, {"use_values": False}),
    "share": (SharePress, {}),
    "keys before rotation": (PlainKeysPress, {}),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama-mha", "llama-mqa"])
@pytest.mark.parametrize("name", PRESSES)
def test_kept_tokens_are_those_of_the_press_in_hooks(name, family):
    press, options = PRESSES[name]
    told = presses.kept_by_press(pico.build(family), press(0.75, **options), IDS, 15)
    cache = cache_of_press(pico.build(family), press, IDS, "25%", **options)
    assert kept_by_policy(cache) == told


def test_what_is_dropped_is_freed():
    model = pico.build("llama")
    cache = cache_of_press(model, WindowPress, IDS, "15 tokens")
    full = lowkey.make_cache(model)
    with torch.no_grad():
        model(IDS, past_key_values=full)
    assert cache.nbytes() == cache.predicted_nbytes() == held(cache)
    assert full.nbytes() / 4 <= cache.nbytes() < full.nbytes() / 3


def test_any_allocator_splits_what_a_press_keeps():
    cache = cache_of_press(pico.build("llama"), WindowPress, IDS, "20 tokens", allocator="ada")
    lengths = [[len(head) for head in layer] for layer in kept_by_policy(cache)]
    assert [sum(layer) for layer in lengths] == [80, 80, 80]
    assert any(len(set(layer)) > 1 for layer in lengths)


@pytest.mark.parametrize("press", [WindowPress, FuturePress, SharePress, PlainKeysPress])
def test_padding_and_other_sequences_change_no_score(press):
    policy = press_policy(press)("50%")
    alone, padded = build(tokens=(11,)), build(tokens=(11, 7), pad=5)
    torch.testing.assert_close(policy.score(padded)[:1, :, 5:], policy.score(alone), rtol=1e-5, atol=1e-6)


def by_window(context):
    """The definition of `WindowPress`, in loops."""

    def score(i, j):
        weights, _ = attention(context, i, j, 4)
        scores = weights.mean((0, 1))
        newest = context.positions[i, j] > context.query_positions[i].max() - 4
        return scores.masked_fill(newest, 2.0)

    return each(context, score)


@pytest.mark.parametrize("context", [build(tokens=(12,)), build(tokens=(14, 9), pad=3, start=5), evicted()])
def test_scores_follow_the_definition_after_evictions_too(context):
    got = press_policy(WindowPress)("50%").score(context)
    expected = by_window(context)
    best = context.valid & (expected < 2)
    torch.testing.assert_close(got[best].double(), expected[best], rtol=1e-4, atol=1e-6)
    assert bool((got[context.valid & (expected == 2)] >= 1).all())


def test_coming_positions_are_counted_from_the_first_query():
    """What a later chunk's press calls position w is the position behind the newest token."""
    asked = []

    class Asks(presses.ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            next_position = torch.tensor([[hidden_states.shape[1]]])
            asked.append(module.rotary_emb(keys, next_position))
            return keys[..., 0]

    context = build(tokens=(16,))
    press_policy(Asks)("50%").score(piece(context, 10, 16))
    cos, sin = context.rope(torch.tensor([[16]]), context.keys)
    torch.testing.assert_close(asked[0], (cos[0], sin[0]))


def test_chunks_and_steps_evict_by_the_press():
    model = pico.build("llama")
    cache = lowkey.make_cache(attach(model), policy=press_policy(WindowPress)("15 tokens", every=8))
    with torch.no_grad():
        model(IDS[:, :40], past_key_values=cache)
        model(IDS[:, 40:], past_key_values=cache)
        for token in range(16):
            model(IDS[:, token : token + 1], past_key_values=cache)
    assert {len(head) for layer in kept_by_policy(cache) for head in layer} == {15}
    assert all(layer[0][-4:] == [72, 73, 74, 75] for layer in kept_by_policy(cache))
    assert cache.nbytes() == cache.predicted_nbytes() == held(cache)


REFUSED = {
    "OutputPress": "AttributeError: 'types.SimpleNamespace' object has no attribute 'o_proj'",
    "HiddenPress": "AttributeError: '_Hidden' object has no attribute 'norm'",
    "ShapePress": "gave scores of shape (1, 60); a score is a number for each pair, (1, 4, 60)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cache_does_not_have_is_refused_in_a_line(name):
    model = attach(pico.build("llama"))
    cache = lowkey.make_cache(model, policy=press_policy(getattr(presses, name))("25%"))
    with torch.no_grad(), pytest.raises(LowkeyError) as error:
        model(IDS, past_key_values=cache)
    assert name in str(error.value) and REFUSED[name] in str(error.value)
    assert "\n" not in str(error.value) and cache.get_seq_length() == 0


def test_keys_before_rotation_need_a_query_for_each():
    context = evicted()
    with pytest.raises(LowkeyError, match="k_proj"):
        press_policy(PlainKeysPress)("50%").score(context)


UNSUITED = {
    "presses:MaskPress": "has no score",
    "presses:BudgetPress": "its compress does more",
    "presses:ModelPress": "its post_init_from_model reads the model",
    "presses:projected": "is not a suitable class",
}


@pytest.mark.parametrize("name", UNSUITED)
def test_presses_that_do_more_than_score_are_refused(name):
    with pytest.raises(LowkeyError, match=UNSUITED[name]) as error:
        make_policy(name, "25%", {})
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("budget", "given", "words"),
    [
        ("40 KiB", {}, "which share of all tokens is dropped"),
        ("25%", {"protect_prompt": "true"}, "protect_prompt"),
        ("25%", {"widnow": "3"}, "did you mean 'window'?"),
        ("25%", {"window": "many"}, "a whole number"),
        (None, {"allocator": "at-least"}, "which share"),
    ],
)
def test_options_and_budgets_are_checked(budget, given, words):
    with pytest.raises(LowkeyError, match=words.replace("?", r"\?")):
        make_policy("presses:WindowPress", budget, given)


def test_a_press_may_refuse_its_options():
    class Strict(WindowPress):
        def __post_init__(self):
            assert self.window < 9, "a window below 9"

    with pytest.raises(LowkeyError, match="a window below 9"):
        press_policy(Strict)("25%", window=10)


def test_a_press_is_described_by_its_own_path_and_options():
    policy = make_policy("presses:WindowPress", "25%", {"window": "7", "allocator": "ada", "alpha": "0.5"})
    assert policy_name(policy) == "presses:WindowPress"
    told = policy_to_dict(policy)
    assert told["parameters"]["window"] == 7 and told["parameters"]["recent"] == 0
    assert told["allocator"] == {"name": "ada", "parameters": {"alpha": 0.5}}


def test_presses_work_on_the_command_line(monkeypatch):
    monkeypatch.syspath_prepend(TESTS)
    words = ("--budget", "25%", "--task", "recall", "--cases", 2, "--context", 200)
    row = printed("eval", "tiny", "--policy", "presses:WindowPress", "-O", "window=16", *words)["rows"][1]
    assert row["name"] == "presses:WindowPress 25%" and row["policy"]["parameters"]["window"] == 16
    assert row["bytes_held"] == row["bytes_predicted"] < 0.4 * row["bytes_full"]
    assert "has no score" in refused("eval", "tiny", "--policy", "presses:MaskPress", *words)
    assert "no module named 'kvpresss'" in refused("eval", "tiny", "--policy", "kvpresss:X", *words)


def test_wrapped_attention_functions_serve_our_caches(monkeypatch):
    """kvpress wraps every registered attention function when it is imported, and calls it like this."""
    model = attach(pico.build("llama"))
    plain = cache_of_press(model, WindowPress, IDS, "25%")
    attention_function = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    calls = []

    def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
        calls.append(query.shape[2] == key.shape[2])
        return attention_function(module, query, key, value, attention_mask, dropout, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION_NAME, wrapper)
    wrapped = cache_of_press(model, WindowPress, IDS, "25%")
    step = IDS[:, :1]
    with torch.no_grad():
        assert torch.equal(
            model(step, past_key_values=wrapped).logits, model(step, past_key_values=plain).logits
        )
    assert len(calls) == 9 and all(calls)


def has_kvpress():
    found = find_spec("kvpress")  # a folder of this name is found, too, and has no origin
    return found is not None and found.origin is not None


WITH_KVPRESS = """
import presses, pico, torch, kvpress
ids = 1 + torch.randperm(96, generator=torch.Generator().manual_seed(3))[:90].unsqueeze(0)
given = {
    "SnapKVPress": {"window_size": 16}, "TOVAPress": {}, "KnormPress": {}, "KeyDiffPress": {}, "CURPress": {},
    "StreamingLLMPress": {}, "ExpectedAttentionPress": {"epsilon": 0.01}, "NonCausalAttnPress": {},
    "CapPress": {}, "RandomPress": {"seed": 1},
}
for name, options in given.items():
    press, model = getattr(kvpress, name), pico.build("llama")
    told = presses.kept_by_press(model, press(0.7, **options), ids, 27)
    cache = presses.cache_of_press(pico.build("llama"), press, ids, "27 tokens", **options)
    assert presses.kept_by_policy(cache) == told, name
    assert cache.nbytes() == cache.predicted_nbytes()
print("alike")
"""


@pytest.mark.skipif(not has_kvpress(), reason="needs kvpress: docs/how-to/use-a-press.md")
def test_kvpress_own_presses_keep_what_they_keep_in_hooks():
    """In a process of its own: importing kvpress wraps the attention functions of transformers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITH_KVPRESS], env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "alike\n", ran.stderr[-2000:]
