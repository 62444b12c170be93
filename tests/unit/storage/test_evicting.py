"""Decoding over an evicting cache is attention over what it kept; its bytes and positions."""

from __future__ import annotations

import itertools

import pico
import pytest
import torch
from evicting_caches import LENGTH, PADS, evicting_cache, lengths, made, policy, record
from pico import attached, feed, generate, prompt, real, stock

import lowkey
from lowkey.core.types import LAYOUTS, LowkeyError
from lowkey.policies import POLICIES, SnapKV, policy_to_dict

ALLOCATORS = ["uniform", "pyramid", "ada", "global", "blocks"]
FED = [name for name in POLICIES if name not in pico.UNFED]


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


# -- nothing evicted


@pytest.mark.parametrize("name", pico.NAMES)
def test_a_full_budget_gives_stock_logits(name):
    """Prompt in two chunks, then steps; padded rows."""
    ids, model = prompt(40), attached(name)
    ours = feed(model, ids, evicting_cache(model, SnapKV("100%")), PADS, [20, 7, *[1] * 13])
    close(real(ours, PADS), real(feed(stock(name), ids, pads=PADS), PADS), 1e-5)


@pytest.mark.parametrize(("name", "layout"), list(zip(pico.NAMES, itertools.cycle(LAYOUTS))))
def test_a_full_budget_on_full_rank_decodes_the_stock_tokens(name, layout):
    ids, model = prompt(20), attached(name)
    ours = generate(model, ids, 40, evicting_cache(model, SnapKV("100%"), layout), PADS)
    assert torch.equal(ours, generate(stock(name), ids, 40, pads=PADS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_budget_on_low_rank_is_low_rank_alone(layout):
    ids, model = prompt(40), attached("llama")
    ours = feed(model, ids, evicting_cache(model, SnapKV("100%"), layout, (6, 9)), PADS, [30, *[1] * 10])
    theirs = feed(
        model, ids, pico.lowrank(model, pico.layer_factors(model, 6, 9), layout), PADS, [30, *[1] * 10]
    )
    close(real(ours, PADS), real(theirs, PADS))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_at_a_full_budget_keeps_everything(name):
    ids, model = prompt(30), attached("llama")
    cache = evicting_cache(model, policy(name, "100%"))
    close(
        real(feed(model, ids, cache, PADS, [20, *[1] * 10]), PADS),
        real(feed(stock("llama"), ids, pads=PADS), PADS),
        1e-5,
    )


# -- the dense masked definition


def masked_attention(keys, values, query, kept, scaling):
    """keys, values (h, s, d), query (h, g, d) of one step; kept: per head the token indices it may see."""
    out = torch.zeros(*query.shape)
    for j, index in enumerate(kept):
        weights = (query[j] @ keys[j, index].mT * scaling).softmax(-1)
        out[j] = weights @ values[j, index]
    return out


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_decoding_is_attention_over_what_each_head_kept(allocator, layout):
    """The layer against a dense copy of everything it was ever given, with a mask; two rows, one padded,
    heads of unequal length.
    """
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("20%", allocator, sinks=1, recent=2), layout, (16, 16))
    seen = record(cache)
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 10, *[1] * 10])
    assert len({tuple(x) for x in lengths(cache, 0)}) > 1 or allocator == "uniform"
    for layer, log in zip(cache.evicting, seen, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2) for k in (0, 1))
        call, out = log[-1][2:]
        for row, pads in enumerate(PADS):
            kept = [p + pads for p in layer.kept_positions(row)]
            close(
                out[row, :, :, 0],
                masked_attention(keys[row], values[row], call.query[row, :, :, 0], kept, call.scaling),
            )


def test_a_long_question_attends_to_what_was_kept():
    """200 tokens at once equal the same tokens one by one, when nothing is evicted in between."""
    model, context, question = attached("llama"), prompt(LENGTH), prompt(200, seed=1)
    once, slowly = (evicting_cache(model, SnapKV("20%", "ada")) for _ in range(2))
    for cache in (once, slowly):
        feed(model, context, cache, PADS)
        cache.freeze()
    close(feed(model, question, once, PADS), feed(model, question, slowly, PADS, [1] * 200))


# -- bytes and positions


@pytest.mark.parametrize("budget", ["12%", "25%", "50%"])
@pytest.mark.parametrize("name", FED)
def test_held_is_predicted_and_the_budget_is_spent(name, budget):
    model = attached("llama")
    cache = evicting_cache(model, policy(name, budget))
    feed(model, prompt(LENGTH), cache, PADS)
    # of the tokens: 60 % of their key channels stay
    share = float(budget[:-1]) / 100 * (1.25 if name == "think" else 1)
    for row, pads in enumerate(PADS):
        wanted = share * (LENGTH - pads) * 4 * 3  # heads, layers
        total = sum(map(sum, lengths(cache, row)))
        chunks = 4 * 3 * 15 if name.startswith("chunk") else 1  # a chunk leaves as a whole
        least = wanted - (16 if "blocks" in str(policy_to_dict(cache.evicting[0].policy)) else chunks)
        assert least <= total <= wanted + 1
    assert cache.nbytes() == cache.predicted_nbytes()
    feed(model, prompt(1, seed=3), cache, PADS)
    assert cache.nbytes() == cache.predicted_nbytes()


def test_what_is_dropped_is_really_gone():
    model = attached("llama-mha")
    held = {}
    for budget in ("100%", "12%"):
        cache = evicting_cache(model, SnapKV(budget, "ada"))
        feed(model, prompt(400), cache)
        held[budget] = cache.nbytes()
    assert held["12%"] < 0.13 * held["100%"]


@pytest.mark.parametrize("name", FED)
def test_padding_takes_no_slot(name):
    model = attached("llama")
    cache = evicting_cache(model, policy(name, "25%"))
    feed(model, prompt(LENGTH), cache, [60, 0])
    for layer in cache.evicting:
        assert all(
            p.min() >= 0 and p.max() < LENGTH - 60 and len(p.unique()) == len(p)
            for p in layer.kept_positions(0)
        )


@pytest.mark.parametrize("name", FED)
def test_sinks_and_recent_tokens_stay_in_rows_of_any_length(name):
    model = attached("llama")
    cache = evicting_cache(model, policy(name, "2%", sinks=3, recent=5))
    feed(model, prompt(LENGTH), cache, [LENGTH - 6, 0])
    for layer in cache.evicting:
        assert all(p.tolist() == list(range(6)) for p in layer.kept_positions(0)), "6 tokens, 8 protected"
        for p in layer.kept_positions(1):
            assert {0, 1, 2, *range(LENGTH - 5, LENGTH)} <= set(p.tolist())


def test_positions_continue_at_tokens_seen():
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("20%"))
    feed(model, prompt(60), cache, PADS)
    assert cache.get_seq_length() == 60
    feed(model, prompt(3, seed=1), cache, PADS, [1, 1, 1])
    assert [p.tolist()[-3:] for p in cache.kept_positions(1, 0)] == [[53, 54, 55]] * 4
    assert [p.tolist()[-3:] for p in cache.kept_positions(1, 1)] == [[60, 61, 62]] * 4


def test_nothing_stored_is_ever_overwritten():
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("30%", "ada"))
    feed(model, prompt(60), cache)
    layer = cache.evicting[0]
    before = layer.rows_keys.clone()
    feed(model, prompt(30, seed=1), cache, None, [1] * 30)
    layer.make_compact()
    assert torch.equal(layer.rows_keys, before) and layer.keys.shape[2] == 30


# -- layers that do more


def test_dropped_channels_are_gone_and_the_newest_tokens_whole():
    model = attached("llama")
    held = {}
    for channels in (1.0, 0.5):
        cache = evicting_cache(model, policy("think", "100 tokens", channels=channels, recent=32))
        feed(model, prompt(300), cache)
        held[channels] = sum(layer.rows_keys.nbytes + layer.pruned_k.nbytes for layer in cache.evicting)
        assert cache.nbytes() == cache.predicted_nbytes()
    assert all(
        layer.pruned_k.shape[1] == 8 and layer.rows_starts.diff().tolist() == [32] * 8
        for layer in cache.evicting
    )
    assert held[0.5] == (32 + 0.5 * 68) / 100 * held[1.0]


@pytest.mark.parametrize(("budget", "width"), [("80%", 0.6 * 16), ("90%", 0.8 * 16), ("95%", 0.9 * 16)])
def test_a_budget_that_channels_can_pay_keeps_every_token(budget, width):
    """Values, half of the bytes, stay whole, as do the 8 newest tokens; no more channels go than must."""
    model = attached("llama")
    cache = evicting_cache(model, policy("think", budget))
    feed(model, prompt(100), cache)
    assert lengths(cache, 0) == [[100] * 4] * 3
    kept = round(width)
    for layer in cache.evicting:
        assert (layer.prunings, layer.pending, layer.pruned_k.shape) == (1, None, (2 * 4 * 92, kept))
    # two sequences of 3 layers of 4 heads, of 16 numbers of 4 bytes each, with a position of 4 bytes
    numbers = 2 * 3 * 4 * (92 * (kept + 16) + 8 * 32)
    indices = 3 * (2 * (2 * 4 + 1) * 8 + 2 * 2 * 8 + 2 * (4 * kept * 2 + 4) + 2)
    assert cache.nbytes() == cache.predicted_nbytes() == 4 * (numbers + 2 * 3 * 4 * 100) + indices
    assert numbers <= (float(budget[:-1]) / 100 + 0.03) * 2 * 3 * 4 * 100 * 32


@pytest.mark.parametrize("budget", ["110 KiB", "160 KiB"])
def test_bytes_that_hold_every_pruned_token_are_kept_to(budget):
    """A full cache takes 180 KiB; with 3 of 5 key channels every token fits into 160 KiB."""
    cache = evicting_cache(attached("llama"), policy("think", budget))
    feed(attached("llama"), prompt(60), cache)
    assert cache.nbytes() <= float(budget.split()[0]) * 1024 and cache.evicting[0].prunings == 1


def test_decoding_over_pruned_channels_attends_with_zeros():
    model = attached("llama")
    cache = evicting_cache(model, policy("think", "40%", recent=4))
    seen = record(cache)
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 6, *[1] * 6])
    for layer, log in zip(cache.evicting, seen, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2) for k in (0, 1))
        call, out = log[-1][2:]
        layer.make_compact()
        whole = layer.keys.shape[2] + 4
        assert layer.prunings == 1 and layer.keys.shape[2] == 6
        for row, pads in enumerate(PADS):
            pruned = torch.zeros_like(keys[row])
            index = layer.kept_channels[row, 0].long().unsqueeze(1).expand(-1, LENGTH, -1)
            pruned.scatter_(2, index, keys[row].gather(2, index))
            pruned[:, LENGTH - whole :] = keys[row, :, LENGTH - whole :]
            kept = [p + pads for p in layer.kept_positions(row)]
            close(
                out[row, :, :, 0],
                masked_attention(pruned, values[row], call.query[row, :, :, 0], kept, call.scaling),
            )


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_one_token_stands_for_all_that_were_dropped(layout):
    """Softmax over the kept tokens and the mean of the dropped, whose weight counts as often as tokens were
    dropped; over two evictions. At full rank a plan stores what the model made, rotated or not.
    """
    model = attached("llama")
    cache = evicting_cache(model, policy("razor", "55%"), layout)
    seen = record(cache)
    feed(model, prompt(LENGTH), cache, None, [60, LENGTH - 62, 1, 1])
    assert any(bool((layer.dropped == 0).any()) for layer in cache.evicting), "some heads drop nothing"
    assert all(bool(layer.dropped.any()) for layer in cache.evicting)
    for layer, log in zip(cache.evicting, seen, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2)[0] for k in (0, 1))
        call, out = log[-1][2:]
        for j, kept in enumerate(layer.kept_positions(0)):
            gone = torch.tensor(sorted(set(range(LENGTH)) - set(kept.tolist())), dtype=torch.long)
            some_k, some_v = (
                [x[j, kept], *([x[j, gone].mean(0, keepdim=True)] if len(gone) else [])]
                for x in (keys, values)
            )
            k, v = torch.cat(some_k), torch.cat(some_v)
            scores = call.query[0, j, :, 0] @ k.mT * call.scaling
            if len(gone):
                scores[:, -1] += torch.tensor(float(len(gone))).log()
            close(out[0, j, :, 0], scores.softmax(-1) @ v)


def zipped(model, ids, budget, question=0, **options):
    cache = lowkey.make_cache(model, policy=policy("kvzip", budget, **options))
    lowkey.prefill(model, pico.tokenizer(), cache, ids, question)
    return cache


def test_repeating_the_context_scores_it_and_stores_nothing():
    model, ids = attached("llama"), prompt(80, batch=1)
    cache = zipped(model, ids, "25%", chunk=30)
    assert cache.get_seq_length() == 80 and cache.nbytes() == cache.predicted_nbytes()
    assert sum(map(sum, lengths(cache, 0))) == 0.25 * 80 * 12
    again = zipped(model, ids, "25%", chunk=30)
    assert all(
        torch.equal(a, b) for a, b in zip(cache.kept_positions(1), again.kept_positions(1), strict=True)
    )


def test_a_repeated_context_keeps_what_it_attended_to_most():
    """By hand: the largest weight of each token under the repetition's queries, fed over a full cache."""
    model, ids = attached("llama"), prompt(60, batch=1)
    cache = zipped(model, ids, "25%", chunk=60, bridge=0, sinks=0, recent=0)
    asking = pico.tokenizer()(
        policy("kvzip", "25%").prompt, add_special_tokens=False, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        found = stock("llama")(torch.cat([ids, asking, ids], 1), output_attentions=True).attentions
    # (layers, h, s)
    scores = torch.stack([a[0, :, 60:, :60].amax(1).unflatten(0, (4, 2)).amax(1) for a in found])
    best = scores.flatten().topk(scores.numel() // 4).indices.tolist()
    ours = [
        (i * 4 + j) * 60 + p
        for i in range(3)
        for j, kept in enumerate(cache.kept_positions(i))
        for p in kept.tolist()
    ]
    assert sorted(best) == sorted(ours)


def test_a_context_that_was_not_repeated_is_not_evicted():
    with pytest.raises(LowkeyError, match=r"lowkey\.prefill"):
        feed(attached("llama"), prompt(60), made(policy("kvzip", "25%")))
