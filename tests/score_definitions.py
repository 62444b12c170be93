"""The scores of eviction policies, as loops that define them."""

from __future__ import annotations

import math

import torch
from policy_contexts import DIM, HEADS, SMALL

from lowkey.policies.attention_matching import AttentionMatching
from lowkey.policies.curdkv import CurDKV
from lowkey.policies.dropkv import DropKV
from lowkey.policies.expected import ExpectedAttention
from lowkey.policies.fast_kvzip import FastKVzip
from lowkey.policies.fastgen import FastGen
from lowkey.policies.h2o import H2O
from lowkey.policies.keydiff import KeyDiff
from lowkey.policies.knorm import Knorm
from lowkey.policies.kvcompress import KVCompress
from lowkey.policies.random import Random
from lowkey.policies.rkv import RKV
from lowkey.policies.snapkv import SnapKV
from lowkey.policies.streaming import StreamingLLM
from lowkey.policies.tova import TOVA
from lowkey.policies.triattention import TriAttention
from lowkey.policies.zipvl import ZipVL


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
    """SnapKV: mean attention of the newest queries, pooled."""

    def score(i, j):
        weights, real = attention(context, i, j, policy.window)
        return around(policy, context, i, j, weights.sum((0, 1)) / (max(real, 1) * len(weights)))

    return each(context, score)


def by_largest(policy, context):
    """SnapKV's other aggregations: the largest weight, pooled; `defensive` lifts it to the prompt's mean."""

    def score(i, j):
        weights, _ = attention(context, i, j, policy.window)
        pooled = around(policy, context, i, j, weights.amax((0, 1)))
        looking = context.query_positions[i, -policy.window :]
        first, at = max(0, int(looking.min())), context.positions[i, j].tolist()
        prompt = [t for t, p in enumerate(at) if context.valid[i, j, t] and p < first]
        if policy.aggregation == "defensive" and prompt:
            mean = sum(pooled[t] for t in prompt) / len(prompt)
            pooled = [max(x, mean) if t in prompt else x for t, x in enumerate(pooled)]
        return pooled

    return each(context, score)


def by_centres(policy, context):
    """TriAttention: every distance and every pair by itself, from the key before its rotation."""
    centre, norms = (context.gates[name].double() for name in ("centre", "norms"))
    half = context.rope(torch.zeros(1, 1, dtype=torch.long), context.keys)[0].shape[-1] // 2
    steps = [2**i for i in range(policy.reach.bit_length())]

    def angles(position):
        cos, sin = (
            x[0, 0, 0, :half].double() for x in context.rope(torch.tensor([[position]]), context.keys)
        )
        return torch.atan2(sin, cos), float(torch.hypot(cos, sin)[0])

    def pairs(x):
        return torch.complex(x[:half].double(), x[half : 2 * half].double())

    def score(i, j):
        there = context.valid[i, j].nonzero().flatten().tolist()
        newest = max(
            int(context.positions[i, h, t]) for h in range(HEADS) for t in there if context.valid[i, h, t]
        )
        at, raw = (
            context.positions[i, j].tolist(),
            torch.zeros(context.queries.shape[2], len(context.valid[i, j])),
        )
        for g in range(len(raw)):
            q, size = pairs(centre[j, g]), norms[j, g]
            for t in there:
                turned, factor = angles(at[t])
                key = pairs(context.keys[i, j, t])
                plain = torch.polar(key.abs() / factor, key.angle() - turned)
                rest = context.keys[i, j, t, 2 * half :].double()
                total = float(rest @ centre[j, g, 2 * half :])
                for step in steps:
                    later, _ = angles(newest + step)
                    shift = later - turned + q.angle() - plain.angle()
                    total += float((q.abs() * plain.abs() * shift.cos()).sum()) * factor**2 / len(steps)
                total += float(((size[:half] - q.abs()) * plain.abs()).sum()) * factor**2
                total += float(((size[half:] - centre[j, g, 2 * half :].abs()) * rest.abs()).sum())
                raw[g, t] = total
        known = raw[:, there]
        normal = (raw - known.mean(1, keepdim=True)) / known.std(1, keepdim=True, unbiased=False)
        return normal.amax(0) if policy.aggregation == "max" else normal.mean(0)

    return each(context, score)


def by_sink_gate(policy, context):
    """Fast KVzip: the softmax of each small query over its own key and 16 sinks, token by token."""
    gate = {name: t.double() for name, t in context.gates.items()}
    new = context.queries.shape[3]
    first = context.keys.shape[2] - new

    def plain(x, position):
        cos, sin = (t[0, 0, 0].double() for t in context.rope(torch.tensor([[position]]), context.keys))
        p, out = len(cos), x.double().clone()
        factor = cos**2 + sin**2
        a, b = x[: p // 2].double(), x[p // 2 : p].double()
        out[: p // 2] = (a * cos[: p // 2] + b * sin[: p // 2]) / factor[: p // 2]
        out[p // 2 : p] = (b * cos[p // 2 :] - a * sin[p // 2 :]) / factor[p // 2 :]
        return out

    def normal(x, weight):
        return x / ((x**2).mean() + 1e-6).sqrt() * weight

    def score(i, j):
        out = context.previous_scores[i, j].double().clone()
        for t in range(first, len(out)):
            at = max(0, int(context.query_positions[i, t - first]))
            queries = [plain(q, at) for head in context.queries[i, :, :, t - first] for q in head]
            keys = [plain(context.keys[i, h, t], at) for h in range(HEADS)]
            x = torch.cat([*queries, *keys, *context.values[i, :, t].double()])
            k, shares = normal(gate["key"][j] @ x + gate["key_bias"][j], gate["key_norm"]), []
            for g in range(context.queries.shape[2]):
                q = normal(gate["query"][j, g] @ x + gate["query_bias"][j, g], gate["query_norm"])
                own = float(q @ k) / 4 + float(gate["bias"][j, g])
                logits = torch.tensor(
                    [own, *(float(q @ s) / 4 for s in gate["sinks"][j])], dtype=torch.float64
                )
                shares.append(float(logits.softmax(0)[0]))
            out[t] = sum(shares) / len(shares)
        return out

    return each(context, score)


def by_dropkv(policy, context):
    """DropKV: attention is taken again without the token."""

    def score(i, j):
        weights, _ = attention(context, i, j, policy.window or 10**6)
        values, out = context.values[i, j].double(), [0.0] * context.keys.shape[2]
        for head in weights:
            for row in head:
                whole = row @ values
                for t in row.nonzero().flatten().tolist():
                    others = row.clone()
                    others[t] = 0.0
                    if float(others.sum()) > 0:
                        change = others @ values / others.sum() - whole
                        out[t] += float(change @ change) / len(weights)
        return out

    return each(context, score)


def by_redundancy(policy, context):
    """R-KV: the largest weight of any head, less how much the key is like all others."""

    def score(i, j):
        weights, real = attention(context, i, j, policy.window)
        there = context.valid[i, j].nonzero().flatten().tolist()
        keys, alike = context.keys[i, j].double(), {}
        for t in there:
            cosines = [float(keys[t] @ keys[o] / keys[t].norm() / keys[o].norm()) for o in there if o != t]
            alike[t] = math.exp(sum(cosines) / max(1, len(cosines)))
        out = [0.0] * context.keys.shape[2]
        for t in there:
            looked = sum(float(weights[:, q, t].max()) for q in range(weights.shape[1])) / max(1, real)
            out[t] = policy.weight * looked - (1 - policy.weight) * alike[t] / sum(alike.values())
        return out

    return each(context, score)


def mixed_bits(x):
    """A 32-bit integer, mixed."""
    x %= 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def by_probes(policy, context):
    """ZipVL: the attention of the newest and of some drawn queries, over how many of them could pay it."""

    def row(i):
        real = sorted(int(p) for p in context.query_positions[i] if p >= 0)
        newest = max(1, round(len(real) * policy.newest_probes))
        others = sorted(real[:-newest], key=lambda p: mixed_bits(p + 0xC2B2AE3D * policy.seed))
        probes = {*real[-newest:], *others[: round(len(real) * policy.random_probes)]}
        paid = {}
        for j in range(HEADS):
            weights, _ = attention(context, i, j, 10**6)
            for q, p in enumerate(context.query_positions[i].tolist()):
                for t in context.valid[i, j].nonzero().flatten().tolist() if p in probes else ():
                    at = int(context.positions[i, j, t])
                    paid[at] = paid.get(at, 0.0) + float(weights[:, q, t].sum())
        return paid, probes if policy.divisor == "probes" else real

    rows = [row(i) for i in range(len(context.keys))]

    def score(i, j):
        paid, queries = rows[i]
        return [
            paid.get(at, 0.0) / max(1, sum(q >= at for q in queries))
            for at in context.positions[i, j].tolist()
        ]

    return each(context, score)


def by_chance(policy, context):
    """Random: integers that are mixed one by one."""

    def mixed(head, position):
        x = position + 0x9E3779B1 * head + 0x85EBCA77 * context.layer + 0xC2B2AE3D * policy.seed
        return mixed_bits(x) // 256 / 2**24

    return each(context, lambda i, j: [mixed(j, p) for p in context.positions[i, j].tolist()])


def by_position(policy, context):
    """StreamingLLM: newer tokens score higher."""
    return context.positions.double()


def by_tova(policy, context):
    """TOVA: attention of the newest query, averaged over all heads."""

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
    """H2O: attention summed over all queries, or over a window of them."""

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
    """Expected attention: softmax of the logits of Gaussian queries, times the norm of the value."""

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
    """CurDKV: leverage scores of keys, of values, or their product."""

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


def by_matching(policy, context):
    """Attention Matching: the root of the mean squared attention of all queries."""

    def score(i, j):
        weights, real = attention(context, i, j, 10**6)
        return ((weights**2).sum((0, 1)) / (max(real, 1) * len(weights))).sqrt()

    return each(context, score)


def by_knorm(policy, context):
    """The negative norm of the key."""
    return each(
        context, lambda i, j: [-math.sqrt(sum(x * x for x in key)) for key in context.keys[i, j].tolist()]
    )


def by_keydiff(policy, context):
    """KeyDiff: the negative cosine to the mean key."""

    def score(i, j):
        unit = [key / key.norm() if float(key.norm()) else key for key in context.keys[i, j].double()]
        anchor = sum(u for u, there in zip(unit, context.valid[i, j], strict=True) if there)
        return [-float(u @ anchor / anchor.norm()) for u in unit]

    return each(context, score)


def by_kvcompress(policy, context):
    """KV-Compress: squared attention, summed over queries and pooled."""

    def score(i, j):
        squares = (attention(context, i, j, policy.window or 10**6)[0] ** 2).sum((0, 1))
        return context.previous_scores[i, j].double() + torch.tensor(
            around(policy, context, i, j, squares), dtype=torch.float64
        )

    return each(context, score)


def by_fastgen(policy, context):
    """FastGen: the smallest set of kinds of tokens that recovers the attention of a head."""

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
    "snapkv largest": (SnapKV(**SMALL, window=4, kernel=3, aggregation="max"), by_largest),
    "snapkv defensive": (SnapKV(**SMALL, window=3, kernel=5, aggregation="defensive"), by_largest),
    "dropkv": (DropKV(**SMALL, window=5), by_dropkv),
    "dropkv all": (DropKV(**SMALL, window=0), by_dropkv),
    "r-kv": (RKV(**SMALL, window=5), by_redundancy),
    "r-kv by attention": (RKV(**SMALL, window=99, weight=0.9), by_redundancy),
    "triattention": (TriAttention(**SMALL, reach=16), by_centres),
    "triattention mean": (TriAttention(**SMALL, reach=1, aggregation="mean"), by_centres),
    "fast-kvzip": (FastKVzip(**SMALL), by_sink_gate),
    "zipvl": (ZipVL(**SMALL), by_probes),
    "zipvl many probes": (ZipVL(**SMALL, newest_probes=0.2, random_probes=0.4, seed=3), by_probes),
    "zipvl causal": (ZipVL(**SMALL, newest_probes=0.0, random_probes=0.3, divisor="causal"), by_probes),
    "zipvl all": (ZipVL(**SMALL, newest_probes=1.0, random_probes=1.0), by_probes),
    "attention-matching": (AttentionMatching(**SMALL, queries="prompt"), by_matching),
    "random": (Random(**SMALL), by_chance),
    "random seeded": (Random(**SMALL, seed=2**31 - 1), by_chance),
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
