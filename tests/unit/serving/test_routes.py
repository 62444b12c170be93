"""How layers lie in an engine's pages, and what a token takes there."""

from __future__ import annotations

from dataclasses import replace

import pico
import pytest

from lowkey.serving.routes import (
    CPU_HEAD_SIZES,
    Capacity,
    ExactShape,
    capacity,
    exact_shape,
    projected_shape,
    routes,
)

HEADS, D, BYTES = 4, pico.HEAD_DIM, 4  # of the pico model, in fp32


def routed(sizes=CPU_HEAD_SIZES, own_kernel=False, **fields):
    plan = pico.plan(pico.attached("llama"), **fields)
    return routes(plan, plan.geometry["compressible"], (HEADS, D), BYTES, sizes, own_kernel)


def test_without_a_plan_a_token_takes_its_keys_and_values():
    found = routes(None, range(2), (HEADS, D), BYTES, CPU_HEAD_SIZES)
    assert {r.name for r in found.values()} == {"full"} and found[1].token_bytes == 2 * HEADS * D * BYTES


@pytest.mark.parametrize(
    ("rank", "shape"),
    [
        (8, (1, 32)),  # 4 heads of 8 fill a head of 32
        (16, (2, 32)),  # 2 heads of 16 do
        (12, (1, 48)),  # 4 of 12 make 48; 2 of 12 would be padded to 32 each
        (9, (1, 48)),  # 36 padded to 48; (2, 32) would be 64
    ],
)
def test_latents_lie_side_by_side_in_the_kernels_heads(rank, shape):
    assert projected_shape(pico.factors(HEADS, rank, rank), HEADS, CPU_HEAD_SIZES) == shape


def test_of_equal_shapes_the_one_with_most_heads_is_taken():
    assert projected_shape(pico.factors(HEADS, 8, 8), HEADS, (8, 16, 32)) == (4, 8)


def test_a_latent_wider_than_every_head_has_no_shape():
    assert projected_shape(pico.merged_factors(HEADS, 12, 12, 4, 4), HEADS, (8, 16)) is None


def test_keys_and_values_of_other_merges_share_a_shape():
    """2 latents of keys of 2 heads (24 wide) beside 4 of values (8 wide): 2 heads of 32, or 1 of 48."""
    assert projected_shape(pico.merged_factors(HEADS, 12, 8, 2, 1), HEADS, CPU_HEAD_SIZES) == (1, 48)


def test_a_tie_goes_to_the_engines_kernel():
    found = routed(rank_k=8, rank_v=8)
    assert {(r.name, r.heads, r.width, r.token_bytes) for r in found.values()} == {
        ("projected", 1, 32, 64 * BYTES)
    }


def test_padding_that_takes_more_goes_to_our_own_attention():
    assert {(r.name, r.token_bytes) for r in routed(rank_k=9, rank_v=9).values()} == {
        ("latent", 2 * HEADS * 9 * BYTES)
    }


@pytest.mark.parametrize(
    "fields",
    [{"layout": "pre_rope"}, {"bits": "int8"}, {"own_kernel": True}],
    ids=lambda f: next(iter(f)),
)
def test_what_only_our_own_attention_can_read(fields):
    assert {r.name for r in routed(rank_k=8, rank_v=8, **fields).values()} == {"latent"}


def test_packed_tokens_take_their_codes_scales_and_offsets():
    """Rank 6 in 8 bits: 6 codes, a scale and an offset of 4 bytes for each of 4 heads; keys and values."""
    assert {r.token_bytes for r in routed(bits="int8").values()} == {2 * HEADS * (6 + 8)}


def test_integers_without_maps_keep_every_channel():
    plan = replace(pico.plan(pico.attached("llama")), factors={}, bits="int4")
    found = routes(plan, (0, 1, 2), (HEADS, D), BYTES, CPU_HEAD_SIZES)
    assert {r.token_bytes for r in found.values()} == {2 * HEADS * (D // 2 + 8)}


def test_room_counts_whole_pages():
    """10 pages of 4 tokens: the engine keeps one; a user of 5 tokens has 2."""
    assert capacity(10 * 4 * 100 + 99, 100, 4, 5) == Capacity(tokens=40, users=4)


def test_room_for_nobody():
    assert capacity(10, 100, 4, 5) == Capacity(tokens=0, users=0)


# -- exact tokens


@pytest.mark.parametrize("fields", [{"sinks": 4}, {"recent": 8}, {"bits": "kivi4"}], ids=str)
def test_exact_tokens_lie_beside_latents(fields):
    found = routed(rank_k=8, rank_v=8, **fields)
    assert {r.name for r in found.values()} == {"windowed"}


def test_a_block_of_tokens_shares_scales():
    """Keys of rank 6: 16 bytes of codes, a scale and an offset for 32 tokens; values as in int4."""
    assert {r.token_bytes for r in routed(bits="kivi4").values()} == {HEADS * (6 * 24 / 32 + 3 + 8)}


def test_sizes_of_pages_that_would_be_taken_for_a_pattern():
    """Three layers of three sizes: the smallest page is made as large as the next."""
    plan = pico.plan(pico.attached("llama"), sinks=4)
    factors = {i: pico.factors(HEADS, 6 + i, 6) for i in plan.factors}
    found = routes(replace(plan, factors=factors), (0, 1, 2), (HEADS, D), BYTES, CPU_HEAD_SIZES)
    assert [r.token_bytes for r in found.values()] == [HEADS * BYTES * n for n in (13, 13, 14)]


def exact(block_bytes, **fields):
    """30 layers whose exact tokens take 100 bytes each, beside pages of 128 tokens."""
    return exact_shape(pico.plan(pico.attached("llama"), **fields), 100, 30, 128, block_bytes)


def test_pages_of_exact_tokens():
    """At 16 tokens, 30 pages fit into a block: of 63 tokens, five pages hold all, and one holds the sinks."""
    shape = exact(48000, sinks=4, recent=32, bits="kivi4")
    assert shape == ExactShape(tokens=16, window=63, blocks=6, block_bytes=48000)


def test_pages_of_exact_tokens_larger_than_those_of_latents():
    assert exact(10, recent=8) == ExactShape(tokens=8, window=8, blocks=30 * 2, block_bytes=800)


def test_a_plan_without_exact_tokens_has_no_such_pages():
    assert exact(48000) is None


def test_room_beside_exact_tokens():
    """40 blocks, of which the engine keeps one; a user of 5 tokens has 2 and 6 of exact tokens."""
    shape = ExactShape(tokens=16, window=63, blocks=6, block_bytes=400)
    assert capacity(40 * 400, 100, 4, 5, shape) == Capacity(tokens=34 * 4, users=4)
