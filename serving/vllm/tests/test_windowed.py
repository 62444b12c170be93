"""Plans with exact tokens and with blocks of tokens packed together, as `lowkey compress` makes them."""

from __future__ import annotations

import pytest
from engines import (
    MEMORY,
    Answers,
    asked,
    check_near,
    check_same,
    engine,
    forked,
    imported,
    of_our_cache,
    prompts,
    saved_model,
    saved_plan,
    served,
)

LATENTS = {"keys": [(2, 30), (4, 50), (1, 20)], "values": [(1, 12), (2, 40), (4, 64)]}
EXACT = {"sinks": 4, "recent": 32}
# Bytes of a token of LATENTS in three layers by hand, in fp32. If each layer has another size, the smallest
# is given that of the next. Exact tokens lie in blocks of the same size.
PLAIN = 4 * (50 + 2 * 40) * 2 + 4 * (4 * 20 + 64)
# Name: what the plan is, bytes of a token, and by how much logarithms of probabilities may differ.
PLANS = {
    "exact tokens": ({**LATENTS, **EXACT, "layout": "pre_rope"}, PLAIN, None),
    "after rotation": ({**LATENTS, **EXACT, "order": True, "means": True}, PLAIN, None),
    "sinks alone": ({**LATENTS, "sinks": 20}, PLAIN, None),
    "recent alone": ({**LATENTS, "recent": 7, "layout": "pre_rope"}, PLAIN, None),
    "kivi4": ({**LATENTS, **EXACT, "layout": "pre_rope", "bits": "kivi4"}, 108 + 109.5 + 108, 5e-3),
    "kivi8, nothing exact": ({**LATENTS, "bits": "kivi8"}, 174.5 + 174.5 + 180, 5e-3),
    "int8": ({**LATENTS, **EXACT, "bits": "int8"}, 178 + 178 + 192, 5e-3),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("windowed") / "model", "llama")


@pytest.fixture(scope="module")
def plan(model, tmp_path_factory):
    fields, *_ = PLANS["kivi4"]
    return saved_plan(tmp_path_factory.mktemp("windowed") / "plan", model, **fields)


def check(answers, expected, within):
    check_same(answers, expected) if within is None else check_near(answers, expected, within)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_with_exact_tokens_is_served(model, tmp_path, name):
    """Prompts in chunks beside one another, some of which end within a window or a block."""
    fields, token_bytes, within = PLANS[name]
    folder = saved_plan(tmp_path / "plan", model, **fields)
    given = prompts(7, 33, 200, 96, 300)
    answers = served(model, given, {"plan": str(folder)}, max_num_batched_tokens=128, max_num_seqs=8)
    check(answers, of_our_cache(model, given, folder), within)
    assert answers.blocks == int(MEMORY // (128 * token_bytes))


def test_a_prefix_is_known_with_its_exact_tokens(model, plan):
    shared = prompts(300)[0]
    given = [[*shared, 5, 6], [*shared, 7, 8, 9]]

    def run():
        llm = engine(model, {"plan": str(plan)}, max_num_batched_tokens=128)
        return [asked(llm, [ids]) for ids in given]

    imported()
    first, second = (Answers(*answers) for answers in forked(run))
    assert (first.cached, second.cached) == ([0], [256])
    check(second, of_our_cache(model, given[1:], plan), 5e-3)


def test_preempted_requests_see_the_same(model, tmp_path):
    """With torch.compile. A request takes 2 blocks of latents and 3 of exact tokens, and at last 5 and 4."""
    fields, token_bytes, _ = PLANS["exact tokens"]
    folder, given, new = saved_plan(tmp_path / "plan", model, **fields), prompts(*[33] * 6), 100

    def run():
        llm = engine(
            model,
            {"plan": str(folder)},
            enforce_eager=False,
            block_size=32,
            kv_cache_memory_bytes=24 * 32 * token_bytes,
            max_num_batched_tokens=64,
            max_model_len=160,
        )
        return asked(llm, given, new)

    imported()
    answers = Answers(*forked(run))
    assert answers.blocks == 24 and answers.preemptions > 0
    check_same(answers, of_our_cache(model, given, folder, new))
