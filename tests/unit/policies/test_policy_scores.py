"""Every eviction score against its definition in loops and double precision, on small random contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_contexts import build, evicted, rope_of
from score_definitions import CASES

from lowkey.core.types import LowkeyError
from lowkey.policies.base import Policy
from lowkey.policies.curdkv import CurDKV
from lowkey.policies.expected import ExpectedAttention
from lowkey.policies.fastgen import FastGen
from lowkey.policies.h2o import H2O
from lowkey.policies.kvcompress import KVCompress
from lowkey.policies.snapkv import SnapKV

# -- contexts


CONTEXTS = {
    "plain": lambda: build(tokens=(12,)),
    "padded": lambda: build(pad=2),
    "one query head per KV head": lambda: build(groups=1),
    "soft-capped": lambda: build(softcap=1.5),
    "partly and scaled rotated": lambda: build(rope=rope_of(4, 1.3), start=3),
    "evicted before": evicted,
}


# -- definitions, in loops


every = pytest.mark.parametrize("name", CASES)


@pytest.mark.defines("policies", "expected-attention", "triattention", "fast-kvzip")
@pytest.mark.parametrize("where", CONTEXTS)
@every
def test_scores_are_what_the_definition_says(name, where):
    (policy, definition), context = CASES[name], CONTEXTS[where]()
    got, valid = policy.score(context), context.valid
    assert got.dtype == torch.float32 and got.shape == context.valid.shape
    torch.testing.assert_close(got[valid].double(), definition(policy, context)[valid], rtol=2e-4, atol=2e-6)


# -- what holds for all


@every
def test_padding_changes_nothing(name):
    policy, context = CASES[name][0], build(tokens=(11,))
    padded = policy.score(build(tokens=(11,), pad=6))
    torch.testing.assert_close(padded[:, :, 6:], policy.score(context), rtol=1e-5, atol=1e-6)


@every
def test_the_other_rows_change_nothing(name):
    policy = CASES[name][0]
    both, alone = build(tokens=(13, 8)), build(tokens=(8,), pad=5, seed=1)
    torch.testing.assert_close(policy.score(both)[1], policy.score(alone)[0], rtol=1e-5, atol=1e-6)


@every
def test_the_same_context_gives_the_same_scores(name):
    policy, state = CASES[name][0], torch.get_rng_state()
    assert torch.equal(policy.score(evicted()), policy.score(evicted()))
    assert torch.equal(state, torch.get_rng_state())


@every
def test_bf16_gives_finite_fp32_scores(name):
    scores = CASES[name][0].score(build(pad=2, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and bool(scores.isfinite().all())


@every
def test_a_row_of_padding_only_gives_finite_scores(name):
    context = build(tokens=(9, 9))
    real = torch.tensor([False, True])[:, None]
    nothing = replace(
        context,
        valid=context.valid & real.unsqueeze(2),
        positions=context.positions.where(real.unsqueeze(2), context.positions - 9),
        query_positions=context.query_positions.where(real, -1),
    )
    scores = CASES[name][0].score(nothing)
    assert bool(scores.isfinite().all())


@every
def test_every_policy_names_its_paper(name):
    policy = CASES[name][0]
    assert (
        policy.paper.startswith(("arXiv:", "openreview:")) and policy.summary and isinstance(policy, Policy)
    )


@every
def test_scores_that_read_no_query_say_so(name):
    policy, context = CASES[name][0], build()
    none = replace(
        context, queries=context.queries[:, :, :, :0], query_positions=context.query_positions[:, :0]
    )
    if not policy.uses_queries:
        assert torch.equal(policy.score(context), policy.score(none))
    if not policy.stateful:
        assert torch.equal(
            policy.score(context), policy.score(replace(context, previous_scores=context.previous_scores + 1))
        )


@every
def test_scores_that_ask_for_rotations_say_so(name):
    policy, context, asked = CASES[name][0], build(), []

    def rope(positions, like):
        asked.append(positions)
        return context.rope(positions, like)

    policy.score(replace(context, rope=rope))
    assert bool(asked) == policy.uses_rotations


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (H2O, {"window": -1}),
        (H2O, {"window": 8, "per_query": True}),
        (ExpectedAttention, {"future": 0}),
        (CurDKV, {"kind": "both"}),
        (CurDKV, {"rank": -1}),
        (CurDKV, {"local": -1}),
        (KVCompress, {"window": -1}),
        (KVCompress, {"kernel": 4}),
        (KVCompress, {"pooling": "sum"}),
        (SnapKV, {"pooling": "avg"}),
        (FastGen, {"recovery": 1.5}),
        (FastGen, {"frequent": -0.1}),
        (FastGen, {"first": "punctuation"}),
        (FastGen, {"sample": 0}),
    ],
)
def test_bad_options_are_refused_in_one_line(kind, options):
    with pytest.raises(LowkeyError) as error:
        kind("50%", **options)
    assert next(iter(options)) in str(error.value) and "\n" not in str(error.value)
