"""Exact tokens beside a policy: seen in every call, counted in every budget, in a batch as alone."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pico
import pytest
import reach
import torch
from cache_kinds import rule
from packing_by_hand import FORMS, plan
from pico import attached, feed, prompt, real, stock

import lowkey
from lowkey import Exact
from lowkey.catalog import make_policy
from lowkey.core.types import LowkeyError
from lowkey.policies.base import Policy

PADS = [7, 0]


def policy(name, budget, **options):
    return make_policy(name, budget, {k: str(v) for k, v in {"sinks": 0, "recent": 2, **options}.items()})


@pytest.mark.parametrize("prefill", ["compressed", "exact"])
@pytest.mark.parametrize("splits", [[40, 1, 1, 18], [40, 8, 1, 11]], ids=str)
def test_sinks_without_a_window_are_seen_in_later_turns(splits, prefill):
    """H2O moves all tokens out of the dense part in each eviction; the sinks lie in slots of their own."""
    model, ids = attached("llama"), prompt(60)
    cache = lowkey.make_cache(model, policy=policy("h2o", "100%"), exact=Exact(3, 0, prefill))
    ours, theirs = feed(model, ids, cache, PADS, splits), feed(stock("llama"), ids, pads=PADS)
    assert (real(ours, PADS) - real(theirs, PADS)).abs().max() < 1e-4


# sinks and recent tokens of the window and of the policy
WINDOWS = [((10, 0), (0, 8)), ((0, 9), (4, 0)), ((3, 5), (4, 8)), ((6, 0), (0, 0))]


@pytest.mark.parametrize("bits", ["none", "int4", "kivi4"])
@pytest.mark.parametrize(("window", "own"), WINDOWS, ids=str)
@pytest.mark.parametrize("with_rule", [False, True])
def test_the_smallest_budget_works_and_is_never_exceeded(window, own, bits, with_rule):
    """After a prompt, a later turn and every eviction while decoding."""
    model, ids = attached("llama"), prompt(90)
    exact = Exact(*window, rule=rule(model) if with_rule and window[0] else None)

    def made(budget):
        chosen = policy("snapkv", budget, sinks=own[0], recent=own[1], every=1)
        return lowkey.make_cache(model, policy=chosen, bits=bits, exact=exact)

    with pytest.raises(LowkeyError, match="give that") as refused:
        feed(model, ids[:, :60], made("1 B"), PADS)
    least = re.search(r"take (\S+ \S+) for", str(refused.value)).group(1)
    amount, unit = least.split()
    for name, factor in ((least, 1.0), (f"{2 * float(amount):g} {unit}", 2.0)):
        cache, start = made(name), 0
        for size in (60, 20, *[1] * 10):
            feed(model, ids[:, start : start + size], cache, PADS)
            start += size
            held = cache.nbytes()
            assert reach.held(cache) == held == cache.predicted_nbytes()
            assert held <= factor * float(amount) * (1024 if unit == "KiB" else 1)


@pytest.mark.parametrize("bits", ["none", "int8", "kivi4"])
@pytest.mark.parametrize("tokens", [12, 30, 50, 70])
def test_a_budget_that_holds_nearly_all_is_not_exceeded(tokens, bits):
    """Dense tokens hold a sink twice, and exact tokens that fill no block yet."""
    model, exact = attached("llama"), Exact(8, 2)

    def filled(budget):
        cache = lowkey.make_cache(model, policy=policy("snapkv", budget), bits=bits, exact=exact)
        feed(model, prompt(tokens, 1), cache)
        return cache

    whole = filled("10 MiB").nbytes()
    for share in (0.9, 1.0, 1.02, 1.1, 1.3, 2.0):
        limit = int(share * whole)
        with contextlib.suppress(LowkeyError):  # too small for what is always kept
            assert filled(f"{limit} B").nbytes() <= limit


def test_a_budget_of_tokens_holds_the_window():
    for exact in (Exact(4, 32), Exact(18, 0), Exact(0, 21)):
        with pytest.raises(LowkeyError, match=r"budget 20 tokens: .* always kept"):
            lowkey.make_cache(attached("llama"), policy=policy("snapkv", "20 tokens", recent=3), exact=exact)
    cache = lowkey.make_cache(attached("llama"), policy=policy("snapkv", "20 tokens"), exact=Exact(4, 16))
    feed(attached("llama"), prompt(60), cache)
    assert [len(p) for p in cache.kept_positions(0)] == [20] * 4


@pytest.mark.parametrize("bits", ["none", "int4", "kivi4"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_fits_the_budget_is_the_row_alone(form, bits):
    """The other row of the batch evicts, so the tokens of both lie in rows."""
    model, ids, pads = attached("llama"), prompt(62), [20, 0]

    def fed(ids, pads):
        chosen = policy("snapkv", "50 tokens")
        cache = lowkey.make_cache(model, plan(model, form), chosen, bits=bits, exact=Exact(0, 5))
        return feed(model, ids, cache, pads, [ids.shape[1] - 7, *[1] * 7])

    together = fed(ids, pads)
    for row, pad in enumerate(pads):
        alone = fed(ids[row : row + 1, pad:], [0])
        assert (together[row, pad:] - alone[0]).abs().max() < 2e-3


@pytest.mark.parametrize("bits", ["int2", "hadamard4"])
def test_a_chunk_scores_as_it_came_wherever_older_tokens_lie(bits):
    """One row fits the budget after the first piece: alone its tokens are dense, and in the batch in rows."""
    model, ids, pads = attached("llama"), prompt(70), [5, 0]

    def kept(ids, pad, row):
        cache = lowkey.make_cache(
            model, plan(model, "merged-pre"), policy("tova", "18 tokens"), bits=bits, exact=Exact(3, 0)
        )
        feed(model, ids, cache, pad, [ids.shape[1] - 50, 50])
        return [[p.tolist() for p in layer.kept_positions(row)] for layer in cache.evicting]

    for row, pad in enumerate(pads):
        assert kept(ids, pads, row)[0] == kept(ids[row : row + 1, pad:], [0], 0)[0]


@pytest.mark.parametrize("question", [0, 3])
def test_tokens_that_wait_for_other_rows_score_as_stored(question):
    """KVzip scores a context before anything leaves: one row has a block ready, the other has none."""
    model, ids, pads = attached("llama"), prompt(45), [9, 0]

    def kept(ids, pads, row):
        cache = lowkey.make_cache(
            model, policy=policy("kvzip", "18 tokens", chunk=15), bits="kivi2", exact=Exact(0, 5)
        )
        mask = pico.padding(pads, ids.shape[1])[0]
        lowkey.prefill(model, pico.tokenizer(), cache, ids, question, mask)
        return [[p.tolist() for p in layer.kept_positions(row)] for layer in cache.evicting]

    for row, pad in enumerate(pads):
        assert kept(ids, pads, row) == kept(ids[row : row + 1, pad:], [0], 0)


def test_stored_latents_are_not_encoded_again():
    """Maps that do not invert each other, as trained ones, would change a token with every eviction."""
    model = attached("llama")
    maps = pico.layer_factors(model, 6, 6)
    maps = {i: dataclasses.replace(f, k_up=0.5 * f.k_up, v_up=2.0 * f.v_up) for i, f in maps.items()}
    made = pico.plan(model, factors=maps, orthonormal=False)
    cache = lowkey.make_cache(model, made, policy("streamingllm", "80 tokens"), bits="kivi8", exact=Exact())
    # two blocks of the 80 steps are stored behind the 20 tokens of the prompt
    feed(model, prompt(100, 1), cache, splits=[20, *[1] * 80])
    before = [layer._unpacked_dense() for layer in cache.evicting]
    feed(model, prompt(10, 1), cache)
    for layer, sides in zip(cache.evicting, before, strict=True):
        positions, starts = layer.rows_positions.long(), layer.rows_starts
        for stored, rows in zip(sides, layer._unpacked(layer.rows), strict=True):
            for head in range(4):
                own = slice(starts[head], starts[head + 1])
                again = (positions[own] >= 20) & (positions[own] < 84)
                old = stored[0, head, positions[own][again] - 20]
                assert again.sum() > 40
                assert (rows[own, 0][again] - old).abs().max() < 0.02 * stored.abs().max()


def test_a_chunk_shorter_than_what_only_scores_is_refused():
    model = attached("llama")
    cache = lowkey.make_cache(model, policy=policy("snapkv", "30%"))
    feed(model, prompt(40), cache)
    before, held = cache.get_seq_length(), cache.nbytes()
    cache.score_only(5)
    for size in (1, 4):
        with pytest.raises(LowkeyError, match=rf"score_only 5: .* this chunk has {size}"):
            feed(model, prompt(size), cache)
        assert (cache.get_seq_length(), cache.nbytes()) == (before, held)
    cache.score_only(0)
    assert torch.isfinite(feed(model, prompt(1), cache)).all()


@pytest.mark.parametrize("splits", [[40, 20], [40, 8, *[1] * 12]], ids=str)
def test_centred_tokens_in_rows_are_seen_as_by_the_model(splits):
    """Full rank, all tokens kept, and moved into rows by H2O: what was subtracted counts in every softmax."""
    model, ids = attached("llama"), prompt(60)
    full = {i: pico.merged_factors(4, pico.HEAD_DIM, pico.HEAD_DIM, 2, 4, seed=i) for i in range(3)}
    made = pico.plan(model, factors=full, orthonormal=False)
    cache = lowkey.make_cache(model, made, policy("h2o", "100%"), exact=Exact(2, 3))
    ours, theirs = feed(model, ids, cache, PADS, splits), feed(stock("llama"), ids, pads=PADS)
    assert cache.evicting[0].kept_entries > 0
    assert (real(ours, PADS) - real(theirs, PADS)).abs().max() < 1e-4


def test_exact_copies_of_sinks_protect_no_other_tokens():
    """Without low rank and integers, a window changes nothing, whatever lengths heads have."""
    model, kept = attached("llama"), []
    for exact in (Exact(), Exact(2, 0), Exact(2, 3)):
        chosen = policy("knorm", "30%", allocator="ada", sinks=2, recent=3)
        cache = lowkey.make_cache(model, policy=chosen, exact=exact)
        feed(model, prompt(90), cache, PADS, [50, 20, 20])
        kept.append([[p.tolist() for p in layer.kept_positions(0)] for layer in cache.evicting])
    assert len({len(p) for p in kept[0][0]}) > 1, "heads of different length"
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("score", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_no_numbers_keep_the_budget(score):
    @dataclasses.dataclass(frozen=True)
    class Extreme(Policy):
        def score(self, context):
            return torch.full_like(context.previous_scores, score)

    cache = lowkey.make_cache(attached("llama"), policy=Extreme("20 tokens", sinks=1, recent=2))
    feed(attached("llama"), prompt(60), cache, PADS)
    assert [len(p) for p in cache.kept_positions(0)] == [20] * 4


@pytest.mark.parametrize("question", [1, 12, 31])
def test_a_question_in_blocks_is_within_a_budget_of_bytes(question):
    """Tokens of a question that is asked again fill no block yet, and so are exact."""
    model, ids = attached("llama"), prompt(100, 1)

    def asked(budget):
        cache = lowkey.make_cache(model, policy=policy("snapkv", budget), bits="kivi2", exact=Exact(2, 3))
        lowkey.prefill(model, pico.tokenizer(), cache, ids, question)
        feed(model, ids[:, 100 - question :], cache)
        return cache.nbytes()

    with pytest.raises(LowkeyError, match="give that") as refused:
        asked("1 B")
    amount, unit = re.search(r"take (\S+) (\S+) for", str(refused.value)).groups()
    limit = float(amount) * (1024 if unit == "KiB" else 1)
    for factor in (1.0, 1.2):
        assert asked(f"{int(factor * limit)} B") <= factor * limit


def test_a_row_that_waited_for_another_is_stored_when_alone():
    model = attached("llama")
    cache = lowkey.make_cache(model, policy=policy("snapkv", "100%"), bits="kivi2", exact=Exact(0, 3))
    feed(model, prompt(45), cache, [20, 0])
    before = cache.nbytes()
    cache.batch_select_indices(torch.tensor([1]))
    assert reach.held(cache) == cache.nbytes() == cache.predicted_nbytes() < 0.45 * before
