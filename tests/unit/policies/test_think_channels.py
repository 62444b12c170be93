"""ThinK by hand: which channels of which tokens are dropped, row by row, and what is read afterwards."""

from __future__ import annotations

import pico
import pytest
import torch
from pico import attached, prompt, stock

import lowkey
from lowkey.catalog import make_policy

LAYERS, HEADS = 3, 4


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
        model,
        policy=make_policy(
            "think", budget, {"recent": "4", "sinks": "2"} | {k: str(v) for k, v in options.items()}
        ),
    )
    return model, cache, spied(cache)


def strongest(queries, keys, count):
    """The channels c with the largest sum of q_c^2 times sum of k_c^2; queries (g, n, d), keys (m, d)."""
    worth = [
        sum(float(q[c]) ** 2 for q in queries.flatten(0, 1)) * sum(float(k[c]) ** 2 for k in keys)
        for c in range(queries.shape[-1])
    ]
    return sorted(sorted(range(len(worth)), key=lambda c: -worth[c])[:count])


def pruned(cache, i, row, j):
    """{position: channels} of the tokens of one head that lost some."""
    layer = cache.evicting[i]
    a, b = layer.pruned_starts[row * HEADS + j : row * HEADS + j + 2].tolist()
    held = layer._channels_of(layer.pruned_positions, layer.pruned_starts)[a:b].tolist()
    return dict(zip(layer.pruned_positions[a:b].tolist(), held, strict=True))


@pytest.mark.defines("policies", "think")
@pytest.mark.parametrize("pads", [[0, 0], [0, 17], [50, 0]])
def test_think_drops_the_channels_used_least(pads):
    n, looked = 60, 12
    model, cache, seen = thinking(looked=looked)
    pico.feed(model, prompt(n), cache, pads)
    for i, ((query, keys),) in enumerate(seen):
        for row, pad in enumerate(pads):
            tokens = n - pad
            for j, kept in enumerate(cache.kept_positions(i, row)):
                old = [p for p in kept.tolist() if p < tokens - 4]
                wanted = strongest(
                    query[row, j, :, max(pad, n - looked) :],
                    keys[row, j, [p + pad for p in old]],
                    round(0.6 * 16),
                )
                assert pruned(cache, i, row, j) == dict.fromkeys(old, wanted)


def test_think_answers_a_row_as_if_it_were_alone():
    """A row of seven tokens, fewer than the recent ones, beside one of sixty; then both go on."""
    ids, more, pads = prompt(60), prompt(5, seed=3), [53, 0]
    model, both, _ = thinking(recent=16, looked=32)
    together = torch.cat([pico.feed(model, ids, both, pads), pico.feed(model, more, both, pads)], 1)
    for row, pad in enumerate(pads):
        _, alone, _ = thinking(recent=16, looked=32)
        own = torch.cat(
            [pico.feed(model, ids[row : row + 1, pad:], alone), pico.feed(model, more[row : row + 1], alone)],
            1,
        )
        assert torch.allclose(together[row, pad:], own[0], atol=1e-4)
        for i in range(LAYERS):
            assert [p.tolist() for p in both.kept_positions(i, row)] == [
                p.tolist() for p in alone.kept_positions(i)
            ]
            assert [pruned(both, i, row, j) for j in range(HEADS)] == [
                pruned(alone, i, 0, j) for j in range(HEADS)
            ]


def test_think_chooses_channels_anew_for_what_comes_later():
    """A first chunk of nine tokens does not settle the channels of the next eighty, and each keeps the
    channels that it was left.
    """
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
            assert {p: held[p] for p in new} == dict.fromkeys(
                new, strongest(log[1][0][0, j, :, -8:], keys[0, j, new], 10)
            )
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
    assert all(layer.pruned_entries == layer.prunings == 0 for layer in cache.evicting)
    assert torch.allclose(ours, pico.feed(stock("llama"), prompt(60)), atol=1e-4)


def test_think_goes_on_with_its_channels_while_it_decodes():
    """Queries of few steps choose no channels where many chose before; the newest tokens stay whole at every
    step.
    """
    model, cache, _ = thinking(looked=16, every=1)
    pico.feed(model, prompt(60), cache)
    pico.feed(model, prompt(20, seed=4), cache, splits=[1] * 20)
    assert all(layer.prunings == 1 for layer in cache.evicting)
    for layer in cache.evicting:
        assert layer.pruned_until.tolist() == [[76], [76]] and layer.rows_starts.diff().tolist() == [4] * 8
    assert cache.nbytes() == cache.predicted_nbytes()


def test_a_row_that_fits_is_left_whole_beside_one_that_does_not():
    model, cache, _ = thinking("50 tokens")
    pico.feed(model, prompt(80), cache, [50, 0])
    for i in range(LAYERS):
        assert not any(pruned(cache, i, 0, j) for j in range(HEADS))
        assert [len(pruned(cache, i, 1, j)) for j in range(HEADS)] == [46] * HEADS


def test_channels_that_few_queries_chose_are_not_used_again():
    """Nine queries where sixteen are asked for: the next nine choose for themselves; nine after twenty do
    not.
    """
    for first, prunings in ((9, 2), (20, 1)):
        model, cache, _ = thinking("60%", looked=16)
        pico.feed(model, prompt(first), cache)
        pico.feed(model, prompt(9, seed=2), cache)
        assert [layer.prunings for layer in cache.evicting] == [prunings] * LAYERS
