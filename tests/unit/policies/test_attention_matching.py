"""Attention Matching by hand: the biases and values that kept tokens get, and what is read with them."""

from __future__ import annotations

import math

import numpy as np
import pico
import pytest
import torch
from pico import attached, prompt

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.ops.least_squares import bounded_least_squares
from lowkey.ops.matching_pursuit import pursued

HEADS, SINKS, RECENT = 4, 2, 3
SMALL = {"sinks": SINKS, "recent": RECENT, "allocator": "uniform"}


def matching(model, budget="40%", **options):
    made = make_policy("attention-matching", budget, {k: str(v) for k, v in (SMALL | options).items()})
    return lowkey.make_cache(model, policy=made)


def spied(cache):
    """What every layer is given, call by call: [(query (b, h, g, t, d), keys, values (b, h, t, d), call)]."""
    logs = []
    for layer in cache.evicting:
        log, attend = [], layer.attend

        def spy(keys, values, call, log=log, attend=attend):
            log.append((call.query.double().numpy(), keys.double().numpy(), values.double().numpy(), call))
            return attend(keys, values, call)

        layer.attend = spy
        logs.append(log)
    return logs


# -- the definition, for one KV head of one sequence


def shares(queries, keys, bias, seen, call):
    """Attention (q, s) of queries (q, d): the softmax of capped, scaled and biased products."""
    logits = queries @ keys.T * call.scaling + bias
    if call.softcap is not None:
        logits = call.softcap * np.tanh(logits / call.softcap)
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


def bounded(rows, wanted, pull, bound):
    """min |rows w - wanted|^2 + pull |w - 1|^2 with |log w| <= bound, one unknown after another."""
    gram, target = rows.T @ rows + pull * np.eye(rows.shape[1]), rows.T @ wanted + pull
    w = np.ones(rows.shape[1])
    for _ in range(20000):
        before = w.copy()
        for i in range(len(w)):
            rest = target[i] - gram[i] @ w + gram[i, i] * w[i]
            w[i] = min(max(rest / gram[i, i], math.exp(-bound)), math.exp(bound))
        if np.abs(w - before).max() < 1e-12:
            break
    return w


def pursuit(a, y, allowed, count, bound, ridge):
    """Orthogonal matching pursuit: which of the columns of `a` (q, s) are taken for `y` (q)."""
    pull, taken, x = ridge * (a[:, allowed] ** 2).sum() / allowed.sum(), [], np.zeros(0)
    while len(taken) < count:
        products = a.T @ (y - a[:, taken] @ x)
        products[~allowed] = products[taken] = -np.inf
        taken.append(int(products.argmax()))
        rows = np.vstack([a[:, taken], math.sqrt(pull) * np.eye(len(taken))])
        wanted = np.concatenate([y, math.sqrt(pull) * np.ones(len(taken))])
        x = np.linalg.lstsq(rows, wanted, rcond=None)[0].clip(math.exp(-bound), math.exp(bound))
    return taken


def by_hand(queries, keys, values, bias, seen, kept, call, fixed, bound=3.0, ridge=1e-3, way="highest"):
    """(scores (s), biases (s), values (s, d)) of one head, given which tokens `kept` (s) and `fixed` (s).

    Args:
        queries: (q, d), the references.
        keys: (s, d).
        values: (s, d).
        bias: (s), of the tokens so far.
        seen: (q, s), which token each query sees.
        kept: how many tokens stay.
        call: scaling and soft cap.
        fixed: (s), tokens that stay as they are.
        bound: of what is added to a bias.
        ridge: of both problems.
        way: which tokens stay, `highest` or `pursuit`.
    """
    a = shares(queries, keys, bias, seen, call)
    scores = np.sqrt((a**2).mean(0))
    order = np.argsort(-np.where(fixed, np.inf, scores), kind="stable")[:kept]
    if way == "pursuit":
        order = pursuit(a, 1 - a[:, fixed].sum(1), ~fixed, kept - fixed.sum(), bound, ridge)
    stays = fixed.copy()
    stays[order] = True
    free = stays & ~fixed
    # masses: what the free tokens lack beside the fixed ones
    pull = ridge * (a[:, free] ** 2).sum() / free.sum()
    new_bias = bias.copy()
    new_bias[free] += np.log(bounded(a[:, free], 1 - a[:, fixed].sum(1), pull, bound))
    # values: the outputs of all tokens, by the weights of those that stay; ridge rows pull to the old values
    x = shares(queries, keys, new_bias, seen & stays, call)
    pull = ridge * (x[:, free] ** 2).sum() / free.sum()
    rows = np.vstack([x[:, free], math.sqrt(pull) * np.eye(free.sum())])
    wanted = np.vstack([a @ values - x[:, fixed] @ values[fixed], math.sqrt(pull) * values[free]])
    new_values = values.copy()
    new_values[free] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return stays, new_bias, new_values


def held(layer, row, j):
    """{position: (bias, value)} of the tokens of one head in rows."""
    a, b = layer.rows_starts[row * HEADS + j : row * HEADS + j + 2].tolist()
    rows, scaling = layer.rows, layer.empty_call.scaling
    bias = rows.keys[0][a:b, 0, -1].double().numpy() * scaling
    return dict(
        zip(
            rows.positions[a:b].tolist(),
            zip(bias, rows.values[0][a:b, 0].double().numpy(), strict=True),
            strict=True,
        )
    )


def agrees(got, stays, bias, values):
    """Whether a head holds what the definition says."""
    assert sorted(got) == np.flatnonzero(stays).tolist()
    for p, (own_bias, own_value) in got.items():
        assert abs(own_bias - bias[p]) < 2e-3
        assert np.abs(own_value - values[p]).max() < 2e-3 * max(1.0, np.abs(values[p]).max())


@pytest.mark.parametrize(("name", "pads"), [("llama", [0, 0]), ("llama", [0, 17]), ("gemma2", [4, 0])])
def test_the_prompts_own_queries_choose_and_fit(name, pads):
    """Every query of the prompt is a reference, over the tokens before it; soft caps come after the bias."""
    n, model = 48, attached(name)
    cache = matching(model, queries="prompt")
    logs = spied(cache)
    pico.feed(model, prompt(n), cache, pads)
    for layer, log in zip(cache.evicting, logs, strict=True):
        query, keys, values, call = log[0]
        for row, pad in enumerate(pads):
            m = n - pad
            at = np.arange(m)
            fixed = (at < SINKS) | (at >= m - RECENT)
            for j in range(HEADS):
                g = query.shape[2]
                queries = query[row, j, :, pad:].reshape(g * m, -1)
                seen = np.tile(at[:, None] >= at, (g, 1))
                got = held(layer, row, j)
                wanted = by_hand(
                    queries,
                    keys[row, j, pad:],
                    values[row, j, pad:],
                    np.zeros(m),
                    seen,
                    len(got),
                    call,
                    fixed,
                )
                agrees(got, *wanted)


@pytest.mark.defines("policies", "attention-matching")
@pytest.mark.parametrize(("references", "way"), [(1024, "highest"), (7, "highest"), (1024, "pursuit")])
def test_the_queries_of_a_second_pass_choose_and_fit(references, way):
    """Pieces are repeated behind the context; the queries of each, request and bridge included, see all of
    it, and every so many of them are references."""
    n, chunk, model, ids = 50, 20, attached("llama"), prompt(50, batch=1)
    told = {"chunk": chunk, "bridge": 4, "references": references, "bound": 1.0, "ridge": 0.01, "keys": way}
    cache = matching(model, "30%", **told)
    logs = spied(cache)
    lowkey.prefill(model, pico.tokenizer(), cache, ids)
    fixed, every = np.zeros(n, bool), -(-n // references)
    fixed[:SINKS] = fixed[n - RECENT :] = True
    for layer, log in zip(cache.evicting, logs, strict=True):
        (_, keys, values, call), pieces = log[0], log[1:]
        assert len(pieces) == 3
        for j in range(HEADS):
            queries = np.concatenate([q[0, j, :, ::every].reshape(-1, q.shape[-1]) for q, *_ in pieces])
            got = held(layer, 0, j)
            wanted = by_hand(
                queries,
                keys[0, j],
                values[0, j],
                np.zeros(n),
                np.ones((len(queries), n), bool),
                round(0.3 * n),
                call,
                fixed,
                bound=1.0,
                ridge=0.01,
                way=way,
            )
            agrees(got, *wanted)
            assert np.abs(wanted[1]).max() <= 1.0 + 1e-9


def test_a_second_turn_fits_again_what_was_fitted():
    """Rows go in with the biases and values that they have, and may get others."""
    n, more, model = 40, 16, attached("llama")
    cache = matching(model, "12 tokens", queries="prompt")
    logs = spied(cache)
    pico.feed(model, prompt(n, batch=1), cache, [0])
    before = [[held(layer, 0, j) for j in range(HEADS)] for layer in cache.evicting]
    pico.feed(model, prompt(more, batch=1, seed=1), cache, [0])
    for layer, log, olds in zip(cache.evicting, logs, before, strict=True):
        first, (query, keys, values, call) = log
        for j, old in enumerate(olds):
            at = np.array([*sorted(old), *range(n, n + more)])
            size = len(old)
            every = np.concatenate([first[1][0, j], keys[0, j]])
            new_values = np.concatenate([np.stack([old[p][1] for p in sorted(old)]), values[0, j]])
            bias = np.concatenate([[old[p][0] for p in sorted(old)], np.zeros(more)])
            queries = query[0, j].reshape(-1, every.shape[1])
            seen = np.tile(at[size:, None] >= at, (query.shape[2], 1))
            fixed = (at < SINKS) | (at >= n + more - RECENT)
            stays, own_bias, own_values = by_hand(queries, every[at], new_values, bias, seen, 12, call, fixed)
            got = held(layer, 0, j)
            assert sorted(got) == at[stays].tolist()
            place = {p: i for i, p in enumerate(at.tolist())}
            agrees({place[p]: x for p, x in got.items()}, stays, own_bias, own_values)
        assert any(bias for old in olds for bias, _ in old.values())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_comes_later_is_answered_with_the_biases(name, tokens):
    """Steps and a long turn, against attention over the rows and the new tokens, written out."""
    n, pads, model = 48, [0, 13], attached(name)
    cache = matching(model, queries="prompt")
    logs, outs = spied(cache), []
    pico.feed(model, prompt(n), cache, pads)
    cache.freeze()
    for layer in cache.evicting:
        attend = layer.attend

        def spy(keys, values, call, attend=attend):
            outs.append(attend(keys, values, call))
            return outs[-1]

        layer.attend = spy
    sizes = [1, 1, 1] if tokens == 1 else [tokens]
    pico.feed(model, prompt(sum(sizes), seed=5), cache, pads, sizes)
    for i, (layer, log) in enumerate(zip(cache.evicting, logs, strict=True)):
        query, _, _, call = log[-1]
        new_k, new_v = (np.concatenate([entry[part] for entry in log[1:]], 2) for part in (1, 2))
        t, came = query.shape[3], new_k.shape[2]
        got = outs[i - len(cache.evicting)].double().numpy()
        seen = np.concatenate([np.ones((t, 0), bool), np.tri(t, came, came - t, bool)], 1)
        for row, pad in enumerate(pads):
            for j in range(HEADS):
                own, at = held(layer, row, j), sorted(held(layer, row, j))
                keys = np.concatenate([log[0][1][row, j, [p + pad for p in at]], new_k[row, j]])
                values = np.concatenate([np.stack([own[p][1] for p in at]), new_v[row, j]])
                bias = np.concatenate([[own[p][0] for p in at], np.zeros(came)])
                sees = np.concatenate([np.ones((t, len(at)), bool), seen], 1)
                for k in range(query.shape[2]):
                    out = shares(query[row, j, k], keys, bias, sees, call) @ values
                    assert np.abs(out - got[row, j, k]).max() < 1e-4


def test_references_get_nearly_what_they_got_before():
    """The least-squares values, over the very queries they were fitted to."""
    n, model = 60, attached("llama")
    cache = matching(model, "30%", queries="prompt", sinks=0, recent=0, ridge=1e-6)
    logs = spied(cache)
    pico.feed(model, prompt(n, batch=1), cache, [0])
    for layer, log in zip(cache.evicting, logs, strict=True):
        query, keys, values, call = log[0]
        for j in range(HEADS):
            own = held(layer, 0, j)
            at = sorted(own)
            seen = np.tri(n, dtype=bool)
            errors = []
            for bias, kept in (
                (np.zeros(len(at)), values[0, j, at]),
                (np.array([own[p][0] for p in at]), np.stack([own[p][1] for p in at])),
            ):
                error = 0.0
                for q in query[0, j]:
                    wanted = shares(q, keys[0, j], np.zeros(n), seen, call) @ values[0, j]
                    got = shares(q, keys[0, j, at], bias, seen[:, at], call) @ kept
                    error += ((wanted - got) ** 2).sum()
                errors.append(error)
            assert errors[1] < 0.8 * errors[0]


# -- the solver


@pytest.mark.parametrize("seed", range(4))
def test_bounded_least_squares_solve_the_bounded_problem(seed):
    random = np.random.default_rng(seed)
    rows = random.random((30, 12)) ** 6
    rows[:, 3] = rows[:, 4]  # the data do not tell these apart
    rows[:, 5] = 0
    wanted = 1.5 * random.random(30)
    pull = 1e-3 * (rows**2).sum() / 12
    gram, target = (torch.from_numpy(x) for x in (rows.T @ rows, rows.T @ wanted))
    got = bounded_least_squares(gram, target, 1e-3, math.exp(-0.7), math.exp(0.7)).numpy()
    np.testing.assert_allclose(got, bounded(rows, wanted, pull, 0.7), atol=2e-4)
    assert len({*np.round(got, 6)} & {round(math.exp(-0.7), 6), round(math.exp(0.7), 6)}) > 0


def test_no_equations_leave_every_weight_at_one():
    assert bounded_least_squares(torch.zeros(3, 3), torch.zeros(3), 1e-3, 0.5, 2.0).tolist() == [1, 1, 1]


# -- matching pursuit


def test_pursuit_is_its_definition_for_many_problems_at_once():
    """Heads with other numbers to take, columns that may not be taken, and a head that takes all."""
    random = np.random.default_rng(0)
    a = random.random((4, 40, 14)) ** 4
    y = random.random((4, 40)) + 0.5
    allowed = random.random((4, 14)) < 0.8
    counts = [5, 1, 9, 14]
    got = pursued(
        torch.from_numpy(a.transpose(0, 2, 1) @ a),
        torch.from_numpy(np.einsum("nqs,nq->ns", a, y)),
        torch.from_numpy(allowed),
        torch.tensor(counts),
        1e-3,
        math.exp(-3),
        math.exp(3),
    )
    for i, count in enumerate(counts):
        wanted = pursuit(a[i], y[i], allowed[i], min(count, allowed[i].sum()), 3.0, 1e-3)
        assert np.flatnonzero(got[i].numpy()).tolist() == sorted(wanted)


def test_pursuit_takes_one_of_two_equal_columns():
    """The two largest columns are the same; the third has what both lack."""
    columns = torch.tensor([[1.0, 1.0, 0.0], [0.9, 0.9, 0.0], [0.0, 0.0, 0.5]]).double()
    gram, target = columns.mT @ columns, columns.mT @ torch.ones(3).double()
    got = pursued(gram[None], target[None], torch.ones(1, 3).bool(), torch.tensor([2]), 1e-3, 0.05, 20.0)
    assert got[0, :2].sum() == 1 and bool(got[0, 2])


# -- what it cannot work with


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda m, p: lowkey.make_cache(m, policy=p, bits=4), "packing in integers"),
        (lambda m, p: lowkey.make_cache(m, pico.plan(m), p), "plan of method"),
    ],
)
def test_bits_and_ranks_are_refused_in_one_line(made, says):
    policy = make_policy("attention-matching", "50%", {})
    with pytest.raises(LowkeyError, match=says) as error:
        made(attached("llama"), policy)
    assert "holds a bias beside each of the model's own keys" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_its_second_pass_it_says_what_to_do():
    cache = matching(attached("llama"), "20 tokens")
    with pytest.raises(LowkeyError, match=r"lowkey\.prefill.*queries=prompt"):
        pico.feed(attached("llama"), prompt(40), cache, [0, 0])
    assert cache.nbytes() == 0


@pytest.mark.parametrize(
    ("option", "value"), [("references", 0), ("bound", 0), ("ridge", 0), ("queries", "no"), ("keys", "best")]
)
def test_options_out_of_their_range_are_refused(option, value):
    with pytest.raises(LowkeyError, match=option):
        make_policy("attention-matching", "50%", {option: str(value)})
