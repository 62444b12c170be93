"""The fast backend against the loops that define attention over segments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowkey.backends import fused, grouped, naive
from lowkey.backends.segment import Segment

D = 6  # the width of the answer


def segments(seed, lengths, *, b=2, h=2, g=2, t=3, masks=True, up="per head", rank=4):
    """Random segments: an up map (per head, shared or none), another width for keys than for values, random
    masks.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    out = []
    for s in lengths:
        width = D if up == "none" else rank
        mask = (draw(b, t, s) > 0) if masks else None
        maps = None if up == "none" else draw(h if up == "per head" else 1, width, D)
        out.append(
            Segment(draw(b, h, g, t, rank + 1), draw(b, h, s, rank + 1), draw(b, h, s, width), mask, maps)
        )
    return out


def agree(parts, softcap=None):
    fast, slow = (backend.attend(parts, 0.7, softcap) for backend in (grouped, naive))
    assert fast.shape == slow.shape
    assert torch.allclose(fast, slow, atol=1e-5)
    return fast


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    masks=st.booleans(),
    up=st.sampled_from(["none", "shared", "per head"]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_grouped_is_naive(*, seed, lengths, shape, masks, up, softcap):
    b, h, g, t = shape
    agree(segments(seed, lengths, b=b, h=h, g=g, t=t, masks=masks, up=up), softcap)


@pytest.fixture
def fusing(monkeypatch):
    """Torch's attention at any length, three queries at a time; returns how often it was asked."""
    calls, inner = [], fused.scaled_dot_product_attention
    monkeypatch.setattr(fused, "QUERIES", 1)
    monkeypatch.setattr(fused, "QUERIES_PER_PASS", 3)
    monkeypatch.setattr(
        fused, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or inner(*a, **k)
    )
    return calls


def of_one_query(parts):
    return [replace(s, query=parts[0].query) for s in parts]


@pytest.mark.parametrize("lengths", [[0], [1], [9], [4, 5], [0, 3], [2, 0, 6]])
@pytest.mark.parametrize("t", [1, 3, 8])
@pytest.mark.parametrize("masks", [True, False])
def test_fused_is_naive(fusing, lengths, t, masks):
    agree(of_one_query(segments(len(lengths), lengths, t=t, masks=masks, up="none")))
    assert fusing or lengths == [0]


@pytest.mark.parametrize("up", ["shared", "per head"])
def test_fused_is_naive_where_values_are_mapped_up(fusing, up):
    agree(segments(3, [9], t=8, up=up))
    assert fusing


def test_fused_reads_no_more_than_some_query_sees(fusing):
    part = segments(0, [9], t=8)[0]
    causal = torch.ones(1, 8, 9, dtype=torch.bool).tril(1)
    agree([replace(part, mask=causal)])
    agree([replace(part, mask=causal.triu(0))])  # a window of two
    assert [call[1].shape[2] for call in fusing] == [4, 7, 9, 4, 4, 3]


def test_fused_queries_that_see_nothing_get_zero(fusing):
    part = segments(0, [9], t=8)[0]
    mask = torch.ones(2, 8, 9, dtype=torch.bool)
    mask[:, :4], mask[1, 5] = False, False  # a whole block, a part of the next, and one query of one row
    out = agree([replace(part, mask=mask)])
    assert not out[:, :, :, :4].any() and not out[1, :, :, 5].any() and out[0, :, :, 5].any()


def test_fused_takes_only_what_it_can(fusing):
    biased = replace(segments(0, [4])[0], bias=torch.randn(2, 2, 4))
    for parts, softcap in (
        ([biased], None),
        (segments(0, [4]), 1.5),
        (segments(0, [3, 2], up="none"), None),
        (segments(0, [3, 2]), None),
    ):
        agree(parts, softcap)
    assert not fusing


def test_widths_may_differ_between_segments():
    wide, narrow = segments(0, [4], rank=5), segments(1, [3], rank=2)
    agree(wide + narrow)


def test_a_masked_and_an_unmasked_segment_share_one_softmax():
    agree(segments(0, [4]) + segments(1, [3], masks=False))


def test_one_mask_may_serve_all_rows():
    a, b = segments(0, [4]), segments(1, [3])
    shared = Segment(a[0].query, a[0].keys, a[0].values, a[0].mask[:1], a[0].up)
    agree([shared, *b])


def test_a_query_that_may_see_nothing_gets_zero():
    part = segments(0, [4])[0]
    mask = part.mask.clone()
    mask[0, 1] = False
    out = agree([Segment(part.query, part.keys, part.values, mask, part.up)])
    assert not out[0, :, :, 1].any() and out[1].any()


def test_nothing_stored_gives_zero():
    assert not agree(segments(0, [0])).any()


def test_softcap_matters():
    parts = segments(0, [5])
    assert not torch.allclose(agree(parts, 0.5), agree(parts), atol=1e-2)


def test_one_segment_without_map_is_torchs_own_attention():
    part = segments(0, [5], up="none", g=1)[0]
    mask = torch.ones(2, 3, 5, dtype=torch.bool).tril(2)
    ours = grouped.attend([Segment(part.query, part.keys, part.values, mask)], 0.7)[:, :, 0]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        part.query[:, :, 0], part.keys, part.values, mask.unsqueeze(1), scale=0.7
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_cutting_the_keys_into_segments_changes_nothing():
    part = segments(0, [7])[0]
    cut = [
        Segment(part.query, part.keys[:, :, i:j], part.values[:, :, i:j], part.mask[..., i:j], part.up)
        for i, j in ((0, 3), (3, 7))
    ]
    assert torch.allclose(grouped.attend(cut, 0.7), grouped.attend([part], 0.7), atol=1e-6)


@pytest.mark.parametrize("block", [1, 40, 80, 120])
@pytest.mark.parametrize("masks", [True, False])
def test_blocks_of_queries_change_nothing(monkeypatch, block, masks):
    """8 rows x heads and 5 keys: 40 scores per query, so blocks of 1, 1, 2 and 3 of the 7 queries."""
    parts = segments(0, [3, 2], t=7, masks=masks)
    whole, calls, inner = grouped.attend(parts, 0.7), [], grouped._block
    monkeypatch.setattr(grouped, "SCORES_AT_ONCE", block)
    monkeypatch.setattr(
        grouped, "_block", lambda rows, *rest: calls.append(rows[0].query.shape[3]) or inner(rows, *rest)
    )
    assert torch.allclose(grouped.attend(parts, 0.7), whole, atol=1e-6)
    assert sum(calls) == 7 and max(calls) == max(1, block // 40)


def test_bf16_scores_are_softmaxed_in_fp32():
    """Many equal keys: in bf16 the sum of the weights would drift."""
    part = Segment(
        torch.zeros(1, 1, 1, 1, 4).bfloat16(),
        torch.zeros(1, 1, 1000, 4).bfloat16(),
        torch.ones(1, 1, 1000, 4).bfloat16(),
    )
    assert torch.allclose(grouped.attend([part], 1.0).float(), torch.ones(1, 1, 1, 1, 4), atol=0.01)


@pytest.mark.parametrize(("groups_k", "groups_v"), [(2, 1), (1, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("masks", [True, False])
def test_segments_may_store_different_numbers_of_heads(groups_k, groups_v, masks):
    """Four KV heads of two queries each; one segment keeps them apart, the other merges them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    apart = segments(1, [5], h=4, masks=masks)[0]
    mask = draw(2, 3, 7) > 0 if masks else None
    merged = Segment(
        draw(2, groups_k, 8 // groups_k, 3, 9),
        draw(2, groups_k, 7, 9),
        draw(2, groups_v, 7, 11),
        mask,
        draw(4, 11, D),
    )
    agree([merged, apart])
    agree([apart, merged], 1.5)
    assert agree([merged]).shape == (2, 4, 2, 3, D)


def test_fused_is_naive_where_stored_heads_stand_for_several(fusing):
    generator = torch.Generator().manual_seed(0)
    query, keys, values, up = (
        torch.randn(*shape, generator=generator)
        for shape in ((2, 2, 4, 5, 9), (2, 2, 7, 9), (2, 1, 7, 11), (4, 11, D))
    )
    agree([Segment(query, keys, values, torch.ones(1, 5, 7, dtype=torch.bool).tril(2), up)])
    assert fusing
