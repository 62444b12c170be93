"""What an evicting cache promises: the dense masked definition, bytes, positions, turns, files."""

from __future__ import annotations

import copy
import itertools

import forging
import pico
import pytest
import torch
from pico import attached, feed, generate, prompt, real, stock

import lowkey
from lowkey.cache.cache import EVICTING_LAYERS, cache_of
from lowkey.catalog import make_policy
from lowkey.core.types import LAYOUTS, LowkeyError
from lowkey.models import families
from lowkey.policies import POLICIES, SnapKV, policy_from_dict, policy_to_dict
from lowkey.storage import evicting
from lowkey.storage.cache_wide_eviction import CacheWideEviction
from lowkey.storage.codec import LowRank

PADS = [7, 0]
LENGTH = 120
ALLOCATORS = ["uniform", "pyramid", "ada", "global", "blocks"]
FED = [name for name in POLICIES if name != "kvzip"]  # it wants lowkey.prefill
HEADS = {kind: [[1.0, 2.0, 0.0, 5.0]] * 3 for kind in ("copy", "r2", "er", "mass", "induction", "echo")}


def evicting_cache(model, policy, layout=None, ranks=(pico.HEAD_DIM, pico.HEAD_DIM)):
    full = families.geometry(model).compressible
    cache_eviction, maps = CacheWideEviction(len(full)), pico.layer_factors(model, *ranks) if layout else {}

    def build(i):
        rope = families.rope(model, i)
        return EVICTING_LAYERS[policy.layer](
            policy, rope, full.index(i), cache_eviction, LowRank(maps[i], layout, rope) if layout else None
        )

    return cache_of(model, build)


def policy(name, budget, **options):
    return make_policy(name, budget, {k: str(v) for k, v in options.items()}).with_head_scores(HEADS)


def lengths(cache, row):
    return [[len(p) for p in layer.kept_positions(row)] for layer in cache.evicting]


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


def record(cache):
    """Per layer, everything `attend` is given and gives: (keys, values, call, out)."""
    logs = []
    for layer in cache.evicting:
        log, attend = [], layer.attend

        def spy(keys, values, call, log=log, attend=attend):
            out = attend(keys, values, call)
            log.append((keys, values, call, out))
            return out

        layer.attend = spy
        logs.append(log)
    return logs


def test_a_long_question_over_an_evicted_cache_sees_what_was_kept():
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
        least = wanted - 16 if "blocks" in str(policy_to_dict(cache.evicting[0].policy)) else wanted - 1
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
def test_sinks_and_recent_tokens_stay_and_short_rows_are_not_emptied(name):
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
    before = layer.keys.clone()
    feed(model, prompt(30, seed=1), cache, None, [1] * 30)
    assert torch.equal(layer.keys, before) and layer.tail_length == 30


# -- layers that do more


def test_dropped_channels_are_gone_and_the_newest_tokens_whole():
    model = attached("llama")
    held = {}
    for channels in (1.0, 0.5):
        cache = evicting_cache(model, policy("think", "100 tokens", channels=channels, recent=32))
        feed(model, prompt(300), cache)
        held[channels] = sum(layer.keys.nbytes + layer.pruned_k.nbytes for layer in cache.evicting)
        assert cache.nbytes() == cache.predicted_nbytes()
    assert all(
        layer.pruned_k.shape[1] == 8 and layer.starts.diff().tolist() == [32] * 8 for layer in cache.evicting
    )
    assert held[0.5] == (32 + 0.5 * 68) / 100 * held[1.0]


@pytest.mark.parametrize(("budget", "width"), [("80%", 0.6 * 16), ("90%", 0.8 * 16), ("95%", 0.9 * 16)])
def test_a_budget_that_channels_can_pay_keeps_every_token(budget, width):
    """Values, half of the bytes, stay whole, and no more channels go than must."""
    model = attached("llama")
    cache = evicting_cache(model, policy("think", budget))
    feed(model, prompt(100), cache)
    assert lengths(cache, 0) == [[100] * 4] * 3 and cache.evicting[0].pruned_k.shape[1] == round(width)


def test_decoding_over_pruned_channels_is_attention_with_zeros_there():
    model = attached("llama")
    cache = evicting_cache(model, policy("think", "40%", recent=4))
    seen = record(cache)
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 6, *[1] * 6])
    for layer, log in zip(cache.evicting, seen, strict=True):
        keys, values = (torch.cat([entry[k] for entry in log], 2) for k in (0, 1))
        call, out = log[-1][2:]
        whole = layer.tail_length + 4
        assert layer.prunings == 1 and layer.tail_length == 6
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


def test_one_token_stands_for_all_that_were_dropped():
    """Softmax over the kept tokens and the mean of the dropped, whose weight counts as often as tokens were
    dropped; over two evictions.
    """
    model = attached("llama")
    cache = evicting_cache(model, policy("razor", "55%"))
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


def test_a_repeated_context_keeps_what_the_repetition_looked_at_most():
    """By hand: the largest weight that each token gets from the repetition's queries, fed over a full cache."""
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


def test_a_context_that_was_not_repeated_is_not_evicted_by_chance():
    with pytest.raises(LowkeyError, match=r"lowkey\.prefill"):
        feed(attached("llama"), prompt(60), made(policy("kvzip", "25%")))


# -- turns, chunks, triggers


def test_later_chunks_and_a_second_turn_are_evicted_too():
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2))
    for seed in range(3):
        feed(model, prompt(100, seed=seed), cache)
    assert sum(map(sum, lengths(cache, 0))) == round(0.2 * 300 * 12)
    assert (
        max(p.max() for p in cache.kept_positions(0)) == 299
        and min(p.min() for p in cache.kept_positions(0)) == 0
    )


@pytest.mark.parametrize("every", [8, 200])
def test_decoding_evicts_every_so_many_steps(every):
    model = attached("llama")
    cache = evicting_cache(model, SnapKV("32 tokens", sinks=1, recent=2, every=every))
    generate(model, prompt(60), 241, cache)
    wanted = 32 + 240 % every
    assert lengths(cache, 0) == [[wanted] * 4] * 3
    assert cache.nbytes() == cache.predicted_nbytes()


def test_while_decoding_the_smallest_keys_of_all_layers_stay():
    """Heads and layers of different length compete for one budget, by scores that are all negative."""
    model = attached("llama")
    cache = evicting_cache(
        model, policy("knorm", "12 tokens", allocator="global", sinks=2, recent=3, every=2)
    )
    logs = record(cache)
    held = [[set(range(40)) for _ in range(4)] for _ in logs]
    for seen in (40, 42, 44, 46):
        feed(
            model,
            prompt(seen, batch=1)[:, 0 if seen == 40 else seen - 2 :],
            cache,
            splits=[40] if seen == 40 else [1, 1],
        )
        always = {0, 1, seen - 3, seen - 2, seen - 1}
        keys = [torch.cat([entry[0] for entry in log], 2)[0] for log in logs]
        free = [
            (float(keys[i][j, p].norm()), i, j, p)
            for i, heads in enumerate(held)
            for j, tokens in enumerate(heads)
            for p in (tokens | {seen - 2, seen - 1}) - always
        ]
        held = [[set(always) for _ in range(4)] for _ in logs]
        for _, i, j, p in sorted(free)[: 12 * 12 - 12 * 5]:
            held[i][j].add(p)
        assert [[set(p.tolist()) for p in layer.kept_positions(0)] for layer in cache.evicting] == held
        assert cache.nbytes() == cache.predicted_nbytes()
    assert len({max(map(len, heads)) for heads in held}) > 1


def test_a_frozen_cache_collects_no_queries():
    """It evicts nothing that they could decide: it holds what one does that never evicts while decoding."""
    model, held = attached("llama"), []
    for every in (0, 100):
        cache = evicting_cache(model, SnapKV("32 tokens", every=every))
        feed(model, prompt(60), cache)
        cache.freeze()
        feed(model, prompt(10, seed=1), cache, splits=[1] * 10)
        held.append(cache.nbytes())
    assert held[0] == held[1]


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_queries_that_decided_are_let_go(name):
    """After every eviction of decoding the cache holds what it held after the first one."""
    model = attached("llama")
    cache = evicting_cache(model, policy(name, "32 tokens", every=2))
    feed(model, prompt(60), cache)
    held = cache.nbytes()
    for seed in (1, 2, 3):
        feed(model, prompt(2, seed=seed), cache, splits=[1, 1])
        assert cache.nbytes() == held


def test_a_long_tail_joins_the_rows_and_changes_nothing(monkeypatch):
    model, ids = attached("llama"), prompt(60)
    plain = evicting_cache(model, SnapKV("30%"))
    expected = generate(model, ids, 50, plain, PADS)
    monkeypatch.setattr(evicting, "LONGEST_TAIL", 16)
    joined = evicting_cache(model, SnapKV("30%"))
    assert torch.equal(generate(model, ids, 50, joined, PADS), expected)
    assert lengths(joined, 0) == lengths(plain, 0) and joined.nbytes() == joined.predicted_nbytes()
    assert all(
        torch.equal(a, b) for a, b in zip(joined.kept_positions(0), plain.kept_positions(0), strict=True)
    )
    assert joined.evicting[0].tail_length < 16


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_two_live_caches_are_independent(allocator):
    """Fed in turns, each answers as if the other were not there."""
    model, ids, more = (
        attached("llama"),
        [prompt(60), prompt(60, seed=1)],
        [prompt(8, seed=2), prompt(8, seed=3)],
    )
    alone, together = [], [evicting_cache(model, SnapKV("25%", allocator)) for _ in range(2)]
    for a, b in zip(ids, more, strict=True):
        cache = evicting_cache(model, SnapKV("25%", allocator))
        feed(model, a, cache)
        alone.append(feed(model, b, cache, None, [1] * 8))
    for a, cache in zip(ids, together, strict=True):
        feed(model, a, cache)
    steps = [[feed(model, b[:, i : i + 1], c) for b, c in zip(more, together, strict=True)] for i in range(8)]
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([s[i] for s in steps], 1), expected)


def test_a_copied_cache_continues_alone():
    model, ids = attached("llama"), prompt(60)
    cache = evicting_cache(model, SnapKV("25%", "ada"))
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    more = prompt(5, seed=2)
    expected = feed(model, more, cache, None, [1] * 5)
    assert torch.equal(feed(model, more, twin, None, [1] * 5), expected)


def test_a_question_that_only_scores_is_not_stored():
    """It says what to keep; what is kept and the logits after it are those of the context."""
    model, context, question = attached("llama"), prompt(LENGTH), prompt(6, seed=1)
    cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2))
    cache.score_only(6)
    feed(model, torch.cat([context, question], 1), cache, PADS)
    assert cache.get_seq_length() == LENGTH
    assert sum(map(sum, lengths(cache, 1))) == round(0.2 * LENGTH * 12)
    assert max(int(p.max()) for p in cache.kept_positions(0, 1)) == LENGTH - 1
    cache.score_only(0)
    cache.freeze()
    feed(model, question, cache, PADS)
    assert max(int(p.max()) for p in cache.kept_positions(0, 1)) == LENGTH + 5
    assert sum(map(sum, lengths(cache, 1))) == round(0.2 * LENGTH * 12) + 6 * 12, "nothing was evicted again"


def test_what_a_question_looks_at_decides():
    model, context = attached("llama"), prompt(LENGTH)
    kept = []
    for seed in (1, 2):
        cache = evicting_cache(model, SnapKV("20%", sinks=1, recent=2, window=4))
        cache.score_only(4)
        feed(model, torch.cat([context, prompt(4, seed=seed)], 1), cache)
        kept.append(torch.cat(cache.kept_positions(1)).tolist())
    assert kept[0] != kept[1]


def test_bf16_keeps_its_dtype_and_answers():
    model = lowkey.attach(pico.build("qwen3").to(torch.bfloat16))
    cache = evicting_cache(model, SnapKV("25%", "ada"))
    out = feed(model, prompt(60), cache, None, [50, *[1] * 10])
    assert (
        out.dtype == torch.bfloat16
        and out.isfinite().all()
        and cache.evicting[0].keys.dtype == torch.bfloat16
    )


# -- make_cache and files


def made(policy=None, **kwargs):
    return lowkey.make_cache(attached("llama"), policy=policy, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: made(SnapKV("25%", "ada", every=4)),
        lambda: made(policy("headkv-r2", "20 tokens", sinks=1, recent=2)),
        lambda: made(policy("pyramidkv", "25%")),
        lambda: made(bits=4),
        lambda: made(),
    ],
)
def test_a_saved_cache_continues_with_identical_logits(tmp_path, make):
    model, cache = attached("llama"), make()
    feed(model, prompt(60), cache, PADS, [57, 1, 1, 1])
    cache.save(tmp_path / "c")
    again = lowkey.load_cache(tmp_path / "c", model)
    assert again.nbytes() == cache.nbytes() and again.get_seq_length() == 60
    more = prompt(12, seed=4)
    expected = feed(model, more, cache, PADS, [1] * 6 + [6])
    assert torch.equal(feed(model, more, again, PADS, [1] * 6 + [6]), expected)


@pytest.fixture
def saved(tmp_path):
    cache = made(SnapKV("25%"))
    feed(attached("llama"), prompt(60), cache)
    cache.save(tmp_path / "c")
    return tmp_path / "c"


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    forging.edit_json(file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda p: (p / "cache.safetensors").write_bytes((p / "cache.safetensors").read_bytes()[:-9]),
            "damaged",
        ),
        (lambda p: (p / "cache.json").write_text("{"), "damaged"),
        (lambda p: edit(p / "cache.json", '"format": 1', '"format": 9'), "newer"),
        (lambda p: edit(p / "cache.json", '"name": "snapkv"', '"name": "nobody"'), "not known"),
        (lambda p: (p / "cache.json").unlink(), "does not exist"),
        (lambda p: edit(p / "cache.json", '"fresh"', '"flesh"'), "damaged"),
    ],
)
def test_a_damaged_cache_is_refused(saved, damage, says):
    damage(saved)
    with pytest.raises(LowkeyError, match=says):
        lowkey.load_cache(saved, attached("llama"))


def test_another_models_cache_is_refused(saved):
    with pytest.raises(LowkeyError, match="made for model"):
        lowkey.load_cache(saved, attached("qwen2"))


def test_a_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LowkeyError, match="other files"):
        made(SnapKV("25%")).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_json(name):
    one = policy(name, "12.5%", every=7)
    assert policy_from_dict(policy_to_dict(one)).with_head_scores(HEADS) == one


# -- refusals


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: SnapKV("8 tokens"), "do not hold the 4 sinks and 8 recent"),
        (lambda: SnapKV("120%"), "120%"),
        (lambda: SnapKV("10%", "adda"), "adda"),
        (lambda: SnapKV("10%", sinks=-1), "sinks -1"),
        (lambda: made(make_policy("headkv-r2", "10%", {})), "lowkey heads"),
        (lambda: made(SnapKV("10%"), bits=4), "bits=4"),
        (lambda: make_policy("snapvk", "10%", {}), "did you mean 'snapkv'"),
        (lambda: make_policy("snapkv", "10%", {"windw": "3"}), "windw"),
        (lambda: make_policy("headkv-r2", "10%", {"beta": "0.5"}), "beta='0.5'"),
        (lambda: made().kept_positions(0), "keeps every token"),
    ],
)
def test_bad_input_is_one_clear_line(act, says):
    with pytest.raises(LowkeyError, match=says) as refused:
        act()
    assert "\n" not in str(refused.value)


def test_crop_is_refused():
    model = attached("llama")
    cache = made(SnapKV("50%"))
    feed(model, prompt(20), cache)
    with pytest.raises(LowkeyError, match="crop"):
        cache.crop(-2)


def test_static_caches_are_refused():
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(attached("llama"), prompt(20), 4, made(SnapKV("50%")), cache_implementation="static")
