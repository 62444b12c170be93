"""Masks of every kind over every cache: stock logits under the same mask, or one line that refuses; rows
counted from their start.
"""

from __future__ import annotations

import dataclasses
import itertools

import pico
import pytest
import torch
from pico import attached, padding, prompt
from test_bucketed import make_plan

import lowkey
from lowkey.cache.cache import make_cache
from lowkey.calibration.dynamic import make_dynamic_cache
from lowkey.core.types import LowkeyError
from lowkey.policies import POLICIES
from lowkey.storage.coded import Exact

HEADS = {kind: [[1.0, 2.0, 0.0, 5.0]] * 3 for kind in ("copy", "r2", "er", "mass", "induction", "echo")}
FED = [name for name in POLICIES if name != "kvzip"]  # it wants lowkey.prefill


def whole_rank(model, layout="post_rope", **fields):
    return pico.plan(model, 16, 16, layout=layout, **fields)


def cache_of(kind, model):
    """Kinds of cache that give stock logits, those of packed numbers but for their noise."""
    made = {
        "plain": lambda: make_cache(model, exact=Exact(3, 7)),
        "int8": lambda: make_cache(model, bits=8, exact=Exact(3)),
        "kivi8": lambda: make_cache(model, bits="kivi8", exact=Exact(3, 7)),
        "kivi8-plan": lambda: make_cache(
            model, whole_rank(model, "pre_rope"), bits="kivi8", exact=Exact(2, 0)
        ),
        "hadamard8": lambda: make_cache(model, bits="hadamard8", exact=Exact(3)),
        "plan": lambda: make_cache(model, whole_rank(model)),
        "plan-exact": lambda: make_cache(model, whole_rank(model, "pre_rope", sinks=3, recent=7)),
        "dynamic": lambda: make_dynamic_cache(model, make_plan("llama", "post_rope", 0)),
        "dynamic-pre": lambda: make_dynamic_cache(model, make_plan("llama", "pre_rope", 0)),
        "policy-plan": lambda: make_cache(model, whole_rank(model, "pre_rope"), POLICIES["ada-kv"]("100%")),
        "think": lambda: make_cache(model, policy=POLICIES["think"]("100%", channels=1.0)),
        "razor": lambda: make_cache(
            model, dataclasses.replace(whole_rank(model), heads=HEADS), POLICIES["razor"]("100%")
        ),
        "h2o": lambda: make_cache(model, policy=POLICIES["h2o"]("100%")),
    }
    return made[kind]()


KINDS = [
    "plain",
    "int8",
    "kivi8",
    "kivi8-plan",
    "hadamard8",
    "plan",
    "plan-exact",
    "dynamic",
    "dynamic-pre",
    "policy-plan",
    "think",
    "razor",
    "h2o",
]
# they do not hold padding, nor what a mask hides
UNHELD = ["dynamic", "dynamic-pre", "policy-plan", "think", "razor", "h2o"]
NOISE = {"int8": 0.2, "kivi8": 0.2, "kivi8-plan": 0.2, "hadamard8": 0.2}


@torch.no_grad()
def stock_logits(ids, mask, name="llama", positions=None):
    """transformers' eager attention under the same mask, written as what is added to the scores."""
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return pico.stock(name)(ids, attention_mask=added, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def fed(model, ids, mask, cache, splits=(), positions=None):
    out, start = [], 0
    for size in [*splits, ids.shape[1] - sum(splits)]:
        stop = start + size
        own = mask[:, :, start:stop, :stop]
        at = None if positions is None else positions[:, start:stop]
        out.append(
            model(ids[:, start:stop], attention_mask=own, position_ids=at, past_key_values=cache).logits
        )
        start = stop
    return torch.cat(out, 1)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def documents(*sizes):
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (causal(sum(sizes)) & (number.unsqueeze(1) == number))[None, None]


def windowed(n, width):
    at = torch.arange(n)
    return (causal(n) & (at.unsqueeze(1) - at < width))[None, None]


MASKS = {
    "documents": documents(70, 41, 9),
    "window": windowed(120, 24),
    "last sees itself": documents(119, 1),
    "strangers": causal(120)
    .logical_and(torch.arange(120) % 7 != 3)
    .logical_or(torch.eye(120, dtype=torch.bool))[None, None],
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_the_users_own_gives_stock_logits(kind, which):
    """That the newest query does not see a token says nothing about it: no document or window is lost."""
    ids, mask, model = prompt(120, 2), MASKS[which], attached("llama")
    cache = cache_of(kind, model)
    got, want = fed(model, ids, mask, cache), stock_logits(ids, mask.expand(2, -1, -1, -1))
    assert (got - want).abs().max() <= NOISE.get(kind, 2e-4)
    assert cache.nbytes() == cache.predicted_nbytes()


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in UNHELD])
def test_and_so_it_does_in_turns(kind, which):
    ids, mask, model = prompt(120, 2), MASKS[which], attached("llama")
    got = fed(model, ids, mask, cache_of(kind, model), [33, 50, 1, 30])
    assert (got - stock_logits(ids, mask.expand(2, -1, -1, -1))).abs().max() <= NOISE.get(kind, 2e-4)


@pytest.mark.parametrize("kind", UNHELD)
def test_a_later_turn_that_hides_stored_tokens_is_refused(kind):
    """Any query of it, not the first and the last alone."""
    ids, model = prompt(120), attached("llama")
    some = documents(120).clone()
    some[:, :, 105, 3] = False
    for mask, splits in ((MASKS["documents"], [70]), (MASKS["window"], [60]), (some, [100])):
        cache = cache_of(kind, model)
        with pytest.raises(LowkeyError, match=r"attention_mask: differs from that of earlier turns"):
            fed(model, ids, mask, cache, splits)


@pytest.mark.parametrize("kind", UNHELD)
def test_a_step_without_the_mask_of_the_prompt_is_refused(kind):
    """Stock attention would see the padding, which is not held here."""
    model, cache = attached("llama"), cache_of(kind, attached("llama"))
    mask, _ = padding([5, 0], 40)
    with torch.no_grad():
        model(prompt(40), attention_mask=mask, past_key_values=cache)
        with pytest.raises(LowkeyError, match=r"attention_mask: differs from that of earlier turns"):
            model(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("kind", ["kivi8", "kivi8-plan"])
def test_blocks_do_not_show_padding_that_a_later_mask_reveals(kind):
    model, cache = attached("llama"), cache_of(kind, attached("llama"))
    mask, _ = padding([5, 0], 80)
    with torch.no_grad():
        model(prompt(80), attention_mask=mask, past_key_values=cache)
        with pytest.raises(LowkeyError, match=r"attention_mask: shows tokens that were padding"):
            model(prompt(1), past_key_values=cache)


COUNTING = {
    "kivi": lambda m: make_cache(m, bits="kivi4", exact=Exact(2, 0)),
    "kivi recent": lambda m: make_cache(m, bits="kivi8"),
    "kivi plan": lambda m: make_cache(m, whole_rank(m, "pre_rope"), bits="kivi8", exact=Exact(2, 0)),
    "int8 recent": lambda m: make_cache(m, bits=8, exact=Exact(0, 7)),
    "plan recent": lambda m: make_cache(m, pico.plan(m, recent=7)),
    "exact prefill": lambda m: make_cache(m, pico.plan(m), exact=Exact(2, 7, "exact")),
}


@pytest.mark.parametrize("kind", COUNTING)
def test_a_row_may_end_in_padding_beside_a_recent_window_and_blocks(kind):
    """As when a batch of texts is scored: each row is what it is alone."""
    model, mask = attached("llama"), torch.ones(2, 40).long()
    mask[0, 5:] = 0
    with torch.no_grad():
        both, short, long = (COUNTING[kind](model) for _ in range(3))
        found = model(prompt(40), attention_mask=mask, past_key_values=both).logits
        alone = (
            model(prompt(40)[:1, :5], past_key_values=short).logits,
            model(prompt(40)[1:], past_key_values=long).logits,
        )
    assert (found[0, :5] - alone[0][0]).abs().max() <= 1e-4 and (found[1] - alone[1][0]).abs().max() <= 1e-4
    assert both.nbytes() == both.predicted_nbytes()


@pytest.mark.parametrize("kind", COUNTING)
def test_a_recent_window_and_blocks_do_not_count_padding_behind_tokens(kind):
    """A row of which 5 tokens came would be as far as its neighbour of 40: it may not go on, in a chunk or
    behind one.
    """
    model = attached("llama")
    tried, straight = (COUNTING[kind](model) for _ in range(2))
    mask, whole, gap = torch.ones(2, 40).long(), torch.ones(2, 60).long(), torch.ones(2, 40).long()
    mask[0, 5:] = whole[0, 5:40] = gap[0, 5:9] = 0
    with torch.no_grad():
        with pytest.raises(
            LowkeyError, match=r"attention_mask: a row goes on behind padding.*pad on the left"
        ):
            model(prompt(40), attention_mask=gap, past_key_values=tried)
        assert tried.get_seq_length() == tried.nbytes() == 0
        for cache in (tried, straight):
            model(prompt(40), attention_mask=mask, past_key_values=cache)
        before = tried.nbytes()
        for later in (whole, None):
            with pytest.raises(
                LowkeyError, match=r"attention_mask: a row goes on behind padding.*pad on the left"
            ):
                model(prompt(20, seed=1), attention_mask=later, past_key_values=tried)
        assert tried.get_seq_length() == 40 and tried.nbytes() == before
        whole[0, 5:] = 0  # the other row goes on
        turn = {"attention_mask": whole, "position_ids": torch.arange(40, 60).expand(2, -1)}
        assert torch.equal(
            *(
                model(prompt(20, seed=1), past_key_values=cache, **turn).logits[1]
                for cache in (tried, straight)
            )
        )


@pytest.mark.parametrize("kind", ["plain", "int8", "hadamard8", "plan"])
def test_what_counts_no_tokens_reads_turns_of_uneven_length(kind):
    """Positions count the padding, as transformers' own do when none are given."""
    model, cache, ids = attached("llama"), cache_of(kind, attached("llama")), prompt(60)
    mask = torch.ones(2, 60).long()
    mask[0, 5:40] = mask[1, 50:] = 0
    seen = mask.bool()[:, None, None] & causal(60)
    want = stock_logits(ids, seen, positions=torch.arange(60).expand(2, -1))
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 40), (40, 59), (59, 60))
        ]
    assert (torch.cat(parts, 1) - want)[mask.bool()].abs().max() <= NOISE.get(kind, 2e-4)


# -- shapes


@pytest.mark.parametrize("kind", KINDS)
def test_heads_with_masks_of_their_own_are_refused_by_name_and_equal_ones_pass(kind):
    ids, model = prompt(40), attached("llama")
    mask = documents(40).expand(2, 8, 40, 40)  # 8 query heads; strides of 0
    want = stock_logits(ids, mask)
    for same in (mask, mask.clone(), mask[:1], mask[:, :1], mask.mT.contiguous().mT):
        assert (fed(model, ids, same, cache_of(kind, model)) - want).abs().max() <= NOISE.get(kind, 2e-4)
    for head in (0, 7):
        apart = mask.clone()
        apart[1, head, 20:, :5] = False
        with pytest.raises(LowkeyError, match=r"attention_mask: its heads differ"):
            fed(model, ids, apart, cache_of(kind, model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(2, 1, 40, 39), (2, 1, 40, 41), (3, 1, 40, 40), (2, 3, 40, 40), (2, 1, 39, 40), (2, 1, 1, 40)]
)
def test_masks_of_another_shape_are_refused(kind, shape):
    with torch.no_grad(), pytest.raises(LowkeyError, match="attention_mask"):
        attached("llama")(
            prompt(40),
            attention_mask=torch.ones(shape, dtype=torch.bool),
            past_key_values=cache_of(kind, attached("llama")),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_mask_changes_nothing(kind):
    """The corrected call goes on as if the other had not been made."""
    model, tried, straight = (
        attached("llama"),
        cache_of(kind, attached("llama")),
        cache_of(kind, attached("llama")),
    )
    apart = torch.ones(2, 8, 5, 25, dtype=torch.bool)
    apart[0, 3] = False
    with torch.no_grad():
        for cache in (tried, straight):
            model(prompt(20), past_key_values=cache)
        before = tried.get_seq_length(), tried.nbytes()
        for mask in (apart, torch.ones(2, 1, 5, 24, dtype=torch.bool), torch.ones(2, 1, 5, 25)):
            with pytest.raises(LowkeyError, match="attention_mask"):
                model(prompt(5), attention_mask=mask, past_key_values=tried)
            assert before == (tried.get_seq_length(), tried.nbytes())
        assert torch.equal(*(model(prompt(5), past_key_values=cache).logits for cache in (tried, straight)))


def test_under_soft_capping_a_stock_cache_honours_the_mask_of_every_head():
    """SDPA would do so for other families; this one goes through our own attention."""
    ids, mask = prompt(14), causal(14).expand(2, 8, 14, 14).clone()
    mask[0, 1::2, 8:, :5] = False
    mask[1, 0, 8:, 3:5] = False
    want = stock_logits(ids, mask, "gemma2")
    for cache in (None, make_cache(attached("gemma2"))):
        with torch.no_grad():
            got = attached("gemma2")(ids, attention_mask=mask, past_key_values=cache).logits
        assert (got - want).abs().max() < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_see_nothing_give_numbers(kind):
    """Those of left padding, up to a row of a single token; and of the user's own masks."""
    model, cache = attached("llama"), cache_of(kind, attached("llama"))
    mask, positions = padding([39, 0], 40)
    with torch.no_grad():
        out = model(prompt(40), attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        alone = model(prompt(40)[:1, 39:]).logits
    assert out.isfinite().all() and (out[0, 39] - alone[0, 0]).abs().max() <= NOISE.get(kind, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_may_begin_after_the_first_chunks(kind):
    ids, pads = prompt(42), [33, 0]
    got = pico.feed(attached("llama"), ids, cache_of(kind, attached("llama")), pads, [20, 10, 8, 1, 1, 2])
    assert got.isfinite().all()
    assert (
        pico.real(got, pads) - pico.real(pico.feed(pico.stock("llama"), ids, pads=pads), pads)
    ).abs().max() <= NOISE.get(kind, 2e-4)


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
    model, cache = attached("llama"), make_cache(attached("llama"), policy=small(name, every=every))
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
    together = make_cache(model, policy=made)
    got = pico.feed(model, ids, together, pads, sizes)
    for row, pad in enumerate(pads):
        alone = make_cache(model, policy=made)
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
    together = make_cache(model, policy=made)
    got = pico.feed(model, ids, together, UNEVEN, PIECES)
    assert together.nbytes() == together.predicted_nbytes()
    for row, pad in enumerate(UNEVEN):
        own = make_cache(model, policy=made)
        assert (got[row, pad:] - alone(row, ids, own)).abs().max() < 1e-3
        for layer, other in zip(together.evicting, own.evicting, strict=True):
            assert [p.tolist() for p in layer.kept_positions(row)] == [
                p.tolist() for p in other.kept_positions(0)
            ]


def test_steps_of_some_rows_alone_are_refused_where_all_are_counted_together():
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
    "dynamic": lambda m: make_dynamic_cache(m, make_plan("llama", "post_rope")),
    "policy": lambda m: make_cache(m, pico.plan(m, 6, 9), POLICIES["snapkv"]("100%")),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_under_exact_prefill_a_single_token_sees_what_will_be_stored(kind):
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
