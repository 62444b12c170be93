"""What a whole cache keeps, against the policy's definition written out by hand from the attention of transformers' own eager model."""

from __future__ import annotations

import pico
import pytest
import torch
from pico import attached, prompt, stock
from torch.utils._python_dispatch import TorchDispatchMode

import lowkey
from lowkey.heads import HeadScores
from lowkey.loading import make_policy
from lowkey.policies import base
from lowkey.types import LowkeyError

LAYERS, HEADS, GROUP = 3, 4, 2


def kept_by(model, name, ids, budget, heads=None, **options):
    """Per row: {(layer, head, position)} after `lowkey.prefill`."""
    chosen = make_policy(name, budget, {k: str(v) for k, v in options.items()}).fitted(heads or {})
    cache = lowkey.make_cache(model, policy=chosen)
    lowkey.prefill(model, pico.tokenizer(), cache, ids)
    return [
        {(i, j, p) for i in range(LAYERS) for j, at in enumerate(cache.kept_positions(i, row)) for p in at.tolist()}
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


def asked_for(ids, start, chunk, bridge, request):
    return torch.cat([ids, request, ids[:, max(0, start - bridge) : start + chunk]], 1)


@pytest.mark.parametrize("softmax", ["piece", "context"])
def test_kvzip_keeps_what_repeating_each_piece_looks_at_most(softmax):
    """Every piece is asked for and repeated behind the whole context; a token's score is the largest weight that any repeated token or the
    request gives it, in any query head of its KV head, once weights are shares of the sinks, the piece and the repetition alone."""
    ids, chunk, bridge, sinks, n = prompt(70, batch=2), 30, 4, 3, 70
    kept = kept_by(attached("llama"), "kvzip", ids, "30%", chunk=chunk, bridge=bridge, sinks=sinks, recent=0, softmax=softmax)
    request = pico.tokenizer()("\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False, return_tensors="pt").input_ids
    for row in range(2):
        scores = torch.zeros(LAYERS, HEADS, n, dtype=torch.float64)
        for start in range(0, n, chunk):
            weights = eager(asked_for(ids[row : row + 1], start, chunk, bridge, request))[:, :, n:]
            met = [p for p in range(n) if p < sinks or start <= p < start + chunk or softmax == "context"]
            share = weights[..., met] / (weights[..., met].sum(-1) + weights[..., n:].sum(-1)).unsqueeze(-1)
            top = share.amax(2).unflatten(1, (HEADS, GROUP)).amax(2)
            scores[..., met] = scores[..., met].maximum(top)
        scores[..., :sinks] = torch.inf
        assert kept[row] == highest(scores, round(0.3 * n * LAYERS * HEADS))


# -- ThinK


def spied(cache):
    """What every layer is given: [(query (b, h, g, t, d), keys (b, h, t, d))]."""
    logs = []
    for layer in cache.evicting:
        log, attend = [], layer.attend

        def spy(keys, values, call, log=log, attend=attend):
            log.append((call.query.double(), keys.double()))
            return attend(keys, values, call)

        layer.attend = spy
        logs.append(log)
    return logs


def thinking(budget="40%", **options):
    model = attached("llama")
    cache = lowkey.make_cache(
        model, policy=make_policy("think", budget, {"recent": "4", "sinks": "2"} | {k: str(v) for k, v in options.items()})
    )
    return model, cache, spied(cache)


def strongest(queries, keys, count):
    """The channels c with the largest sum of q_c^2 times sum of k_c^2; queries (g, n, d), keys (m, d)."""
    worth = [sum(float(q[c]) ** 2 for q in queries.flatten(0, 1)) * sum(float(k[c]) ** 2 for k in keys) for c in range(queries.shape[-1])]
    return sorted(sorted(range(len(worth)), key=lambda c: -worth[c])[:count])


def pruned(cache, i, row, j):
    """{position: channels} of the tokens of one head that lost some."""
    layer = cache.evicting[i]
    a, b = layer.thin_starts[row * HEADS + j : row * HEADS + j + 2].tolist()
    held = layer._channels_of(layer.thin_where, layer.thin_starts)[a:b].tolist()
    return dict(zip(layer.thin_where[a:b].tolist(), held, strict=True))


@pytest.mark.parametrize("pads", [[0, 0], [0, 17], [50, 0]])
def test_think_drops_the_channels_that_queries_and_kept_keys_use_least(pads):
    n, looked = 60, 12
    model, cache, seen = thinking(looked=looked)
    pico.feed(model, prompt(n), cache, pads)
    for i, ((query, keys),) in enumerate(seen):
        for row, pad in enumerate(pads):
            tokens = n - pad
            for j, kept in enumerate(cache.kept_positions(i, row)):
                old = [p for p in kept.tolist() if p < tokens - 4]
                wanted = strongest(query[row, j, :, max(pad, n - looked) :], keys[row, j, [p + pad for p in old]], round(0.6 * 16))
                assert pruned(cache, i, row, j) == dict.fromkeys(old, wanted)


def test_think_answers_a_row_as_if_it_were_alone():
    """A row of seven tokens, fewer than the recent ones, beside one of sixty; then both go on."""
    ids, more, pads = prompt(60), prompt(5, seed=3), [53, 0]
    model, both, _ = thinking(recent=16, looked=32)
    together = torch.cat([pico.feed(model, ids, both, pads), pico.feed(model, more, both, pads)], 1)
    for row, pad in enumerate(pads):
        _, alone, _ = thinking(recent=16, looked=32)
        own = torch.cat([pico.feed(model, ids[row : row + 1, pad:], alone), pico.feed(model, more[row : row + 1], alone)], 1)
        assert torch.allclose(together[row, pad:], own[0], atol=1e-4)
        for i in range(LAYERS):
            assert [p.tolist() for p in both.kept_positions(i, row)] == [p.tolist() for p in alone.kept_positions(i)]
            assert [pruned(both, i, row, j) for j in range(HEADS)] == [pruned(alone, i, 0, j) for j in range(HEADS)]


def test_think_chooses_channels_anew_for_what_comes_later():
    """A first chunk of nine tokens does not settle the channels of the next eighty, and each keeps the channels that it was left."""
    model, cache, seen = thinking(budget="50%", looked=8)
    ids = prompt(89, batch=1)
    pico.feed(model, ids[:, :9], cache)
    first = [[pruned(cache, i, 0, j) for j in range(HEADS)] for i in range(LAYERS)]
    pico.feed(model, ids[:, 9:], cache)
    assert any(first[i][j] for i in range(LAYERS) for j in range(HEADS))
    for i, log in enumerate(seen):
        keys = torch.cat([k for _, k in log], 2)
        for j, kept in enumerate(cache.kept_positions(i)):
            held, new = pruned(cache, i, 0, j), [p for p in kept.tolist() if 5 <= p < 85]
            assert {p: held[p] for p in held if p < 5} == {p: c for p, c in first[i][j].items() if p in held}
            assert {p: held[p] for p in new} == dict.fromkeys(new, strongest(log[1][0][0, j, :, -8:], keys[0, j, new], 10))
    assert cache.nbytes() == cache.predicted_nbytes()


def test_think_decodes_over_keys_with_zeros_where_channels_went():
    """Two prunings and a frozen question: the last step of every layer, by hand."""
    model, cache, _ = thinking(budget="50%", looked=8)
    logs = []
    for layer in cache.evicting:
        log, attend = [], layer.attend

        def spy(keys, values, call, log=log, attend=attend):
            log.append((keys, values, call, attend(keys, values, call)))
            return log[-1][3]

        layer.attend = spy
        logs.append(log)
    for piece, frozen in ((40, False), (30, False), (20, True), (1, True)):
        cache.freeze(frozen)
        pico.feed(model, prompt(piece, batch=1, seed=piece), cache)
    for i, log in enumerate(logs):
        keys, values = (torch.cat([entry[k] for entry in log], 2)[0].double() for k in (0, 1))
        call, out = log[-1][2:]
        for j, kept in enumerate(cache.kept_positions(i)):
            held = pruned(cache, i, 0, j)
            assert max(held) < 66 and set(range(66, 91)) <= set(kept.tolist()), (
                "what came while frozen is whole, and so are the recent ones"
            )
            read = keys[j].clone()
            for p, channels in held.items():
                read[p, [c for c in range(16) if c not in channels]] = 0
            weights = (call.query[0, j, :, 0].double() @ read[kept].mT * call.scaling).softmax(-1)
            assert torch.allclose(out[0, j, :, 0].double(), weights @ values[j, kept], atol=1e-5)


@pytest.mark.parametrize("budget", ["1 GiB", "1 MiB/token", "100 tokens", "100%"])
def test_think_drops_nothing_where_everything_fits(budget):
    model, cache, _ = thinking(budget)
    ours = pico.feed(model, prompt(60), cache, splits=[50, *[1] * 10])
    assert all(layer.thin == layer.prunings == 0 for layer in cache.evicting)
    assert torch.allclose(ours, pico.feed(stock("llama"), prompt(60)), atol=1e-4)


def test_think_goes_on_with_its_channels_while_it_decodes():
    """Queries of few steps choose no channels where many chose before; the newest tokens stay whole at every step."""
    model, cache, _ = thinking(looked=16, every=1)
    pico.feed(model, prompt(60), cache)
    pico.feed(model, prompt(20, seed=4), cache, splits=[1] * 20)
    assert all(layer.prunings == 1 for layer in cache.evicting)
    for layer in cache.evicting:
        assert layer.until.tolist() == [[76], [76]] and layer.starts.diff().tolist() == [4] * 8
    assert cache.nbytes() == cache.predicted_nbytes()


# -- without a budget


def test_fastgen_without_a_budget_keeps_the_rung_that_recovers_each_heads_attention():
    """Recovery decides how much memory it becomes: always sinks and recent; then the newest 30 %; then the most looked at; then all."""
    n, sinks, recent, recovery, looked = 50, 2, 4, 0.45, 16
    ids = prompt(n)
    kept = kept_by(attached("llama"), "fastgen", ids, None, sinks=sinks, recent=recent, recovery=recovery, sample=looked)
    sizes = set()
    for row in range(2):
        weights = eager(ids[row : row + 1]).unflatten(1, (HEADS, GROUP))[..., -looked:, :].mean(3)  # (layers, h, g, s)
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


def test_recovery_decides_the_memory():
    ids = prompt(60, batch=1)
    sizes = [len(kept_by(attached("llama"), "fastgen", ids, None, recovery=t)[0]) for t in (0.0, 0.3, 0.5, 1.0)]
    assert sizes[0] == 12 * LAYERS * HEADS < sizes[1] < sizes[2] < sizes[3] == 60 * LAYERS * HEADS


@pytest.mark.parametrize(
    ("name", "budget", "options"),
    [("snapkv", None, {}), ("fastgen", None, {"allocator": "ada"}), ("snapkv", "10%", {"allocator": "at-least"})],
)
def test_a_budget_is_given_where_it_bounds_something(name, budget, options):
    with pytest.raises(LowkeyError, match="budget"):
        make_policy(name, budget, options)


def test_any_score_may_be_kept_above_a_level():
    ids = prompt(40, batch=1)
    kept = kept_by(attached("llama"), "snapkv", ids, None, allocator="at-least", score=0.05, kernel=1, window=8)[0]
    weights = eager(ids).unflatten(1, (HEADS, GROUP))[..., -8:, :].mean((2, 3))
    always = [p < 4 or p >= 32 for p in range(40)]
    assert kept == {(i, j, p) for i in range(LAYERS) for j in range(HEADS) for p in range(40) if always[p] or weights[i, j, p] >= 0.05}


# -- Razor


def test_razors_retrieval_heads_are_the_best_by_either_score_in_any_head_of_their_group():
    """The top 14 % by induction and the top 1 % by echo, at least one each; a KV head counts as its best query head does."""
    generator = torch.Generator().manual_seed(3)
    values = {kind: torch.rand(1, LAYERS, HEADS * GROUP, generator=generator).double() for kind in ("induction", "echo")}
    scores = {kind: scored(kind, v) for kind, v in values.items()}
    chosen = set()
    for kind, share in (("induction", 0.14), ("echo", 0.01)):
        best = {(i, j): max(float(values[kind][0, i, j * GROUP + g]) for g in range(GROUP)) for i in range(LAYERS) for j in range(HEADS)}
        chosen |= set(sorted(best, key=lambda at: -best[at])[: max(1, round(share * LAYERS * HEADS))])
    split = make_policy("razor", "50%", {}).fitted({kind: s.per_kv_head().tolist() for kind, s in scores.items()}).split()
    assert {(i, j) for i in range(LAYERS) for j in range(HEADS) if split.importance[i][j]} == chosen and len(chosen) == 3


def scored(kind, values):
    about = {"task": "repetition", "drawn": 1, "model": "", "model_sha256": "", "data_sha256": "", "seed": 0, "settings": {}}
    return HeadScores(kind=kind, values=values, layers=tuple(range(LAYERS)), kv_heads=HEADS, **about)


def test_razors_other_heads_keep_sinks_and_the_newest():
    ids, n = prompt(60, batch=1), 60
    heads = {"induction": [[9.0, 1, 1, 1], [1, 1, 8.0, 1], [1, 1, 1, 1]], "echo": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 7.0, 1, 1]]}
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
IMPORTANCE = {"copy": [[1.0, 2.0, 0.5, 5.0]] * 3, "r2": [[4.0, 1.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0], [3.0, 0.5, 1.0, 1.0]]}


def by_window(weights, power=1):
    """Attention of the last eight queries to each prompt token, the largest of the seven around it; to the window's own, as it is."""
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


SCORED = {
    "streamingllm": lambda w, k, v: torch.arange(N).double().expand(LAYERS, HEADS, N),
    "tova": lambda w, k, v: w[..., -1, :].mean((1, 2))[:, None].expand(-1, HEADS, -1),
    "h2o": lambda w, k, v: w.sum(3).mean(2),
    "snapkv": lambda w, k, v: by_window(w),
    "kv-compress": lambda w, k, v: by_window(w, 2),
    "curdkv": lambda w, k, v: by_leverage(k, v),
    "knorm": lambda w, k, v: -k.norm(dim=-1),
    "keydiff": lambda w, k, v: by_difference(k),
}
SAME = {"pyramidkv": "snapkv", "ada-kv": "snapkv", "headkv-r": "snapkv", "headkv-r2": "snapkv", "think": "snapkv", "ada-curdkv": "curdkv"}


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
        """A part 1 / 1.2 of what is not protected goes by importance; what a head cannot take goes to the others by theirs."""
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


@pytest.mark.parametrize("name", [*SCORED, *SAME])
def test_what_each_head_keeps_is_its_best_tokens_in_its_share(name):
    ids = prompt(N, batch=1, seed=7)
    kept = kept_by(attached("llama"), name, ids, "40%", IMPORTANCE, sinks=SINKS, recent=RECENT)[0]
    with torch.no_grad():
        layers = stock("llama")(ids, use_cache=True).past_key_values.layers
    keys, values = (torch.stack([getattr(x, part)[0] for x in layers]).double() for part in ("keys", "values"))
    scores = SCORED[SAME.get(name, name)](eager(ids).unflatten(1, (HEADS, GROUP)), keys, values).clone()
    scores[..., sorted(PROTECTED)] = torch.inf
    held = {(i, j): {p for a, b, p in kept if (a, b) == (i, j)} for i in range(LAYERS) for j in range(HEADS)}
    for (i, j), own in held.items():
        assert own == set(scores[i, j].sort(descending=True, stable=True).indices[: len(own)].tolist())
    counts = torch.tensor([[len(held[i, j]) for j in range(HEADS)] for i in range(LAYERS)])
    mean = 0.4 * N * (1.25 if name == "think" else 1)
    if name == "kv-compress":  # whole blocks of 16, of which the best fit
        assert all((c - len(PROTECTED)) % 16 == 0 or c == N for c in counts.flatten().tolist())
        last = torch.stack([scores[i, j].sort(descending=True).values[len(own) - 1] for (i, j), own in held.items() if len(own) > 5])
        assert mean * 12 - 16 < counts.sum() <= mean * 12
        assert float(last.min()) >= max(
            float(scores[i, j].sort(descending=True).values[20]) for (i, j), own in held.items() if len(own) == 5
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
    [("h2o", {}), ("kv-compress", {"window": 0}), ("fastgen", {"sample": 800}), ("snapkv", {"window": 800}), ("kvzip", {"chunk": 400})],
)
def test_no_matrix_of_prompt_by_prompt_is_formed(name, options, monkeypatch):
    """For all heads; a mask of booleans for one is what transformers makes."""
    monkeypatch.setattr(base, "CACHED", 2**17)
    ids = prompt(800, batch=1)
    with Largest() as seen:
        kept_by(attached("llama"), name, ids, "10%", **options)
    assert seen.numel < 800 * 1300 < HEADS * GROUP * 800 * 800 / 4
