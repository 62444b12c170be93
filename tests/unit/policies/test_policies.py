"""Every score against its definition written out in loops, in double precision, on small random contexts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lowkey.core.types import LowkeyError
from lowkey.ops.ragged import top_mask
from lowkey.ops.rope import rotate
from lowkey.policies import base, expected
from lowkey.policies.allocators import AllocationRequest, Global, UniformTokens
from lowkey.policies.base import EvictionContext, Policy
from lowkey.policies.curdkv import CurDKV
from lowkey.policies.expected import ExpectedAttention
from lowkey.policies.fastgen import FastGen
from lowkey.policies.h2o import H2O
from lowkey.policies.keydiff import KeyDiff
from lowkey.policies.knorm import Knorm
from lowkey.policies.kvcompress import KVCompress
from lowkey.policies.snapkv import SnapKV
from lowkey.policies.streaming import StreamingLLM
from lowkey.policies.tova import TOVA

HEADS, GROUPS, DIM = 2, 3, 8
SMALL = {"budget": "50%", "sinks": 2, "recent": 2}


# -- contexts


def rope_of(width=DIM, scale=1.0):
    """A rotary module of its own: the first `width` channels turn; scaled as YaRN scales."""
    speeds = 10.0 ** (-torch.arange(width // 2) / 3)

    def rope(positions, like):
        angles = (positions.unsqueeze(-1) * speeds).repeat(1, 1, 2).unsqueeze(1)
        return (scale * angles.cos()).to(like.dtype).float(), (scale * angles.sin()).to(like.dtype).float()

    return rope


def build(
    tokens=(14, 9), pad=0, groups=GROUPS, softcap=None, rope=None, dtype=torch.float32, start=0, seed=0
):
    """Left-padded rows of so many tokens, `pad` wider than the longest; a row's contents do not depend on its
    padding or its place (`start`: the position of its first token)."""
    rope, width = rope or rope_of(), max(tokens) + pad
    parts = [_row(n, width, groups, seed + i) for i, n in enumerate(tokens)]
    keys, values, queries = (torch.stack(part) for part in zip(*parts, strict=True))
    at = torch.arange(width) - width + torch.tensor(tokens).unsqueeze(1) + start
    cos, sin = rope(at, keys)
    real = at >= start
    return EvictionContext(
        keys=rotate(keys, cos, sin).to(dtype),
        values=values.to(dtype),
        positions=at.unsqueeze(1).expand(-1, HEADS, -1),
        valid=real.unsqueeze(1).expand(-1, HEADS, -1),
        queries=rotate(queries, cos.unsqueeze(1), sin.unsqueeze(1)).to(dtype),
        query_positions=at.masked_fill(~real, -1),
        scaling=0.6,
        softcap=softcap,
        rope=rope,
        previous_scores=torch.zeros(len(tokens), HEADS, width),
    )


def _row(tokens, width, groups, seed):
    """Keys, values (h, width, d) and queries (h, g, width, d); what lies in the padding is large and must not
    matter.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator)
        for shape in ((HEADS, tokens, DIM), (HEADS, tokens, DIM), (HEADS, groups, tokens, DIM))
    ]
    return [torch.cat([torch.full((*x.shape[:-2], width - tokens, DIM), 30.0), x], -2) for x in made]


def piece(context, start, stop):
    """The chunk of a context's tokens from `start` to `stop`, as a context without a past."""
    cut = slice(start, stop)
    tokens = {
        name: getattr(context, name)[:, :, cut]
        for name in ("keys", "values", "positions", "valid", "previous_scores")
    }
    return replace(
        context,
        **tokens,
        queries=context.queries[:, :, :, cut],
        query_positions=context.query_positions[:, cut],
    )


def after(context, start, kept, carried):
    """What the second chunk of a context sees when `kept` (b, h, start) was kept of the first: shorter heads
    have gaps, then the chunk.
    """
    longest, new = int(kept.sum(-1).max()), piece(context, start, context.keys.shape[2])
    old = piece(context, 0, start)
    packed = [_pack(getattr(old, name), kept, longest) for name in ("keys", "values", "positions")]
    there = _pack(kept, kept, longest)
    tokens = dict(
        zip(("keys", "values", "positions"), packed, strict=True),
        valid=there,
        previous_scores=_pack(carried, kept, longest),
    )
    return replace(new, **{name: torch.cat([x, getattr(new, name)], 2) for name, x in tokens.items()})


def _pack(x, kept, longest):
    out = x.new_zeros(*kept.shape[:2], longest, *x.shape[3:])
    for i in range(kept.shape[0]):
        for j in range(kept.shape[1]):
            chosen = x[i, j][kept[i, j]]
            out[i, j, : len(chosen)] = chosen
    return out


def evicted():
    """A second chunk after an eviction that left heads with different tokens, in different numbers, with
    scores.
    """
    context = build(tokens=(18, 12), pad=1, seed=5)
    generator = torch.Generator().manual_seed(1)
    kept = (torch.rand(2, HEADS, 10, generator=generator) < 0.5) & context.valid[:, :, :10]
    kept[:, :, -1] = True
    return after(context, 10, kept, torch.rand(2, HEADS, 10, generator=generator))


CONTEXTS = {
    "plain": lambda: build(tokens=(12,)),
    "padded": lambda: build(pad=2),
    "one query head per KV head": lambda: build(groups=1),
    "soft-capped": lambda: build(softcap=1.5),
    "partly and scaled rotated": lambda: build(rope=rope_of(4, 1.3), start=3),
    "evicted before": evicted,
}


# -- definitions, in loops


def each(context, score):
    """(b, h, s) from a function of one row's one head, which gives a list over its tokens."""
    b, h, s, _ = context.keys.shape
    out = torch.zeros(b, h, s, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            out[i, j] = torch.as_tensor(score(i, j), dtype=torch.float64)
    return out


def attention(context, i, j, last):
    """(g, w, s) of the newest `last` queries, and how many of these are real."""
    g, w = context.queries.shape[2:4]
    newest = range(max(0, w - last), w)
    out = torch.zeros(g, len(newest), context.keys.shape[2], dtype=torch.float64)
    for at, q in enumerate(newest):
        seen = context.valid[i, j] & (context.positions[i, j] <= context.query_positions[i, q])
        for k in range(g):
            logits = context.keys[i, j].double() @ context.queries[i, j, k, q].double() * context.scaling
            logits = (
                logits if context.softcap is None else context.softcap * torch.tanh(logits / context.softcap)
            )
            if bool(seen.any()):
                out[k, at, seen] = logits[seen].softmax(0)
    return out, sum(int(context.query_positions[i, q]) >= 0 for q in newest)


def around(policy, context, i, j, scores):
    """Each prompt token's largest or mean score over the kernel of positions around it; the window's tokens
    neither give nor take.
    """
    at, there, reach = context.positions[i, j].tolist(), context.valid[i, j].tolist(), policy.kernel // 2
    looking = context.query_positions[i, -policy.window or len(context.query_positions[i]) :]
    first = max(0, int(looking.min())) if policy.window else max(at) + 1
    prompt = {at[t]: float(scores[t]) for t in range(len(at)) if there[t] and at[t] < first}
    out = []
    for t, p in enumerate(at):
        near = [prompt.get(p + step, 0.0) for step in range(-reach, reach + 1)]
        pooled = max(near) if policy.pooling == "max" else sum(near) / policy.kernel
        out.append(pooled if there[t] and p < first else float(scores[t]))
    return out


def by_snapkv(policy, context):
    def score(i, j):
        weights, real = attention(context, i, j, policy.window)
        return around(policy, context, i, j, weights.sum((0, 1)) / (max(real, 1) * len(weights)))

    return each(context, score)


def by_position(policy, context):
    return context.positions.double()


def by_tova(policy, context):
    def score(i, j):
        paid, g = {}, context.queries.shape[2]
        for other in range(HEADS):
            newest = attention(context, i, other, 1)[0][:, 0].sum(0)
            for t in context.valid[i, other].nonzero().flatten().tolist():
                at = int(context.positions[i, other, t])
                paid[at] = paid.get(at, 0.0) + float(newest[t]) / (HEADS * g)
        return [paid.get(int(at), 0.0) for at in context.positions[i, j]]

    return each(context, score)


def by_h2o(policy, context):
    def score(i, j):
        weights, real = attention(context, i, j, policy.window or 10**6)
        sums, total = weights.sum((0, 1)) / weights.shape[0], int(context.query_positions[i].max()) + 1
        out = []
        for t, at in enumerate(context.positions[i, j].tolist()):
            carried = float(context.previous_scores[i, j, t])
            if policy.per_query:
                could = len(range(at, total))
                earlier = len(range(at, total - real))
                out.append((carried * earlier + float(sums[t])) / could if context.valid[i, j, t] else 0.0)
            else:
                out.append(carried + float(sums[t]))
        return out

    return each(context, score)


def rotation(context, position):
    """The (d, d) matrix that turns a column vector to this position."""
    cos, sin = (x[0, 0, 0].double() for x in context.rope(torch.tensor([[position]]), context.keys))
    half, matrix = len(cos) // 2, torch.eye(DIM, dtype=torch.float64)
    for a in range(half):
        b = a + half
        matrix[a, a], matrix[b, b], matrix[a, b], matrix[b, a] = cos[a], cos[b], -sin[a], sin[b]
    return matrix


def gaussian(policy, context, i, j, k):
    """Mean (d) and covariance (d, d) of one query head's queries, under the mean of the rotations to come."""
    at = context.query_positions[i].tolist()
    plain = [
        rotation(context, p).inverse() @ context.queries[i, j, k, q].double()
        for q, p in enumerate(at)
        if p >= policy.sinks
    ]
    plain, coming = torch.stack(plain), range(max(at) + 1, max(at) + 1 + policy.future)
    turn = torch.stack([rotation(context, p) for p in coming]).mean(0)
    mean = plain.mean(0)
    spread = sum(torch.outer(x - mean, x - mean) for x in plain) / len(plain)
    return turn @ mean, turn @ spread @ turn.T


def by_expected(policy, context):
    def score(i, j):
        out = torch.zeros(context.keys.shape[2], dtype=torch.float64)
        used = context.valid[i, j] & (context.positions[i, j] >= policy.sinks)
        for k in range(context.queries.shape[2]):
            mean, spread = gaussian(policy, context, i, j, k)
            logits = []
            for key in context.keys[i, j].double():
                quadratic = key @ spread @ key * context.scaling**2 / 2 if policy.covariance else 0.0
                logits.append(mean @ key * context.scaling + quadratic)
            out[used] += torch.stack(logits)[used].softmax(0) / context.queries.shape[2]
        return [
            (float(a) + policy.epsilon) * float(v.double().norm())
            for a, v in zip(out, context.values[i, j], strict=True)
        ]

    return each(context, score)


def by_curdkv(policy, context):
    def leverage(vectors, there):
        if policy.rank:
            matrix = torch.randn(
                DIM, policy.rank, generator=torch.Generator().manual_seed(policy.seed)
            ).double()
            vectors = vectors @ matrix / math.sqrt(policy.rank)
        norms = (vectors**2).sum(-1)
        size = policy.local or len(there)
        for start in range(0, len(there), size):
            window = there[start : start + size]
            norms[window] = norms[window] / (norms[window].sum() if policy.local else 1.0)
        return norms

    def score(i, j):
        there = context.valid[i, j].nonzero().flatten().tolist()
        keys = context.keys[i, j].double()
        if policy.rank:
            keys = torch.stack(
                [
                    rotation(context, int(p)).inverse() @ k
                    for p, k in zip(context.positions[i, j], keys, strict=True)
                ]
            )
        k, v = leverage(keys, there), leverage(context.values[i, j].double(), there)
        both = {"keys": k, "values": v, "product": k * v}[policy.kind]
        return both / both[there].sum()

    return each(context, score)


def by_knorm(policy, context):
    return each(
        context, lambda i, j: [-math.sqrt(sum(x * x for x in key)) for key in context.keys[i, j].tolist()]
    )


def by_keydiff(policy, context):
    def score(i, j):
        unit = [key / key.norm() if float(key.norm()) else key for key in context.keys[i, j].double()]
        anchor = sum(u for u, there in zip(unit, context.valid[i, j], strict=True) if there)
        return [-float(u @ anchor / anchor.norm()) for u in unit]

    return each(context, score)


def by_kvcompress(policy, context):
    def score(i, j):
        squares = (attention(context, i, j, policy.window or 10**6)[0] ** 2).sum((0, 1))
        return context.previous_scores[i, j].double() + torch.tensor(
            around(policy, context, i, j, squares), dtype=torch.float64
        )

    return each(context, score)


def by_fastgen(policy, context):
    def score(i, j):
        weights, real = attention(context, i, j, policy.sample)
        mass = weights.sum(1) / max(real, 1)
        mean = mass.mean(0)
        there = context.valid[i, j].nonzero().flatten().tolist()
        newest = max(
            int(context.positions[i, h, t])
            for h in range(HEADS)
            for t in context.valid[i, h].nonzero().flatten()
        )
        at = context.positions[i, j].tolist()
        always = {t for t in there if at[t] < policy.sinks or at[t] > newest - policy.recent}
        local = set(there[len(there) - round(policy.local * len(there)) :])
        often = set(sorted(there, key=lambda t: (-float(mean[t]), t))[: round(policy.frequent * len(there))])
        second = local if policy.first == "local" else often
        for rung in (always, always | second, always | local | often, set(there)):
            if all(float(head[sorted(rung)].sum()) >= policy.recovery for head in mass):
                break
        return [float(mean[t]) + (t in rung) for t in range(len(at))]

    return each(context, score)


CASES = {
    "snapkv": (SnapKV(**SMALL, window=4, kernel=3), by_snapkv),
    "snapkv mean": (SnapKV(**SMALL, window=3, kernel=5, pooling="mean"), by_snapkv),
    "snapkv unpooled": (SnapKV(**SMALL, window=4, kernel=1), by_snapkv),
    "snapkv of everything": (SnapKV(**SMALL, window=99), by_snapkv),
    "streamingllm": (StreamingLLM(**SMALL), by_position),
    "tova": (TOVA(**SMALL), by_tova),
    "h2o": (H2O(**SMALL), by_h2o),
    "h2o window": (H2O(**SMALL, window=5), by_h2o),
    "h2o per query": (H2O(**SMALL, per_query=True), by_h2o),
    "expected": (ExpectedAttention(**SMALL, future=6), by_expected),
    "expected mean": (ExpectedAttention(**SMALL, future=1, epsilon=0.0, covariance=False), by_expected),
    "curdkv": (CurDKV(**SMALL, local=4), by_curdkv),
    "curdkv whole": (CurDKV(**SMALL, local=0), by_curdkv),
    "curdkv keys": (CurDKV(**SMALL, local=4, kind="keys", rank=5), by_curdkv),
    "curdkv values": (CurDKV(**SMALL, local=3, kind="values", rank=3, seed=7), by_curdkv),
    "knorm": (Knorm(**SMALL), by_knorm),
    "keydiff": (KeyDiff(**SMALL), by_keydiff),
    "kv-compress": (KVCompress(**SMALL, window=4, kernel=3), by_kvcompress),
    "kv-compress mean": (KVCompress(**SMALL, window=5, pooling="mean"), by_kvcompress),
    "kv-compress all": (KVCompress(**SMALL, window=0), by_kvcompress),
    "fastgen": (FastGen(**SMALL, recovery=0.7), by_fastgen),
    "fastgen frequent": (FastGen(**SMALL, recovery=0.75, first="frequent", sample=5), by_fastgen),
}
every = pytest.mark.parametrize("name", CASES)


@pytest.mark.defines("policies", "expected-attention")
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
def test_it_says_where_it_is_from(name):
    policy = CASES[name][0]
    assert policy.paper.startswith("arXiv:") and policy.summary and isinstance(policy, Policy)


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


# -- one by one


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
    "name", ["h2o", "h2o window", "h2o per query", "kv-compress all", "fastgen", "expected"]
)
def test_blocks_of_queries_change_nothing(name, monkeypatch):
    policy, context = CASES[name][0], evicted()
    whole = policy.score(context)
    monkeypatch.setattr(base, "BLOCK_ON_CPU", 2 * context.keys.shape[2] * 2 * HEADS * GROUPS)
    monkeypatch.setattr(base, "MIN_QUERIES", 1)
    monkeypatch.setattr(expected, "QUERY_BLOCK", 3)
    torch.testing.assert_close(policy.score(context), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["knorm", "curdkv", "curdkv keys", "h2o", "snapkv", "kv-compress", "tova"])
def test_scores_do_not_depend_on_where_a_text_begins(name):
    policy = CASES[name][0]
    torch.testing.assert_close(policy.score(build(start=40)), policy.score(build()), rtol=1e-4, atol=1e-5)


def test_expected_attention_does_not_depend_on_where_a_text_begins():
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


def test_expected_attention_asks_for_positions_that_follow_each_row():
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


def test_fastgen_climbs_as_far_as_a_head_needs():
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
