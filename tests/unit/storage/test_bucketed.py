"""A cache whose tokens have ranks of their own: the dense definition, bytes, rows of different length."""

from __future__ import annotations

import itertools
from dataclasses import replace

import dense
import pico
import pytest
import torch
from dynamic_plans import LENGTH, LEVELS, WIDTH, make_plan, random_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM, attached, feed, padding, prompt, stock
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.models.fingerprint import model_fingerprint
from lowkey.ops.ragged import join_rows, starts_of
from lowkey.plan.plan import Plan
from lowkey.storage.bucketed import Bucket, BucketedLayer, Gate, truncate_factors
from lowkey.storage.coded import Exact

# -- the definition


def level_of(gate: Gate, keys: Tensor, values: Tensor) -> int:
    """Of one token, from its coordinates (h, d)."""
    x = (torch.cat([keys, values]) * gate.scale).clamp(-8, 8).flatten()
    inside = [torch.nn.functional.gelu(x @ gate.hidden[:, j] + gate.hidden_bias[j]) for j in range(WIDTH)]
    numbers = [
        sum(a * gate.out[j, i] for j, a in enumerate(inside)) + gate.out_bias[i] for i in range(len(LEVELS))
    ]
    return max(range(len(LEVELS)), key=lambda i: float(numbers[i]))


def rebuilt(
    k: Tensor, v: Tensor, plan: Plan, layer: int, turn: Tensor | None, used: list
) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, t, d), one token after another; turn (b, t, d, d) rotates."""
    f, gate = plan.factors[layer], plan.token_ranks.gates[layer]
    keys, values = torch.empty_like(k), torch.empty_like(v)
    for i, m in itertools.product(range(k.shape[0]), range(k.shape[2])):
        plain = k[i, :, m] if turn is None else k[i, :, m] @ torch.linalg.inv(turn[i, m])
        a, b = (
            torch.einsum("hd,hde->he", x, y.expand(len(x), -1, -1))
            for x, y in ((plain, f.k_down), (v[i, :, m], f.v_down))
        )
        used.append(level_of(gate, a, b))
        r = LEVELS[used[-1]]
        back = torch.einsum("hr,hrd->hd", a[:, :r], f.k_up.expand(len(a), -1, -1)[:, :r])
        keys[i, :, m] = back if turn is None else back @ turn[i, m]
        values[i, :, m] = torch.einsum("hr,hrd->hd", b[:, :r], f.v_up.expand(len(b), -1, -1)[:, :r])
    return keys, values


@torch.no_grad()
def oracle(
    name: str, ids: Tensor, plan: Plan, pads=None, splits=None, prefill="compressed", used=None
) -> Tensor:
    """One forward of the whole sequence with dense, masked attention."""
    model, pads, splits = pico.build(name), pads or [0] * len(ids), splits or [ids.shape[1]]
    mask, positions = padding(pads, ids.shape[1])
    exact = dense.exact_pairs(ids.shape[1], pads, Exact(prefill=prefill), splits)

    def attention(module, q, k, v, attention_mask, *, scaling=None, softcap=None, **kwargs):
        if module.layer_idx not in plan.factors:
            return dense._plain(module, q, k, v, attention_mask, scaling=scaling, softcap=softcap)
        turn = (
            dense.rotations(model, module.layer_idx, positions, HEAD_DIM)
            if plan.layout == "pre_rope"
            else None
        )
        near_k, near_v = rebuilt(k, v, plan, module.layer_idx, turn, used if used is not None else [])
        return dense._attend(
            q,
            (k, near_k),
            (v, near_v),
            exact,
            dense._allowed(pads, ids.shape[1]),
            scaling=scaling,
            softcap=softcap,
        )

    AttentionInterface.register("dense-levels", attention)
    AttentionMaskInterface.register("dense-levels", sdpa_mask)
    model.set_attn_implementation("dense-levels")
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def close(a: Tensor, b: Tensor, pads=None) -> bool:
    pads = pads or [0] * len(a)
    return torch.allclose(pico.real(a, pads), pico.real(b, pads), atol=1e-5, rtol=1e-5)


def test_a_gate_takes_a_huge_coordinate_for_a_large_one():
    gate, draw = random_gate(heads=2, seed=0), torch.Generator().manual_seed(0)
    keys, values = (20 * torch.randn(2, 2, 40, HEAD_DIM, generator=draw) for _ in range(2))
    found = gate(keys, values).argmax(-1).flatten().tolist()
    assert found == [
        level_of(gate, keys[i, :, m], values[i, :, m]) for i, m in itertools.product(range(2), range(40))
    ]


@pytest.mark.defines("dynamic methods", "dynakv")
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-mha", "llama-mqa", "gemma2", "gemma3_text", "qwen3", "phi3-partial", "llama-yarn"],
)
def test_the_cache_is_dense_attention_over_rebuilt_tokens(name, layout):
    plan, ids, used = make_plan(name, layout), prompt(LENGTH), []
    expected = oracle(name, ids, plan, splits=[18, *[1] * 6], used=used)
    assert set(used) == set(range(len(LEVELS))), "every level is at work"
    found = feed(attached(name), ids, lowkey.make_cache(attached(name), plan), splits=[18, *[1] * 6])
    assert close(found, expected)


@pytest.mark.parametrize("prefill", ["compressed", "exact"])
@pytest.mark.parametrize("splits", [[24], [1] * 24, [7, 1, 1, 9, 1, 5], [12, 12]])
@pytest.mark.parametrize("pads", [None, [0, 5], [9, 3]])
def test_chunks_and_padding(splits, pads, prefill, layout):
    plan, ids = make_plan("llama", layout), prompt(LENGTH)
    past = lowkey.make_cache(attached("llama"), plan)
    past.exact_prefill(prefill == "exact")
    expected = oracle("llama", ids, plan, pads, splits, prefill)
    assert close(feed(attached("llama"), ids, past, pads, splits), expected, pads)


def test_bases_shared_by_heads(layout):
    plan, ids = make_plan("llama", layout, shared=True), prompt(LENGTH)
    found = feed(attached("llama"), ids, lowkey.make_cache(attached("llama"), plan), splits=[20, 4])
    assert close(found, oracle("llama", ids, plan))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial", "llama-mqa", "qwen2"])
def test_with_every_gate_at_the_top_logits_are_stock(name, layout):
    plan, ids = make_plan(name, layout, level=0), prompt(40)
    found = feed(attached(name), ids, lowkey.make_cache(attached(name), plan), [0, 7], [25, 1, 14])
    assert torch.allclose(
        pico.real(found, [0, 7]), pico.real(feed(stock(name), ids, pads=[0, 7]), [0, 7]), atol=5e-5
    )


@pytest.mark.parametrize("level", [1, 3])
def test_with_every_gate_at_one_level_it_is_a_plan_of_that_rank(level, layout):
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout, level)
    same = pico.lowrank(
        model, {i: truncate_factors(f, LEVELS[level]) for i, f in plan.factors.items()}, layout
    )
    assert close(
        feed(model, ids, lowkey.make_cache(model, plan), splits=[20, 1, 3]),
        feed(model, ids, same, splits=[20, 1, 3]),
    )


def test_chunked_prefill_is_the_whole_prompt_at_once(layout):
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    whole, parts = (
        feed(model, ids, lowkey.make_cache(model, plan), [0, 4], splits) for splits in (None, [3, 1, 13, 7])
    )
    assert close(whole, parts, [0, 4])


def test_generation_over_two_turns_goes_on_where_it_stopped(layout):
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    past = lowkey.make_cache(model, plan)
    first = pico.generate(model, ids, 6, past, [0, 5])
    both = torch.cat([ids, first], 1)
    expected = oracle("llama", both, plan, [0, 5])[:, LENGTH - 1 : -1].argmax(-1)
    assert torch.equal(first, expected)
    assert past.get_seq_length() == LENGTH + 5
    more = torch.cat([both, prompt(4, seed=3)], 1)
    assert close(
        feed(model, more[:, LENGTH + 5 :], past, [0, 5])[:, 1:],
        oracle("llama", more, plan, [0, 5])[:, LENGTH + 6 :],
    )


def test_two_live_caches_do_not_know_of_each_other(layout):
    model, plans = attached("llama"), [make_plan("llama", layout), make_plan("llama", layout, level=1)]
    caches, texts = [lowkey.make_cache(model, p) for p in plans], [prompt(LENGTH, seed=s) for s in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    for start, stop in itertools.pairwise([0, 11, 12, 13, 20, 24]):
        for past, ids, out in zip(caches, texts, found, strict=True):
            out.append(feed(model, ids[:, start:stop], past))
    for plan, ids, out in zip(plans, texts, found, strict=True):
        assert close(torch.cat(out, 1), oracle("llama", ids, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [None, 1])
def test_half_precision(dtype, level, layout):
    """At levels of its own choice it works; at one level, where rounding decides nothing, it gives the
    numbers of full precision.
    """
    model, ids = lowkey.attach(pico.build("llama").to(dtype)), prompt(LENGTH)
    plan = make_plan("llama", layout, level)
    past = lowkey.make_cache(model, replace(plan, provenance={"model_sha256": model_fingerprint(model)}))
    found = feed(model, ids, past, splits=[20, 1, 3])
    assert found.dtype == dtype and past.nbytes() == past.predicted_nbytes() and bool(found.isfinite().all())
    expected = feed(attached("llama"), ids, lowkey.make_cache(attached("llama"), plan), splits=[20, 1, 3])
    assert (
        level is None or torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99
    )


# -- bytes


@pytest.mark.parametrize("pads", [[0, 0], [3, 10]])
def test_bytes_are_a_function_of_the_counts(pads, layout):
    """Levels of all real tokens, counted by the definition; and what is held is what is predicted, at every
    step.
    """
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    past, heads, before = lowkey.make_cache(model, plan), 4, 0
    for size in (10, 1, 1, 9, 3):
        mask, positions = padding(pads, before + size)
        new = {"attention_mask": mask, "position_ids": positions[:, before:]}
        with torch.no_grad():
            model(ids[:, before : before + size], **new, past_key_values=past)
        before += size
        assert past.nbytes() == past.predicted_nbytes()
    real = sum(LENGTH - p for p in pads)
    for layer in past.layers:
        assert (
            isinstance(layer, BucketedLayer)
            and sum(layer.counts) == real
            and all(isinstance(n, int) for n in layer.counts)
        )
        kept = sum(
            n * (2 * heads * r * 4 + (4 if layout == "pre_rope" else 0))
            for n, r in zip(layer.counts, LEVELS, strict=True)
        )
        index = 8 * (len(LEVELS) * (2 + 1) + 2 * 2)  # starts, offset and first
        assert layer.nbytes() == kept + index
    used = []
    oracle("llama", ids, plan, pads, used=used)
    per_layer = [used[i * 2 * LENGTH : (i + 1) * 2 * LENGTH] for i in range(3)]
    padded = {(row * LENGTH + m) for row, p in enumerate(pads) for m in range(p)}
    for layer, levels in zip(past.layers, per_layer, strict=True):
        assert layer.counts == [
            sum(x == i for j, x in enumerate(levels) if j not in padded) for i in range(len(LEVELS))
        ]


def test_fewer_bytes_than_stock_and_none_when_new(layout):
    model, plan = attached("llama"), make_plan("llama", layout)
    past, full = lowkey.make_cache(model, plan), lowkey.make_cache(model)
    assert past.nbytes() == past.predicted_nbytes() == 0
    for each in (past, full):
        feed(model, prompt(200), each)
    assert past.nbytes() < 0.75 * full.nbytes()


def test_a_row_of_padding_alone_holds_nothing(layout):
    """The first chunk holds no real token of the second row."""
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    past = lowkey.make_cache(model, plan)
    found = feed(model, ids, past, [0, 8], [6, 1, 1, 4, 12])
    assert close(found, oracle("llama", ids, plan, [0, 8]), [0, 8])
    assert sum(past.layers[0].counts) == 2 * LENGTH - 8


def test_a_reset_cache_is_a_new_one(layout):
    model, plan = attached("llama"), make_plan("llama", layout)
    past = lowkey.make_cache(model, plan)
    feed(model, prompt(9, batch=3, seed=4), past)
    past.reset()
    assert (past.nbytes(), past.predicted_nbytes(), past.get_seq_length()) == (0, 0, 0)
    assert close(feed(model, prompt(LENGTH), past), oracle("llama", prompt(LENGTH), plan))
    assert past.nbytes() == past.predicted_nbytes()


def test_what_is_held_can_be_moved(layout):
    model, plan, ids = attached("llama"), make_plan("llama", layout), prompt(LENGTH)
    past = lowkey.make_cache(model, plan)
    feed(model, ids[:, :10], past)
    for layer in past.layers:
        layer.offload()
        layer.prefetch()
    assert past.nbytes() == past.predicted_nbytes()
    assert close(feed(model, ids[:, 10:], past), oracle("llama", ids, plan)[:, 10:])


def test_what_cannot_be_done_is_refused(layout):
    model = attached("llama")
    past = lowkey.make_cache(model, make_plan("llama", layout))
    with pytest.raises(LowkeyError, match="crop"):
        past.crop(-2)
    with pytest.raises(LowkeyError, match=r"saving a cache.*a rank of its own.*make_cache"):
        past.save("nowhere")
    with pytest.raises(LowkeyError, match="attach"):
        lowkey.make_cache(pico.build("llama"), make_plan("llama", layout))
    with pytest.raises(LowkeyError, match="made for model"):
        lowkey.make_cache(
            lowkey.attach(pico.build("llama", rms_norm_eps=1e-5, hidden_size=32)), make_plan("llama", layout)
        )


# -- rows of different length


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5),
    heads=st.integers(1, 3),
)
def test_joining_rows(lengths, heads):
    """Against lists of lists: sequences, in each its heads, in each its tokens."""
    name = itertools.count()

    def bucket(sizes):
        tokens = [[next(name) for _ in range(n)] for n in sizes]
        flat = [[100 * t + h] for row in tokens for h in range(heads) for t in row]
        starts = starts_of(torch.tensor(sizes))
        where = torch.tensor([t for row in tokens for t in row], dtype=torch.int32)
        return tokens, Bucket(*(torch.tensor(flat).view(-1, 1).float() for _ in "kv"), starts, where)

    (old, a), (new, b) = (bucket([pair[i] for pair in lengths]) for i in range(2))
    found = a.joined(b, heads)
    both = [x + y for x, y in zip(old, new, strict=True)]
    assert found.keys.flatten().tolist() == [100 * t + h for row in both for h in range(heads) for t in row]
    assert torch.equal(found.keys, found.values) and found.positions.tolist() == [
        t for row in both for t in row
    ]
    assert found.starts.tolist() == [0, *itertools.accumulate(len(row) for row in both)]
    assert found.key_positions(heads).tolist() == [t for row in both for _ in range(heads) for t in row]
    assert found.rows(heads).tolist() == [
        0,
        *itertools.accumulate(len(row) for row in both for _ in range(heads)),
    ]


def test_joining_empty_rows():
    empty = torch.zeros(0, 3)
    assert join_rows(
        empty, torch.zeros(3, dtype=torch.long), empty, torch.zeros(3, dtype=torch.long)
    ).shape == (
        0,
        3,
    )
