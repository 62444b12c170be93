"""What an engine does with requests, on every route: chunks, shared prefixes, preemption, packed pages."""

from __future__ import annotations

import pytest
from engines import (
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

ROUTES = {
    "projected": {"keys": [(4, 64)], "values": [(4, 64)]},
    "latent": {"keys": [(2, 30)], "values": [(1, 12)], "layout": "pre_rope"},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("engine") / "model", "llama")


@pytest.fixture(scope="session", params=ROUTES)
def plan(request, model, tmp_path_factory):
    return saved_plan(tmp_path_factory.mktemp("plans") / request.param, model, **ROUTES[request.param])


def test_a_prompt_in_chunks_among_others(model, plan):
    given = prompts(7, 33, 200, 150, 64, 1)
    answers = served(model, given, {"plan": str(plan)}, max_num_batched_tokens=64, max_num_seqs=8)
    check_same(answers, of_our_cache(model, given, plan))


def test_a_prefix_that_is_known(model, plan):
    shared = prompts(300)[0]
    given = [[*shared, 5, 6], [*shared, 7, 8, 9]]

    def run():
        llm = engine(model, {"plan": str(plan)})
        return [asked(llm, [ids]) for ids in given]

    imported()
    first, second = (Answers(*answers) for answers in forked(run))
    assert (first.cached, second.cached) == ([0], [256])
    check_same(second, of_our_cache(model, given[1:], plan))


def test_requests_that_are_preempted(model, plan):
    """Pages of 32 tokens, 13 of them: three prompts of 120 tokens fit at first, but not their answers."""
    given = prompts(*[120] * 5)
    token_bytes = {"projected": 3 * 512, "latent": 3 * (60 + 48) * 4}[plan.name]
    answers = served(
        model,
        given,
        {"plan": str(plan)},
        block_size=32,
        kv_cache_memory_bytes=13 * 32 * token_bytes,
        max_model_len=256,
    )
    assert answers.blocks == 13 and answers.preemptions > 0
    check_same(answers, of_our_cache(model, given, plan))


PACKED = {
    "int8": ({"keys": [(2, 30)], "values": [(1, 12)], "layout": "pre_rope"}, 2 * (30 + 8) + 4 * (12 + 8)),
    "int4": ({"keys": [(4, 64)], "values": [(2, 40)]}, (32 + 16) + 2 * (20 + 16)),
    "hadamard8": ({"keys": [(1, 20)], "values": [(1, 20)]}, 2 * 4 * (20 + 8)),
}


@pytest.mark.parametrize("bits", PACKED)
def test_packed_pages(model, tmp_path, bits):
    """Codes, scales and offsets of a token in its page; rounding may fall the other way in one of them."""
    settings, token_bytes = PACKED[bits]
    plan = saved_plan(tmp_path / "plan", model, **settings, bits=bits)
    given = prompts(7, 21, 300)
    answers = served(model, given, {"plan": str(plan)})
    assert answers.blocks == 16 * 2**20 // (128 * 3 * token_bytes)
    check_near(answers, of_our_cache(model, given, plan), within=5e-3)


def test_floats_of_8_bits_in_the_engines_kernel(model, tmp_path):
    """Half the bytes of bf16; probabilities are near those of fp32, whose text they follow for a while."""
    plan = saved_plan(tmp_path / "plan", model, **ROUTES["projected"])
    given = prompts(7, 21, 300)
    answers = served(model, given, {"plan": str(plan)}, dtype="bfloat16", kv_cache_dtype="fp8")
    assert answers.blocks == 16 * 2**20 // (128 * 3 * 2 * 64)
    tokens, logprobs = of_our_cache(model, given, plan)
    firsts = [abs(a[0] - b[0]) for a, b in zip(answers.logprobs, logprobs, strict=True)]
    assert max(firsts) < 0.3
    assert sum(a[0] == b[0] for a, b in zip(answers.tokens, tokens, strict=True)) >= 2


def test_a_compiled_model(model, plan):
    """torch.compile sees the products around the engine's kernel, and our attention as one operation."""
    given = prompts(7, 21, 300)
    answers = served(model, given, {"plan": str(plan)}, enforce_eager=False)
    check_same(answers, of_our_cache(model, given, plan))
