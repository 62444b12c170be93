"""Properties of single eviction policies: what each keeps, and what does not change its scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_contexts import DIM, GROUPS, HEADS, SMALL, after, build, evicted, piece, rope_of
from score_definitions import CASES, rotation

from lowkey.ops.ragged import top_mask
from lowkey.policies import base, expected
from lowkey.policies.allocators import Global, UniformTokens
from lowkey.policies.base import EvictionContext
from lowkey.policies.curdkv import CurDKV
from lowkey.policies.expected import ExpectedAttention
from lowkey.policies.fastgen import FastGen
from lowkey.policies.h2o import H2O
from lowkey.policies.keydiff import KeyDiff
from lowkey.policies.kvcompress import KVCompress
from lowkey.policies.sharing import AllocationRequest
from lowkey.policies.streaming import StreamingLLM
from lowkey.policies.tova import TOVA


def kept(policy, context, mean, split):
    """Which candidates (b, h, s) stay, as a layer decides it; the context is the whole cache."""
    scores, out = policy.score(context), []
    for i in range(len(scores)):
        tokens = int(context.positions[i][context.valid[i]].max()) + 1
        stays = (context.positions[i] < policy.sinks) | (context.positions[i] >= tokens - policy.recent)
        row = scores[i].masked_fill(stays, torch.inf).masked_fill(~context.valid[i], -torch.inf)
        out.append(top_mask(row, split.counts(AllocationRequest(row.unsqueeze(0), mean, tokens, 0, 1))[0]))
    return torch.stack(out)


def test_streamingllm_keeps_sinks_and_the_newest():
    context = build(tokens=(14, 11), pad=1)
    stays = kept(StreamingLLM(**SMALL), context, 7, UniformTokens())
    for i, n in enumerate((14, 11)):
        assert context.positions[i, 0][stays[i, 0]].tolist() == [0, 1, *range(n - 5, n)]


def test_tova_keeps_the_same_tokens_in_every_head():
    context = build(tokens=(14, 11), pad=1)
    scores = TOVA(**SMALL).score(context)
    assert torch.equal(scores[:, 0], scores[:, 1])
    stays = kept(TOVA(**SMALL), context, 6, UniformTokens())
    assert torch.equal(stays[:, 0], stays[:, 1])


def test_h2o_with_a_window_over_everything_is_h2o():
    context = evicted()
    assert torch.equal(H2O(**SMALL, window=99).score(context), H2O(**SMALL).score(context))


@pytest.mark.parametrize(
    "policy", [H2O(**SMALL), H2O(**SMALL, per_query=True), KVCompress(**SMALL, window=0, kernel=1)], ids=str
)
def test_scores_that_carry_over_do_not_depend_on_the_chunks(policy):
    context = build(tokens=(15, 10), pad=1)
    carried = policy.score(piece(context, 0, 8))
    chunked = policy.score(after(context, 8, context.valid[:, :, :8], carried))
    whole = policy.score(context)
    for i, n in enumerate((15, 10)):
        real = chunked[i][:, after(context, 8, context.valid[:, :, :8], carried).valid[i, 0]]
        torch.testing.assert_close(real, whole[i][:, 16 - n :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["h2o", "h2o window", "h2o per query", "kv-compress all", "fastgen", "expected", "zipvl all"]
)
def test_blocks_of_queries_change_nothing(name, monkeypatch):
    policy, context = CASES[name][0], evicted()
    whole = policy.score(context)
    monkeypatch.setattr(base, "BLOCK_ON_CPU", 2 * context.keys.shape[2] * 2 * HEADS * GROUPS)
    monkeypatch.setattr(base, "MIN_QUERIES", 1)
    monkeypatch.setattr(expected, "QUERY_BLOCK", 3)
    torch.testing.assert_close(policy.score(context), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["knorm", "curdkv", "curdkv keys", "h2o", "snapkv", "kv-compress", "tova", "zipvl all"]
)
def test_scores_do_not_depend_on_where_a_text_begins(name):
    policy = CASES[name][0]
    torch.testing.assert_close(policy.score(build(start=40)), policy.score(build()), rtol=1e-4, atol=1e-5)


def test_expected_attention_does_not_depend_on_offsets():
    policy = ExpectedAttention("50%", sinks=0, future=5)
    torch.testing.assert_close(policy.score(build(start=40)), policy.score(build()), rtol=1e-3, atol=1e-5)


def test_expected_attention_is_the_mean_over_sampled_queries():
    context, policy = build(tokens=(10,), groups=1), ExpectedAttention("50%", sinks=0, future=1, epsilon=0.0)
    context = replace(context, values=torch.nn.functional.normalize(context.values, dim=-1), scaling=0.25)
    for j in range(HEADS):
        plain = [rotation(context, p).inverse() @ context.queries[0, j, 0, p].double() for p in range(10)]
        drawn = torch.distributions.MultivariateNormal(
            torch.stack(plain).mean(0), torch.cov(torch.stack(plain).T, correction=0) + 1e-9 * torch.eye(DIM)
        )
        torch.manual_seed(j)
        queries = drawn.sample((200_000,)) @ rotation(context, 10).T  # the next position
        mean = (queries @ context.keys[0, j].double().T * context.scaling).exp().mean(0)
        torch.testing.assert_close(policy.score(context)[0, j].double(), mean / mean.sum(), rtol=0.03, atol=0)


def test_expected_attention_uses_positions_after_each_row():
    asked = []

    def rope(positions, like):
        asked.append(positions)
        return rope_of()(positions, like)

    ExpectedAttention(**SMALL, future=3, covariance=False).score(replace(build(tokens=(14, 9)), rope=rope))
    assert asked[0].tolist() == [[14, 15, 16], [9, 10, 11]]


def test_curdkv_projects_to_the_same_scores_on_average():
    context = build(tokens=(8,))
    plain = CurDKV(**SMALL, local=0, kind="keys").score(context)
    drawn = torch.stack(
        [CurDKV(**SMALL, local=0, kind="keys", rank=20, seed=i).score(context) for i in range(300)]
    )
    torch.testing.assert_close(drawn.mean(0), plain, rtol=0.06, atol=0)
    assert not torch.equal(drawn[0], drawn[1])


def test_keydiff_prefers_the_odd_one_out():
    context = build(tokens=(12,))
    keys = torch.randn(DIM, generator=torch.Generator().manual_seed(0)) + 0.1 * context.keys
    keys[:, :, 5] = -keys[:, :, 5]
    assert bool((KeyDiff(**SMALL).score(replace(context, keys=keys)).argmax(-1) == 5).all())


def pointing(aims, tokens=20, strength=60.0):
    """A context without rotation in which head j's queries look at the tokens of aims[j], equally."""
    keys = torch.zeros(1, len(aims), tokens, 2)
    for j, aim in enumerate(aims):
        keys[0, j, list(aim), 0] = strength
    queries = torch.tensor([1.0, 0.0]).expand(1, len(aims), 1, tokens, 2)
    at = torch.arange(tokens)
    places = at.expand(1, len(aims), tokens)
    valid = torch.ones(1, len(aims), tokens, dtype=torch.bool)
    return EvictionContext(
        keys,
        keys,
        places,
        valid,
        queries,
        at.unsqueeze(0),
        1.0,
        None,
        rope_of(2),
        torch.zeros(1, len(aims), tokens),
    )


# sinks; and the local share; tokens far off; everything
AIMS = [(0, 1), (0, 14, 15), (5, 8), tuple(range(20))]


def test_fastgen_keeps_more_until_a_head_is_recovered():
    policy = FastGen(**SMALL, sample=4, recovery=0.95)
    assert (policy.score(pointing(AIMS)) >= 1).sum(-1).tolist() == [[4, 8, 12, 20]]


def test_fastgen_gives_wide_heads_what_narrow_ones_do_not_need():
    policy, context = FastGen(**SMALL, sample=4), pointing(AIMS)
    stays = kept(policy, context, (4 + 8 + 12 + 20) / 4, Global())[0]
    assert stays.sum(-1).tolist() == [4, 8, 12, 20]
    assert torch.equal(stays, policy.score(context)[0] >= 1)


def test_fastgen_is_content_only_when_every_query_head_is():
    context = pointing([(0, 1)] * 2)
    other = context.queries.clone()
    other[:, 1] = 0.0  # looks at everything alike
    group = replace(context, queries=torch.cat([context.queries, other], 2))
    assert (FastGen(**SMALL, sample=4).score(group) >= 1).sum(-1).tolist() == [[4, 20]]
