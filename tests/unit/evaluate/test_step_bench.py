"""The step benchmark's bookkeeping: what is timed, counted and compared."""

from __future__ import annotations

import itertools
from functools import partial

import pico
import pytest
import torch
import variants
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.evaluate import step_bench as bench
from lowkey.evaluate.step_bench import StepTiming
from lowkey.policies import SnapKV

KEYS = [
    *("setting", "context", "threads", "step_ms", "ratio_to_stock", "spread"),
    *("bytes_held", "operations", "value_reads"),
]
STEPS = 2  # of a round


def makers(model):
    return {
        "full": partial(lowkey.make_cache, model),
        "int4": partial(lowkey.make_cache, model, bits="int4"),
        "snapkv:40%": partial(lowkey.make_cache, model, policy=SnapKV("40%")),
    }


def timed(model, settings, *timing):
    return bench.step_bench(model, pico.tokenizer(), settings, StepTiming(*timing))


@pytest.fixture(scope="module")
def result():
    model = pico.attached("llama")
    return timed(model, makers(model), (64, 100), (1, 2), 2)


def test_a_row_for_every_context_thread_count_and_setting(result):
    names = ["stock", "full", "int4", "snapkv:40%"]
    assert list(result) == ["format", "environment", "rows"] and result["format"] == 1
    assert [(r["context"], r["threads"], r["setting"]) for r in result["rows"]] == list(
        itertools.product((64, 100), (1, 2), names)
    )
    assert all(list(row) == KEYS for row in result["rows"])


def test_quotients_are_those_to_stock(result):
    for row in result["rows"]:
        low, high = row["spread"]
        assert row["step_ms"] > 0 and low <= row["ratio_to_stock"] <= high
        assert row["setting"] != "stock" or (low, row["ratio_to_stock"], high) == (1, 1, 1)


def test_bytes_are_held_behind_all_steps(result):
    """Each thread count adds a round that warms up, two rounds, and the step that is counted."""
    for row in result["rows"]:
        tokens = row["context"] + row["threads"] * (3 * STEPS + 1)
        full = 2 * pico.LAYERS * 4 * tokens * pico.HEAD_DIM * 4  # 4 KV heads, fp32
        assert (row["bytes_held"] == full) == (row["setting"] in ("stock", "full"))
        assert row["bytes_held"] <= full


def test_the_environment_says_what_was_timed(result):
    found = result["environment"]
    wanted = {"device": "cpu", "dtype": "float32", "rounds": 2, "steps_per_round": 2}
    assert wanted.items() <= found.items()
    assert found["torch"] == torch.__version__ and found["cores"] >= 1 and found["processor"]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_stock_is_transformers_own_model(result):
    model = pico.build("llama")  # never attached
    model.set_attn_implementation("sdpa")
    cache, ids = DynamicCache(config=model.config), pico.prompt(64, batch=1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        token = ids[:, :1]
        with Operations() as step:
            wanted = model(token, past_key_values=cache).logits
    row = result["rows"][0]
    assert (row["operations"], row["value_reads"]) == (len(step.names), 0)
    twin = bench.stock_twin(pico.attached("llama"))
    cache = DynamicCache(config=twin.config)
    with torch.no_grad():
        twin(ids, past_key_values=cache)
        assert torch.equal(twin(token, past_key_values=cache).logits, wanted)


def test_stock_shares_weights_and_leaves_the_model_attached():
    model = pico.attached("llama")
    twin = bench.stock_twin(model)
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert model.config._attn_implementation == "lowkey" and twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "llama-yarn"])
def test_other_families_are_timed(name):
    model = pico.attached(name)
    first, second = timed(model, {"int8": partial(lowkey.make_cache, model, bits=8)}, (120,), (1,), 1)["rows"]
    assert first["bytes_held"] > second["bytes_held"] > 0


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_models_with_attention_of_lowkey_are_timed(name):
    model = lowkey.attach(variants.build(name).eval())
    first, second = timed(model, {"full": partial(lowkey.make_cache, model)}, (40,), (1,), 1)["rows"]
    assert first["bytes_held"] == second["bytes_held"] > 0
    assert first["operations"] > 0 == first["value_reads"]


class Clock:
    """A clock that stands still except while a setting takes a step."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Slow:
    """Takes the given seconds, one step after the other."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.threads = clock, iter(seconds), set()

    def step(self, token):
        self.clock.now += next(self.seconds)
        self.threads.add(torch.get_num_threads())


def test_times_are_means_of_a_turn_without_the_first_round(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    a, b = Slow(clock, [9, 9, 1, 3, 4, 4]), Slow(clock, [7, 7, 2, 2, 5, 6])
    order = []

    def watched(turns, label, total=None):
        assert len(turns) == 6
        for turn in turns:
            order.append(turn)
            yield turn

    found = bench._times({"a": a, "b": b}, torch.zeros(1, 1), 2, "", watched)
    assert found == {"a": [2, 4], "b": [2, 5.5]}
    assert sorted(order) == list(itertools.product(range(3), "ab"))
    assert [r for r, _ in order] == [0, 0, 1, 1, 2, 2]


def test_the_order_of_turns_changes():
    orders = set()
    names = {name: Slow(Clock(), itertools.repeat(0)) for name in "abc"}

    def watched(turns, label, total=None):
        orders.update("".join(n for r, n in turns if r == k) for k in range(9))
        return iter(turns)

    bench._times(names, torch.zeros(1, 1), 8, "", watched)
    assert len(orders) > 2 and all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_quotients_are_taken_within_a_round():
    found = bench._compared([2, 4, 6, 8], [1, 2, 2, 8])  # quotients 2, 2, 3, 1
    assert found == {"step_ms": 5000, "ratio_to_stock": 2, "spread": [1.75, 2.25]}
    assert bench._compared([3], [2]) == {"step_ms": 3000, "ratio_to_stock": 1.5, "spread": [1.5, 1.5]}


def test_threads_are_set_for_steps_and_put_back():
    before = torch.get_num_threads()
    inside = Slow(Clock(), itertools.repeat(0))
    with bench._torch_threads(before + 1):
        inside.step(None)
    assert inside.threads == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), bench._torch_threads(before + 2):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_a_prompt_is_the_text_as_often_as_it_takes():
    model, tokenizer = pico.attached("llama"), pico.tokenizer()
    text = tokenizer(lowkey.core.text.embedded_text("evaluation"), add_special_tokens=False).input_ids
    ids = bench._prompt(model, tokenizer, 2 * len(text))[0].tolist()
    assert ids == [tokenizer.bos_token_id, *text, *text[:-1]]


def test_a_context_beyond_the_positions_is_refused_first():
    model = pico.attached("llama")
    never = {"full": lambda: pytest.fail("made")}
    with pytest.raises(LowkeyError, match=r"^context 513: the model has 512 positions; give at most that$"):
        timed(model, never, (16, 513), (1,), 1)


def test_settings_that_do_not_fit_are_refused_before_prompts():
    model = pico.attached("llama")

    def read(items, label, total=None):
        pytest.fail("read")

    wrong = {
        "full": partial(lowkey.make_cache, model),
        "int5": partial(lowkey.make_cache, model, bits="int5"),
    }
    with pytest.raises(LowkeyError, match="int5"):
        bench.step_bench(model, pico.tokenizer(), wrong, StepTiming((16,), (1,), 1), read)
