"""Rows are counted from their own first token, and scores see what the mask lets them see."""

from __future__ import annotations

import dataclasses
import itertools

import pico
import pytest
import torch
from dynamic_plans import make_plan
from evicting_caches import HEADS
from lossless_caches import MASKS, NOISE, cache_of, causal, fed, stock_logits
from pico import attached, padding, prompt

import lowkey
from lowkey.cache.cache import make_cache
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact

FED = [name for name in POLICIES if name not in pico.UNFED]


# -- what a score sees


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", ["snapkv", "h2o", "h2o per query", "tova"])
def test_scores_look_where_the_mask_lets_them(name, which):
    """By hand, from the attention maps of a stock model under the same mask: the mean over the last 8 queries
    or the newest one, or the sum over all, or that over the number of queries that see the token, then over
    the query heads of a KV head (TOVA: of the layer); the best 30 of 120 stay."""
    ids, mask, model = prompt(120, 1), MASKS[which], attached("llama")
    options = {"snapkv": {"window": 8, "kernel": 1}, "h2o per query": {"per_query": True}}.get(name, {})
    cache = make_cache(model, policy=POLICIES[name.split()[0]]("30 tokens", sinks=0, recent=0, **options))
    fed(model, ids, mask, cache)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        maps = pico.stock("llama")(
            ids, attention_mask=added, output_attentions=True, use_cache=False
        ).attentions
    for i, found in enumerate(maps):
        queries = {"snapkv": slice(-8, None), "tova": slice(-1, None)}.get(name, slice(None))
        scores = found[0, :, queries].sum(1).unflatten(0, (4, 2)).mean(1)  # (h, s)
        scores = scores / mask[0, 0].sum(0) if name == "h2o per query" else scores
        scores = scores.mean(0, keepdim=True).expand(4, -1) if name == "tova" else scores
        for head, kept in enumerate(cache.kept_positions(i)):
            least = scores[head].topk(30).values[-1]
            assert len(kept) == 30 and (scores[head, kept] >= least - 1e-6).all()


@pytest.mark.parametrize("kind", ["plan", "plan-exact", "kivi8-plan", "policy-plan", "dynamic-pre"])
def test_a_plan_reads_a_row_wherever_its_positions_begin(kind):
    """Behind padding without position_ids, and from 1000 on."""
    model, ids = attached("llama"), prompt(80, 1)
    everything = causal(80)[None, None]
    padded, mask = (
        torch.cat([torch.full((1, 17), 5), ids], 1),
        padding([17], 97)[0].bool()[:, None, None] & causal(97),
    )
    want = stock_logits(ids, everything)
    assert (fed(model, padded, mask, cache_of(kind, model))[:, 17:] - want).abs().max() <= NOISE.get(
        kind, 2e-4
    )
    late = fed(model, ids, everything, cache_of(kind, model), positions=1000 + torch.arange(80).unsqueeze(0))
    assert (late - want).abs().max() <= max(NOISE.get(kind, 0), 5e-3)


@pytest.mark.parametrize("counted", [True, False])
def test_padding_behind_or_between_tokens_is_no_sink(counted):
    """Turns of uneven length: a row's sinks are its first real tokens, wherever they lie; position_ids count
    them or the padding too.
    """
    model, ids = attached("llama"), prompt(8)
    cache = make_cache(model, bits=8, exact=Exact(4))
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        at = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, :4]} if counted else {}
        model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache, **at)
        if counted:
            return
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert cache.layers[1].sink_index.tolist() == [[0, 1, 4, 5], [1, 2, 3, 4]]


# -- rows are counted from their own first token


def small(name, **options):
    # which rotated channels are weak depends on where the rotation began
    options |= {"channels": 1.0} if name == "think" else {}
    policy = POLICIES[name]("30%", sinks=3, recent=4, **options)
    return dataclasses.replace(policy, allocator=policy.resolved_allocator().with_head_scores(HEADS))


def continued(name, ids, mask, positions, more, every, pad=0):
    """(kept positions of every layer, the logits of `more` steps): prompt in chunks, the first of 30 tokens
    and padding, then steps.
    """
    model, made = attached("llama"), small(name, every=every)
    cache = make_cache(model, policy=made, gates=pico.gates(model, made))
    seen, logits = 0, []
    whole = torch.cat([ids, more], 1)
    with torch.no_grad():
        for size in [pad + 30, ids.shape[1] - pad - 30, *[1] * more.shape[1]]:
            at = None if positions is None else positions[:, seen : seen + size]
            own = None if mask is None else mask[:, : seen + size]
            seen += size
            logits.append(
                model(
                    whole[:, seen - size : seen], attention_mask=own, position_ids=at, past_key_values=cache
                ).logits
            )
    kept = [
        [p.tolist() for p in layer.kept_positions(row)] for layer in cache.evicting for row in range(len(ids))
    ]
    return kept, torch.cat(logits[2:], 1)


@pytest.mark.parametrize("name", FED)
@pytest.mark.parametrize("every", [0, 2])
def test_a_row_is_counted_from_its_first_token(name, every):
    """The same text at position 0, behind padding that position_ids do not know of, and from 1000 on: rotary
    attention is relative, so the same tokens are kept and the same logits come."""
    ids, more = (
        (1 + torch.randperm(96, generator=torch.Generator().manual_seed(0))[:55])
        .unsqueeze(0)
        .split([50, 5], 1)
    )  # no ties
    kept, logits = continued(name, ids, None, None, more, every)
    assert (
        all({0, 1, 2} <= set(p) for p in itertools.chain(*kept))
        and sum(map(len, itertools.chain(*kept))) < 12 * 40
    )
    padded = torch.cat([torch.full((1, 17), 5), ids], 1)
    places = {
        "padded": (padded, torch.arange(72).unsqueeze(0) >= 17, None, 17),
        "late": (ids, None, 1000 + torch.arange(55).unsqueeze(0), 1000),
    }
    for where, (row, mask, positions, begins) in places.items():
        mask = None if mask is None else mask.long()
        others, again = continued(name, row, mask, positions, more, every, row.shape[1] - 50)
        assert [[[i - begins for i in p] for p in heads] for heads in others] == kept, where
        assert (again - logits).abs().max() < 5e-3, where


OPTIONS = {
    "h2o per query": {"per_query": True},
    "kv-compress all": {"window": 0},
    "curdkv projected": {"rank": 5},
    "snapkv mean": {"pooling": "mean"},
}


@pytest.mark.parametrize("name", [*FED, *OPTIONS])
def test_a_row_is_what_it_is_alone(name):
    """Whatever lies beside it in the batch: in chunks of which the first may be all padding, and with
    evictions in decoding.
    """
    model, pads, sizes = attached("llama"), [31, 0, 44], [40, 15, 1, 1, 1, 1]
    made = POLICIES[name.split()[0]]("30%", sinks=3, recent=4, every=2, **OPTIONS.get(name, {}))
    made = dataclasses.replace(made, allocator=made.resolved_allocator().with_head_scores(HEADS))
    ids = torch.stack(
        [1 + torch.randperm(96, generator=torch.Generator().manual_seed(row))[:59] for row in range(3)]
    )
    together = make_cache(model, policy=made, gates=pico.gates(model, made))
    got = pico.feed(model, ids, together, pads, sizes)
    for row, pad in enumerate(pads):
        alone = make_cache(model, policy=made, gates=pico.gates(model, made))
        parts = [40 - pad, 15] if pad < 40 else [55 - pad]
        want = pico.feed(model, ids[row : row + 1, pad:], alone, None, parts + sizes[2:])
        assert (got[row, pad:] - want[0]).abs().max() < 1e-3
        for layer, other in zip(together.evicting, alone.evicting, strict=True):
            assert [p.tolist() for p in layer.kept_positions(row)] == [
                p.tolist() for p in other.kept_positions(0)
            ]


# a piece of one token before a row begins, one as it does, one token of a piece
UNEVEN, PIECES = [31, 0, 44], [30, 1, 1, 13, 14]


def alone(row, ids, cache):
    """What the model says of a row by itself, in the pieces in which it came beside the others."""
    start, sizes = 0, []
    for size in PIECES:
        start += size
        sizes.append(max(0, min(size, start - UNEVEN[row])))
    return pico.feed(
        attached("llama"), ids[row : row + 1, UNEVEN[row] :], cache, None, [n for n in sizes if n]
    )[0]


def three():
    return torch.stack(
        [1 + torch.randperm(96, generator=torch.Generator().manual_seed(row))[:59] for row in range(3)]
    )


@pytest.mark.parametrize("name", FED)
def test_a_single_token_beside_padding_is_what_it_is_alone(name):
    """A step of decoding, which evicts nothing, or a row's first token, which is a prompt; never both as its
    neighbours please.
    """
    model, ids, made = attached("llama"), three(), small(name)
    together = make_cache(model, policy=made, gates=pico.gates(model, made))
    got = pico.feed(model, ids, together, UNEVEN, PIECES)
    assert together.nbytes() == together.predicted_nbytes()
    for row, pad in enumerate(UNEVEN):
        own = make_cache(model, policy=made, gates=pico.gates(model, made))
        assert (got[row, pad:] - alone(row, ids, own)).abs().max() < 1e-3
        for layer, other in zip(together.evicting, own.evicting, strict=True):
            assert [p.tolist() for p in layer.kept_positions(row)] == [
                p.tolist() for p in other.kept_positions(0)
            ]


def test_steps_of_some_rows_are_refused_if_rows_share_a_count():
    model, cache = attached("llama"), make_cache(attached("llama"), policy=small("h2o", every=2))
    with pytest.raises(
        LowkeyError, match=r"attention_mask: one token while another row has not begun, and every=2"
    ):
        pico.feed(model, three(), cache, UNEVEN, PIECES)
    assert cache.get_seq_length() == 30


LOSSY = {
    "plan": lambda m: make_cache(m, pico.plan(m, 6, 9)),
    "plan exact": lambda m: make_cache(m, pico.plan(m, 6, 9, layout="pre_rope", sinks=2, recent=3)),
    "int4": lambda m: make_cache(m, bits=4),
    "dynamic": lambda m: make_cache(m, make_plan("llama", "post_rope")),
    "policy": lambda m: make_cache(m, pico.plan(m, 6, 9), POLICIES["snapkv"]("100%")),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_with_exact_prefill_a_single_token_is_attended_as_stored(kind):
    """Whether it comes alone or in a piece of which the rest is padding."""
    model, ids = attached("llama"), three()
    together, *own = (LOSSY[kind](model) for _ in range(4))
    for cache in (together, *own):
        cache.exact_prefill(True)
    got = pico.feed(model, ids, together, UNEVEN, PIECES)
    for row, cache in enumerate(own):
        assert (got[row, UNEVEN[row] :] - alone(row, ids, cache)).abs().max() < (
            0.2 if kind == "int4" else 2e-3
        )


def test_a_question_of_one_token_only_scores():
    model, cache = attached("llama"), make_cache(attached("llama"), policy=POLICIES["snapkv"]("100%"))
    pico.feed(model, prompt(20), cache)
    cache.score_only(1)
    pico.feed(model, prompt(1), cache)
    assert cache.get_seq_length() == 20 and all(len(p) == 20 for p in cache.kept_positions(0))


def test_a_budget_of_tokens_spends_none_on_padding():
    """Rows of 60 and 20 tokens, without position_ids: half of each is kept."""
    model, cache = (
        attached("llama"),
        make_cache(attached("llama"), policy=POLICIES["snapkv"]("50%", sinks=2, recent=2)),
    )
    with torch.no_grad():
        model(prompt(60), attention_mask=padding([0, 40], 60)[0], past_key_values=cache)
    assert [[len(p) for p in cache.kept_positions(0, row)] for row in range(2)] == [[30] * 4, [10] * 4]
    assert all(p.min() == 40 for p in cache.kept_positions(0, 1))


def test_after_a_load_rows_are_counted_as_before(tmp_path):
    model, mask = attached("llama"), padding([0, 25], 50)[0]
    cache = make_cache(model, policy=small("snapkv"))
    with torch.no_grad():
        model(prompt(50), attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "c")
    loaded, more, longer = (
        lowkey.load_cache(tmp_path / "c", model),
        prompt(30, seed=4),
        padding([0, 25], 80)[0],
    )
    with torch.no_grad():
        want, got = (model(more, attention_mask=longer, past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(want, got)
    assert [p.tolist() for p in cache.kept_positions(1, 1)] == [
        p.tolist() for p in loaded.kept_positions(1, 1)
    ]
