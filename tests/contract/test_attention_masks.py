"""Masks over every kind of cache: the stock logits under the same mask, or a refusal in one line."""

from __future__ import annotations

import copy

import pico
import pytest
import torch
from lossless_caches import KINDS, MASKS, NOISE, cache_of, causal, documents, fed, stock_logits, whole_rank
from pico import attached, padding, prompt

from lowkey.cache.cache import make_cache
from lowkey.core.types import LowkeyError
from lowkey.storage.exact import Exact

# they do not hold padding, nor what a mask hides
UNHELD = ["dynamic", "dynamic-pre", "policy-plan", "think", "razor", "h2o", "matching"]


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
def test_a_mask_of_the_users_own_gives_stock_logits_in_turns(kind, which):
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
def test_a_row_may_end_in_padding_with_recent_tokens_or_blocks(kind):
    """As when a batch of texts is scored: each row is what it is alone.

    In double precision, since sums in another order may round an integer the other way.
    """
    model, mask = copy.deepcopy(attached("llama")).double(), torch.ones(2, 40).long()
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
def test_recent_tokens_and_blocks_do_not_count_trailing_padding(kind):
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
def test_caches_that_count_no_tokens_read_turns_of_uneven_length(kind):
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
def test_masks_that_differ_between_heads_are_refused(kind):
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


def test_soft_capping_over_a_stock_cache_takes_a_mask_per_head():
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
def test_queries_that_attend_to_nothing_give_finite_logits(kind):
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
