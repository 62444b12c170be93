"""What a whole cache keeps, against the definition of its policy.

The definitions are written out by hand from the attention of transformers' own eager model.
"""

from __future__ import annotations

import pico
import pytest
import torch
from pico import attached, prompt, stock
from torch.utils._python_dispatch import TorchDispatchMode

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.heads.scores import HeadScores
from lowkey.policies import base

LAYERS, HEADS, GROUP = 3, 4, 2


def kept_by(model, name, ids, budget, heads=None, **options):
    """Per row: {(layer, head, position)} after `lowkey.prefill`."""
    chosen = make_policy(name, budget, {k: str(v) for k, v in options.items()}).with_head_scores(heads or {})
    cache = lowkey.make_cache(model, policy=chosen)
    lowkey.prefill(model, pico.tokenizer(), cache, ids)
    return [
        {
            (i, j, p)
            for i in range(LAYERS)
            for j, at in enumerate(cache.kept_positions(i, row))
            for p in at.tolist()
        }
        for row in range(len(ids))
    ]


def highest(scores, count):
    """The places of the `count` highest scores (layers, heads, tokens)."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
    s = scores.shape[2]
    return {(i // s // HEADS, i // s % HEADS, i % s) for i in order}


@torch.no_grad()
def eager(ids):
    """Attention (layers, H, t, t) in double precision."""
    return torch.stack([a[0] for a in stock("llama")(ids, output_attentions=True).attentions]).double()


# -- KVzip


def resolve_request(ids, start, chunk, bridge, request):
    return torch.cat([ids, request, ids[:, max(0, start - bridge) : start + chunk]], 1)


@pytest.mark.defines("policies", "kvzip")
@pytest.mark.parametrize("softmax", ["piece", "context"])
def test_kvzip_keeps_what_repeating_each_piece_looks_at_most(softmax):
    """Every piece is asked for and repeated behind the whole context; a token's score is the largest weight
    that any repeated token or the request gives it, in any query head of its KV head, once weights are shares
    of the sinks, the piece and the repetition alone."""
    ids, chunk, bridge, sinks, n = prompt(70, batch=2), 30, 4, 3, 70
    kept = kept_by(
        attached("llama"),
        "kvzip",
        ids,
        "30%",
        chunk=chunk,
        bridge=bridge,
        sinks=sinks,
        recent=0,
        softmax=softmax,
    )
    request = pico.tokenizer()(
        "\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    for row in range(2):
        scores = torch.zeros(LAYERS, HEADS, n, dtype=torch.float64)
        for start in range(0, n, chunk):
            weights = eager(resolve_request(ids[row : row + 1], start, chunk, bridge, request))[:, :, n:]
            met = [p for p in range(n) if p < sinks or start <= p < start + chunk or softmax == "context"]
            share = weights[..., met] / (weights[..., met].sum(-1) + weights[..., n:].sum(-1)).unsqueeze(-1)
            top = share.amax(2).unflatten(1, (HEADS, GROUP)).amax(2)
            scores[..., met] = scores[..., met].maximum(top)
        scores[..., :sinks] = torch.inf
        assert kept[row] == highest(scores, round(0.3 * n * LAYERS * HEADS))


@pytest.mark.parametrize("softmax", ["piece", "context"])
def test_kvzip_finds_its_pieces_wherever_positions_begin(softmax):
    """Rotary attention is relative, so the same text from position 1000 on keeps the same tokens."""
    ids = 1 + torch.randperm(96, generator=torch.Generator().manual_seed(0))[:50].unsqueeze(0)  # no ties
    model, options = attached("llama"), {"chunk": "20", "sinks": "3", "recent": "0", "softmax": softmax}

    def kept(begins):
        def placed(module, args, known):
            at = (
                begins
                + known["past_key_values"].get_seq_length()
                + torch.arange(args[0].shape[1]).unsqueeze(0)
            )
            return args, known | {"position_ids": at}

        cache = lowkey.make_cache(model, policy=make_policy("kvzip", "30%", options))
        handle = model.register_forward_pre_hook(placed, with_kwargs=True)
        try:
            lowkey.prefill(model, pico.tokenizer(), cache, ids)
        finally:
            handle.remove()
        return [[(at - begins).tolist() for at in cache.kept_positions(i)] for i in range(LAYERS)]

    assert kept(1000) == kept(0)


# -- without a budget


@pytest.mark.defines("policies", "fastgen")
def test_fastgen_keeps_the_first_set_that_recovers_attention():
    """Recovery decides how much memory it becomes: always sinks and recent; then the newest 30 %; then the
    most looked at; then all.
    """
    n, sinks, recent, recovery, looked = 50, 2, 4, 0.45, 16
    ids = prompt(n)
    kept = kept_by(
        attached("llama"), "fastgen", ids, None, sinks=sinks, recent=recent, recovery=recovery, sample=looked
    )
    sizes = set()
    for row in range(2):
        # (layers, h, g, s)
        weights = eager(ids[row : row + 1]).unflatten(1, (HEADS, GROUP))[..., -looked:, :].mean(3)
        wanted = set()
        for i in range(LAYERS):
            for j in range(HEADS):
                always = {*range(sinks), *range(n - recent, n)}
                local = always | set(range(n - round(0.3 * n), n))
                order = weights[i, j].mean(0).argsort(descending=True).tolist()
                for rung in (always, local, local | set(order[: round(0.3 * n)]), set(range(n))):
                    if all(float(head[sorted(rung)].sum()) >= recovery for head in weights[i, j]):
                        break
                sizes.add(len(rung))
                wanted |= {(i, j, p) for p in rung}
        assert kept[row] == wanted
    assert len(sizes) >= 3, "heads stand on several rungs"


def test_fastgen_keeps_more_for_a_higher_recovery():
    ids = prompt(60, batch=1)
    sizes = [
        len(kept_by(attached("llama"), "fastgen", ids, None, recovery=t)[0]) for t in (0.0, 0.3, 0.5, 1.0)
    ]
    assert sizes[0] == 12 * LAYERS * HEADS < sizes[1] < sizes[2] < sizes[3] == 60 * LAYERS * HEADS


@pytest.mark.parametrize(
    ("name", "budget", "options"),
    [
        ("snapkv", None, {}),
        ("fastgen", None, {"allocator": "ada"}),
        ("snapkv", "10%", {"allocator": "at-least"}),
    ],
)
def test_a_budget_is_given_where_it_bounds_something(name, budget, options):
    with pytest.raises(LowkeyError, match="budget"):
        make_policy(name, budget, options)


def test_any_score_may_be_kept_above_a_level():
    ids = prompt(40, batch=1)
    kept = kept_by(
        attached("llama"), "snapkv", ids, None, allocator="at-least", score=0.05, kernel=1, window=8
    )[0]
    weights = eager(ids).unflatten(1, (HEADS, GROUP))[..., -8:, :].mean((2, 3))
    always = [p < 4 or p >= 32 for p in range(40)]
    assert kept == {
        (i, j, p)
        for i in range(LAYERS)
        for j in range(HEADS)
        for p in range(40)
        if always[p] or weights[i, j, p] >= 0.05
    }


def test_fastgen_with_a_budget_lets_all_heads_compete():
    """Nothing but the always kept recovers 99 % here, so every token is in its head's rung, and the most
    looked-at of the cache stay.
    """
    n, ids = 50, prompt(50, batch=1)
    kept = kept_by(attached("llama"), "fastgen", ids, "40%", sinks=2, recent=4, recovery=0.99, sample=16)[0]
    scores = eager(ids).unflatten(1, (HEADS, GROUP))[..., -16:, :].mean((2, 3))
    scores[..., [0, 1, *range(n - 4, n)]] = torch.inf
    assert kept == highest(scores, round(0.4 * n * LAYERS * HEADS))


# -- Razor


def test_razor_takes_the_best_heads_by_either_score():
    """The top 14 % by induction and the top 1 % by echo, at least one each; a KV head counts as its best
    query head does.
    """
    generator = torch.Generator().manual_seed(3)
    values = {
        kind: torch.rand(1, LAYERS, HEADS * GROUP, generator=generator).double()
        for kind in ("induction", "echo")
    }
    scores = {kind: scored(kind, v) for kind, v in values.items()}
    chosen = set()
    for kind, share in (("induction", 0.14), ("echo", 0.01)):
        best = {
            (i, j): max(float(values[kind][0, i, j * GROUP + g]) for g in range(GROUP))
            for i in range(LAYERS)
            for j in range(HEADS)
        }
        chosen |= set(sorted(best, key=lambda at: -best[at])[: max(1, round(share * LAYERS * HEADS))])
    split = (
        make_policy("razor", "50%", {})
        .with_head_scores({kind: s.per_kv_head().tolist() for kind, s in scores.items()})
        .resolved_allocator()
    )
    assert {(i, j) for i in range(LAYERS) for j in range(HEADS) if split.importance[i][j]} == chosen and len(
        chosen
    ) == 3


def scored(kind, values):
    about = {
        "task": "repetition",
        "drawn": 1,
        "model": "",
        "model_sha256": "",
        "data_sha256": "",
        "seed": 0,
        "settings": {},
    }
    return HeadScores(kind=kind, values=values, layers=tuple(range(LAYERS)), kv_heads=HEADS, **about)


@pytest.mark.defines("policies", "razor")
def test_razors_other_heads_keep_sinks_and_the_newest():
    ids, n = prompt(60, batch=1), 60
    heads = {
        "induction": [[9.0, 1, 1, 1], [1, 1, 8.0, 1], [1, 1, 1, 1]],
        "echo": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 7.0, 1, 1]],
    }
    kept = kept_by(attached("llama"), "razor", ids, "50%", heads, sinks=3, recent=4)[0]
    retrieval = {(0, 0), (1, 2), (2, 1)}
    assert all({p for i, j, p in kept if (i, j) == at} == set(range(n)) for at in retrieval)
    others = [(i, j) for i in range(LAYERS) for j in range(HEADS) if (i, j) not in retrieval]
    left = 0.5 * n * LAYERS * HEADS - 3 * n
    for at in others:
        own = sorted(p for i, j, p in kept if (i, j) == at)
        assert abs(len(own) - left / len(others)) < 1 and own == [0, 1, 2, *range(n - len(own) + 3, n)]


# -- every other policy, from the prompt to what each head holds

N, SINKS, RECENT = 50, 2, 3
PROTECTED = {*range(SINKS), *range(N - RECENT, N)}
IMPORTANCE = {
    "copy": [[1.0, 2.0, 0.5, 5.0]] * 3,
    "r2": [[4.0, 1.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0], [3.0, 0.5, 1.0, 1.0]],
}


def by_window(weights, power=1):
    """Attention of the last eight queries to each prompt token, the largest of the seven around it; to the
    window's own, as it is.
    """
    looked = (weights[..., -8:, :] ** power).sum((2, 3))
    out = looked.clone()
    for p in range(N - 8):
        out[..., p] = looked[..., max(0, p - 3) : min(N - 8, p + 4)].amax(-1)
    return out


def by_leverage(keys, values):
    out = []
    for x in (keys, values):
        norms = (x**2).sum(-1)
        out.append(torch.cat([part / part.sum(-1, keepdim=True) for part in norms.split(16, -1)], -1))
    both = out[0] * out[1]
    return both / both.sum(-1, keepdim=True)


def by_difference(keys):
    unit = keys / keys.norm(dim=-1, keepdim=True)
    anchor = unit.mean(2, keepdim=True)
    return -(unit * anchor).sum(-1) / anchor.norm(dim=-1)


def by_loss(weights, values):
    """What the outputs of the last eight queries lose with each token."""
    p, v = weights[..., -8:, :], values[:, :, None]
    change = v[:, :, :, None] - (p @ v).unsqueeze(-2)
    return ((p / (1 - p)) ** 2 * (change**2).sum(-1)).sum((2, 3)) / GROUP


def by_redundancy(weights, keys):
    """A tenth of the largest weight of any head, less nine tenths of how much a key is like the others."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    alike = (unit @ unit.mT - torch.eye(N)).sum(-1) / (N - 1)
    return 0.1 * weights[..., -8:, :].amax(2).mean(2) - 0.9 * alike.softmax(-1)


def by_chance():
    x = torch.arange(N) + 0x9E3779B1 * torch.arange(HEADS).view(-1, 1)
    x = (x + 0x85EBCA77 * torch.arange(LAYERS).view(-1, 1, 1)) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = torch.tensor([int(y) * factor % 2**32 for y in (x ^ (x >> shift)).flatten()]).view(x.shape)
    return ((x ^ (x >> 16)) >> 8).double()


SCORED = {
    "dropkv": lambda w, k, v: by_loss(w, v),
    "r-kv": lambda w, k, v: by_redundancy(w, k),
    "random": lambda w, k, v: by_chance(),
    "streamingllm": lambda w, k, v: torch.arange(N).double().expand(LAYERS, HEADS, N),
    "tova": lambda w, k, v: w[..., -1, :].mean((1, 2))[:, None].expand(-1, HEADS, -1),
    "h2o": lambda w, k, v: w.sum(3).mean(2),
    "snapkv": lambda w, k, v: by_window(w),
    "kv-compress": lambda w, k, v: by_window(w, 2),
    "curdkv": lambda w, k, v: by_leverage(k, v),
    "knorm": lambda w, k, v: -k.norm(dim=-1),
    "keydiff": lambda w, k, v: by_difference(k),
}
SAME = {
    "pyramidkv": "snapkv",
    "ada-kv": "snapkv",
    "headkv-r": "snapkv",
    "headkv-r2": "snapkv",
    "think": "snapkv",
    "ada-curdkv": "curdkv",
}


def equal(scores, mean):
    return torch.full((LAYERS, HEADS), mean)


def sloping(scores, mean):
    """Beyond what is protected, from 2b - b/20 in the first layer to b/20 in the last."""
    b = mean - len(PROTECTED)
    return len(PROTECTED) + torch.tensor([2 * b - b / 20, b, b / 20]).unsqueeze(1).expand(-1, HEADS)


def competing(scores, mean):
    """Each layer's best over all heads, and a fifth dealt equally."""
    order = [s.flatten().argsort(descending=True, stable=True)[: int(mean * HEADS)].tolist() for s in scores]
    best = torch.tensor([[sum(at // N == j for at in chosen) for j in range(HEADS)] for chosen in order])
    return 0.8 * best + 0.2 * mean


def by_importance(kind):
    def shares(scores, mean):
        """A part 1 / 1.2 of what is not protected goes by importance; what a head cannot take goes to the
        others by theirs.
        """
        weight, free = torch.tensor(IMPORTANCE[kind]).double().flatten(), mean - len(PROTECTED)
        floor, pool = len(PROTECTED) + free - free / 1.2, free / 1.2 * LAYERS * HEADS
        full = torch.zeros(LAYERS * HEADS, dtype=torch.bool)
        for _ in range(LAYERS * HEADS):
            counts = floor + weight / weight[~full].sum() * (pool - (N - floor) * int(full.sum()))
            full = full | (counts > N)
        return counts.where(~full, float(N)).view(LAYERS, HEADS)

    return shares


SHARED = {
    "pyramidkv": sloping,
    "ada-kv": competing,
    "ada-curdkv": competing,
    "headkv-r": by_importance("copy"),
    "headkv-r2": by_importance("r2"),
    "kv-compress": None,
}


@pytest.mark.defines("policies", *SCORED, *SAME)
@pytest.mark.parametrize("name", [*SCORED, *SAME])
def test_what_each_head_keeps_is_its_best_tokens_in_its_share(name):
    ids = prompt(N, batch=1, seed=7)
    kept = kept_by(attached("llama"), name, ids, "40%", IMPORTANCE, sinks=SINKS, recent=RECENT)[0]
    with torch.no_grad():
        layers = stock("llama")(ids, use_cache=True).past_key_values.layers
    keys, values = (
        torch.stack([getattr(x, part)[0] for x in layers]).double() for part in ("keys", "values")
    )
    scores = SCORED[SAME.get(name, name)](eager(ids).unflatten(1, (HEADS, GROUP)), keys, values).clone()
    scores[..., sorted(PROTECTED)] = torch.inf
    held = {(i, j): {p for a, b, p in kept if (a, b) == (i, j)} for i in range(LAYERS) for j in range(HEADS)}
    for (i, j), own in held.items():
        assert own == set(scores[i, j].sort(descending=True, stable=True).indices[: len(own)].tolist())
    counts = torch.tensor([[len(held[i, j]) for j in range(HEADS)] for i in range(LAYERS)])
    mean = 0.4 * N * (1.25 if name == "think" else 1)
    if name == "kv-compress":  # whole blocks of 16, of which the best fit
        assert all((c - len(PROTECTED)) % 16 == 0 or c == N for c in counts.flatten().tolist())
        last = torch.stack(
            [
                scores[i, j].sort(descending=True).values[len(own) - 1]
                for (i, j), own in held.items()
                if len(own) > 5
            ]
        )
        assert mean * 12 - 16 < counts.sum() <= mean * 12
        assert float(last.min()) >= max(
            float(scores[i, j].sort(descending=True).values[20])
            for (i, j), own in held.items()
            if len(own) == 5
        )
    else:
        assert counts.sum() == mean * LAYERS * HEADS
        assert bool(((counts - SHARED.get(name, equal)(scores, mean)).abs() < 1 + 1e-6).all())


# -- memory


class Largest(TorchDispatchMode):
    """The most numbers that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(x.numel() for x in given if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {}),
        ("kv-compress", {"window": 0}),
        ("fastgen", {"sample": 800}),
        ("snapkv", {"window": 800}),
        ("kvzip", {"chunk": 400}),
    ],
)
def test_no_full_attention_matrix_is_formed(name, options, monkeypatch):
    """For all heads; a mask of booleans for one is what transformers makes."""
    monkeypatch.setattr(base, "BLOCK_ON_CPU", 2**17)
    ids = prompt(800, batch=1)
    with Largest() as seen:
        kept_by(attached("llama"), name, ids, "10%", **options)
    assert seen.numel < 800 * 1300 < HEADS * GROUP * 800 * 800 / 4
