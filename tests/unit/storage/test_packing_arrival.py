"""Packed storage does not depend on how tokens arrive: chunks, padding, turns, beams, saved caches."""

from __future__ import annotations

import pico
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packing_by_hand import LENGTH, PADS, close, packed, tolerance
from pico import attached, feed, generate, prompt, real, stock

import lowkey
from lowkey import Exact
from lowkey.models.attention_interface import Call
from lowkey.storage.codec import Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.packing import PerChannel, PerToken, Unpacked

# -- how tokens arrive does not matter


@pytest.mark.parametrize("splits", [[60, 40], [20, 20, 60]], ids=["chunks", "chunk-in-the-padding"])
def test_chunks_of_padded_rows_give_the_logits_of_one_shot(name, form, splits):
    model, ids = attached("llama"), prompt(LENGTH)
    ours, whole = (feed(model, ids, packed(model, name, form), PADS, pieces) for pieces in (splits, None))
    close(real(ours, PADS), real(whole, PADS), tolerance(name))


@pytest.mark.parametrize(
    ("name", "form"), [("int4", "plain"), ("kivi4", "plain"), ("kivi8", "merged-pre"), ("hadamard8", "post")]
)
def test_one_by_one_gives_the_logits_of_one_shot(name, form):
    model, ids = attached("llama"), prompt(LENGTH)
    ours, whole = (
        feed(model, ids, packed(model, name, form), PADS, pieces) for pieces in ([1] * LENGTH, None)
    )
    close(real(ours, PADS), real(whole, PADS), tolerance(name))


def test_a_padded_row_is_the_row_alone(name, form):
    """Blocks of tokens, too, begin at the row's first real token."""
    model, ids = attached("llama"), prompt(LENGTH)
    both = feed(model, ids, packed(model, name, form), PADS, [LENGTH - 2, 1, 1])
    for row, pad in enumerate(PADS):
        alone = feed(
            model, ids[row : row + 1, pad:], packed(model, name, form), splits=[LENGTH - pad - 2, 1, 1]
        )
        close(both[row, pad:], alone[0], tolerance(name))


@st.composite
def arrivals(draw):
    """(pads, splits, exact) of two rows."""
    length = draw(st.integers(1, 120))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    splits = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    pads = [draw(st.integers(0, length - 1)), 0]
    return (
        pads,
        splits,
        Exact(
            draw(st.integers(0, 4)), draw(st.integers(0, 40)), draw(st.sampled_from(["compressed", "exact"]))
        ),
    )


def run(packing, states, pads, splits, exact):
    """Outputs (b, 2, 1, t, 8) of one layer for queries, keys and values (3, b, 2, t, 8), and the layer."""
    layer, out, start = CodedLayer(Plain(), exact, packing), [], 0
    mask, positions = pico.padding(pads, states.shape[3])
    for size in splits:
        stop = start + size
        q, k, v = states[:, :, :, start:stop]
        seen = torch.ones(size, stop, dtype=torch.bool).tril(start) & mask[:, None, :stop].bool()
        layer.update(k, v)
        out.append(layer.attend(k, v, Call(q.unsqueeze(2), seen, positions[:, start:stop], 0.3, None)))
        assert layer.nbytes() == layer.predicted_nbytes()
        start = stop
    return torch.cat(out, 3), layer


@settings(max_examples=80, deadline=None)
# what was stored before the row began is not taken back
@example(([40, 0], [38, 3, 50], Exact(recent=2)), (PerChannel(4), PerToken(4)))
@given(
    arrivals(),
    st.sampled_from([(PerChannel(4), PerToken(4)), (PerToken(8), PerChannel(8)), (PerToken(4), Unpacked())]),
)
def test_padding_and_company_change_nothing_whatever_arrives(arrival, packing):
    """One layer on its own: the same numbers go in, so that no code can go another way. With one token in a
    piece, both rows have one.
    """
    (pads, splits, exact), generator = arrival, torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 2, sum(splits), 8, generator=generator)
    together, layer = run(packing, states, pads, splits, exact)
    for row, pad in enumerate(pads):
        own, left = [], pad
        for size in splits:
            own.append(max(0, size - left))
            left = max(0, left - size)
        if exact.prefill == "exact" and any(a == 1 < b for a, b in zip(own, splits, strict=True)):
            continue  # a piece of several tokens of which the row has one: alone it is no chunk
        alone, _ = run(packing, states[:, row : row + 1, :, pad:], [0], [n for n in own if n], exact)
        assert torch.allclose(together[row, :, :, pad:], alone[0], atol=1e-5)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.nbytes() == layer.predicted_nbytes()


def test_what_a_query_may_not_see_is_no_padding():
    """A mask that hides a row's first tokens from some queries moves neither its blocks nor its sinks."""
    states, outs = torch.randn(3, 1, 2, 100, 8, generator=torch.Generator().manual_seed(0)), []
    for hidden in (0, 37):
        layer, start = CodedLayer(Plain(), Exact(sinks=2, recent=3), (PerChannel(4), PerToken(4))), 0
        for size in (60, 39, 1):
            q, k, v = states[:, :, :, start : start + size]
            start += size
            seen = torch.ones(1, size, start, dtype=torch.bool).tril(start - size)
            seen[..., : hidden * (start == 99)] = False
            layer.update(k, v)
            out = layer.attend(k, v, Call(q.unsqueeze(2), seen, None, 0.3, None))
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
def test_decoding_is_one_forward_of_the_decoded_text(name, form):
    model, ids = attached("llama"), prompt(50)
    new = generate(model, ids, 16, packed(model, name, form))
    whole = feed(model, torch.cat([ids, new], 1), packed(model, name, form))
    chosen = whole[:, 49:-1].gather(2, new.unsqueeze(2)).squeeze(2)
    assert (whole[:, 49:-1].amax(2) - chosen <= tolerance(name) * whole.abs().max()).all()


def test_generate_continues_a_cache_that_holds_an_earlier_turn(name):
    model, ids = attached("llama"), prompt(LENGTH, batch=1)
    cache = packed(model, name, exact=Exact(2, 4))
    feed(model, ids[:, :70], cache)
    ours = generate(model, ids, 10, cache)
    whole = feed(model, torch.cat([ids, ours], 1), packed(model, name, exact=Exact(2, 4)))
    chosen = whole[:, LENGTH - 1 : -1].gather(2, ours.unsqueeze(2)).squeeze(2)
    assert (whole[:, LENGTH - 1 : -1].amax(2) - chosen <= tolerance(name) * whole.abs().max()).all()


def test_exact_prefill_gives_stock_logits(name, form):
    model, ids = attached("llama"), prompt(LENGTH)
    cache = packed(model, name, form)
    cache.exact_prefill(True)
    reference = feed(stock("llama"), ids, pads=PADS)
    close(real(feed(model, ids, cache, PADS), PADS), real(reference, PADS), 1e-4)
    assert cache.nbytes() == cache.predicted_nbytes()


# -- rows, beams, copies on disk


def test_two_live_caches_do_not_disturb_each_other(name):
    model, first, second = attached("llama"), prompt(LENGTH), prompt(LENGTH, seed=1)
    a, b = packed(model, name), packed(model, name)
    mixed = [
        (feed(model, x, a, PADS), feed(model, y, b))
        for x, y in zip(first.split(25, 1), second.split(25, 1), strict=True)
    ]
    assert torch.equal(
        torch.cat([x for x, _ in mixed], 1), feed(model, first, packed(model, name), PADS, [25] * 4)
    )
    assert torch.equal(
        torch.cat([y for _, y in mixed], 1), feed(model, second, packed(model, name), None, [25] * 4)
    )


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
@pytest.mark.parametrize("rows", [[1, 0], [1, 1]], ids=str)
def test_reordering_moves_everything_a_row_holds(name, form, rows):
    """Also when the row for which the other waited goes."""
    model, ids, more = attached("llama"), prompt(LENGTH), prompt(6, seed=1)
    cache, pads = packed(model, name, form), [PADS[r] for r in rows]
    feed(model, ids, cache, PADS)
    cache.reorder_cache(torch.tensor(rows))
    assert cache.nbytes() == cache.predicted_nbytes()
    straight = packed(model, name, form)
    feed(model, ids[rows], straight, pads)
    close(feed(model, more, cache, pads), feed(model, more, straight, pads), tolerance(name))
    assert cache.nbytes() == straight.nbytes()


def test_beams_are_scored_by_the_packed_cache(name):
    """The score of the best beam is that of its text, read once more from the beginning."""
    model, ids = attached("llama"), prompt(40)
    mask, _ = pico.padding([7, 0], 40)
    options = {
        "num_beams": 3,
        "max_new_tokens": 30,
        "min_new_tokens": 30,
        "do_sample": False,
        "length_penalty": 0.0,
    }
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=packed(model, name),
        **options,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logs = feed(model, out.sequences, packed(model, name), [7, 0])[:, 39:-1].log_softmax(-1)
    scores = logs.gather(2, out.sequences[:, 40:].unsqueeze(2)).sum((1, 2))
    assert torch.allclose(out.sequences_scores, scores, atol=0.1)


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
def test_a_saved_cache_continues_with_identical_logits(tmp_path, name, form):
    model, more = attached("llama"), prompt(40, seed=4)
    cache = packed(model, name, form, Exact(2, 5, "exact"))
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 3, 1, 1, 1])
    cache.save(tmp_path / "c")
    again = lowkey.load_cache(tmp_path / "c", model)
    assert again.nbytes() == cache.nbytes() == again.predicted_nbytes()
    expected = feed(model, more, cache, PADS, [1] * 10 + [30])
    assert torch.equal(feed(model, more, again, PADS, [1] * 10 + [30]), expected)
