"""Tokens with ranks of their own: the cache against a dense definition, its bytes, the training of its gates,
and its file.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import cache

import dense
import forging
import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import HEAD_DIM, attached, feed, padding, prompt, stock
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import lowkey
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import (
    DYNAMIC_PLAN_JSON,
    DYNAMIC_PLAN_TENSORS,
    DynamicPlan,
    make_dynamic_cache,
    make_dynamic_plan,
)
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.types import LowkeyError
from lowkey.methods import dynakv
from lowkey.methods.dynakv import GateTraining, ObservedReconstruction, levels_of, train_gates
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.ops.ragged import join_rows, starts_of
from lowkey.probes import model_probe
from lowkey.storage.bucketed import Bucket, BucketedLayer, Gate, truncate_factors
from lowkey.storage.coded import Exact

LEVELS = (16, 8, 4, 2)
WIDTH = 6  # of the gates' hidden layer
LENGTH = 24


def random_gate(heads: int, seed: int, level: int | None = None) -> Gate:
    """One that gives tokens all kinds of levels, or always the same."""
    draw = torch.Generator().manual_seed(seed)
    width = 2 * heads * HEAD_DIM
    out, bias = torch.randn(WIDTH, len(LEVELS), generator=draw), torch.zeros(len(LEVELS))
    if level is not None:
        out, bias = 0 * out, torch.eye(len(LEVELS))[level]
    scale = torch.rand(2 * heads, HEAD_DIM, generator=draw) + 0.5
    return Gate(
        scale,
        torch.randn(width, WIDTH, generator=draw) * width**-0.5,
        torch.randn(WIDTH, generator=draw),
        out,
        bias,
    )


@cache
def make_plan(name: str, layout: str, level: int | None = None, shared: bool = False) -> DynamicPlan:
    model = attached(name)
    shape = families.geometry(model)
    gates = {i: random_gate(shape.kv_heads, i, level) for i in shape.compressible}
    geometry = {"kv_heads": shape.kv_heads, "head_dim": HEAD_DIM}
    about = {"share": 0.5, "divergence": 0.1, "training": {}, "geometry": geometry}
    factors = pico.layer_factors(model, shared=shared)
    return DynamicPlan(
        factors, gates, LEVELS, layout, **about, provenance={"model_sha256": model_fingerprint(model)}
    )


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
    k: Tensor, v: Tensor, plan: DynamicPlan, layer: int, turn: Tensor | None, used: list
) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, t, d), one token after another; turn (b, t, d, d) rotates."""
    f, gate = plan.factors[layer], plan.gates[layer]
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
    name: str, ids: Tensor, plan: DynamicPlan, pads=None, splits=None, prefill="compressed", used=None
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
    found = feed(attached(name), ids, make_dynamic_cache(attached(name), plan), splits=[18, *[1] * 6])
    assert close(found, expected)


@pytest.mark.parametrize("prefill", ["compressed", "exact"])
@pytest.mark.parametrize("splits", [[24], [1] * 24, [7, 1, 1, 9, 1, 5], [12, 12]])
@pytest.mark.parametrize("pads", [None, [0, 5], [9, 3]])
def test_chunks_and_padding(splits, pads, prefill, layout):
    plan, ids = make_plan("llama", layout), prompt(LENGTH)
    past = make_dynamic_cache(attached("llama"), plan)
    past.exact_prefill(prefill == "exact")
    expected = oracle("llama", ids, plan, pads, splits, prefill)
    assert close(feed(attached("llama"), ids, past, pads, splits), expected, pads)


def test_bases_shared_by_heads(layout):
    plan, ids = make_plan("llama", layout, shared=True), prompt(LENGTH)
    found = feed(attached("llama"), ids, make_dynamic_cache(attached("llama"), plan), splits=[20, 4])
    assert close(found, oracle("llama", ids, plan))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial", "llama-mqa", "qwen2"])
def test_with_every_gate_at_the_top_logits_are_stock(name, layout):
    plan, ids = make_plan(name, layout, level=0), prompt(40)
    found = feed(attached(name), ids, make_dynamic_cache(attached(name), plan), [0, 7], [25, 1, 14])
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
        feed(model, ids, make_dynamic_cache(model, plan), splits=[20, 1, 3]),
        feed(model, ids, same, splits=[20, 1, 3]),
    )


def test_chunked_prefill_is_the_whole_prompt_at_once(layout):
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    whole, parts = (
        feed(model, ids, make_dynamic_cache(model, plan), [0, 4], splits) for splits in (None, [3, 1, 13, 7])
    )
    assert close(whole, parts, [0, 4])


def test_generation_over_two_turns_goes_on_where_it_stopped(layout):
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    past = make_dynamic_cache(model, plan)
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
    caches, texts = [make_dynamic_cache(model, p) for p in plans], [prompt(LENGTH, seed=s) for s in (0, 1)]
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
    past = make_dynamic_cache(model, replace(plan, provenance={"model_sha256": model_fingerprint(model)}))
    found = feed(model, ids, past, splits=[20, 1, 3])
    assert found.dtype == dtype and past.nbytes() == past.predicted_nbytes() and bool(found.isfinite().all())
    expected = feed(attached("llama"), ids, make_dynamic_cache(attached("llama"), plan), splits=[20, 1, 3])
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
    past, heads, before = make_dynamic_cache(model, plan), 4, 0
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
    past, full = make_dynamic_cache(model, plan), lowkey.make_cache(model)
    assert past.nbytes() == past.predicted_nbytes() == 0
    for each in (past, full):
        feed(model, prompt(200), each)
    assert past.nbytes() < 0.75 * full.nbytes()


def test_a_row_of_padding_alone_holds_nothing(layout):
    """The first chunk holds no real token of the second row."""
    model, ids, plan = attached("llama"), prompt(LENGTH), make_plan("llama", layout)
    past = make_dynamic_cache(model, plan)
    found = feed(model, ids, past, [0, 8], [6, 1, 1, 4, 12])
    assert close(found, oracle("llama", ids, plan, [0, 8]), [0, 8])
    assert sum(past.layers[0].counts) == 2 * LENGTH - 8


def test_a_reset_cache_is_a_new_one(layout):
    model, plan = attached("llama"), make_plan("llama", layout)
    past = make_dynamic_cache(model, plan)
    feed(model, prompt(9, batch=3, seed=4), past)
    past.reset()
    assert (past.nbytes(), past.predicted_nbytes(), past.get_seq_length()) == (0, 0, 0)
    assert close(feed(model, prompt(LENGTH), past), oracle("llama", prompt(LENGTH), plan))
    assert past.nbytes() == past.predicted_nbytes()


def test_what_is_held_can_be_moved(layout):
    model, plan, ids = attached("llama"), make_plan("llama", layout), prompt(LENGTH)
    past = make_dynamic_cache(model, plan)
    feed(model, ids[:, :10], past)
    for layer in past.layers:
        layer.offload()
        layer.prefetch()
    assert past.nbytes() == past.predicted_nbytes()
    assert close(feed(model, ids[:, 10:], past), oracle("llama", ids, plan)[:, 10:])


def test_what_cannot_be_done_is_refused(layout):
    model = attached("llama")
    past = make_dynamic_cache(model, make_plan("llama", layout))
    with pytest.raises(LowkeyError, match="crop"):
        past.crop(-2)
    with pytest.raises(LowkeyError, match="make_cache"):
        past.save("nowhere")
    with pytest.raises(LowkeyError, match="attach"):
        make_dynamic_cache(pico.build("llama"), make_plan("llama", layout))
    with pytest.raises(LowkeyError, match="made for model"):
        make_dynamic_cache(
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


def test_joining_nothing():
    empty = torch.zeros(0, 3)
    assert join_rows(
        empty, torch.zeros(3, dtype=torch.long), empty, torch.zeros(3, dtype=torch.long)
    ).shape == (
        0,
        3,
    )


# -- training

CYCLE = torch.stack([torch.arange(40).add(i).mul(5).remainder(23).add(1) for i in range(10)])
HELD = 3
SHORT = GateTraining(target=0.3, steps=40, lr=2e-2, hidden=8)


@cache
def found_bases(layout: str, name: str = "llama"):
    return {
        i: dynakv.pca_bases(s, layout)
        for i, s in gather_statistics(attached(name), CYCLE[:-HELD].split(4)).items()
    }


@cache
def trained(layout: str, options: GateTraining = SHORT, name: str = "llama"):
    return train_gates(attached(name), found_bases(layout, name), CYCLE, HELD, layout, options)


def measured(plan: DynamicPlan, ids: Tensor, name: str = "llama") -> tuple[float, float]:
    """(KL(original || cache) per token, the mean share of coordinates held) by a real cache, all levels
    counted.
    """
    model = attached(name)
    past = make_dynamic_cache(model, plan)
    ours, theirs = feed(model, ids, past).softmax(-1), feed(stock(name), ids).softmax(-1)
    held = [
        n * r
        for layer in past.layers
        if isinstance(layer, BucketedLayer)
        for n, r in zip(layer.counts, LEVELS, strict=True)
    ]
    return float((theirs * (theirs / ours).log()).sum(-1).mean()), sum(held) / (
        len(plan.gates) * ids.numel() * HEAD_DIM
    )


def plan_of(gates: dynakv.TrainedGates, layout: str, name: str = "llama") -> DynamicPlan:
    factors = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in found_bases(layout, name).items()}
    return replace(make_plan(name, layout), factors=factors, gates=gates.gates)


def test_levels():
    assert levels_of(128) == (128, 64, 32, 16) and levels_of(20) == (20, 10, 5) and levels_of(7) == (7,)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_judges_what_the_cache_does(name, layout):
    """On the held-out windows, share and divergence are those of a real cache; and the target is met."""
    gates = trained(layout, SHORT, name)
    divergence, share = measured(plan_of(gates, layout, name), CYCLE[-HELD:], name)
    assert share == pytest.approx(gates.share, abs=1e-5) and share <= SHORT.target + 1e-5
    assert divergence == pytest.approx(gates.divergence, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("straight", [False, True])
def test_training_lowers_the_divergence_at_the_same_budget(layout, straight):
    start, end = trained(layout, replace(SHORT, steps=0)), trained(layout, replace(SHORT, straight=straight))
    assert end.divergence < 0.9 * start.divergence and start.share <= SHORT.target + 1e-5
    levels = [level_of_tokens(gate, layout) for gate in end.gates.values()]
    assert any(len(set(x)) > 1 for x in levels), "tokens of a layer differ"


def level_of_tokens(gate: Gate, layout: str) -> list[int]:
    """Of the tokens of the first held-out window as layer 0 sees them."""
    seen = []

    def look(keys, values):
        seen.extend(gate(keys, values).argmax(-1).flatten().tolist())
        return keys, values

    model = attached("llama")
    f = found_bases(layout)[0].at(HEAD_DIM, HEAD_DIM)
    with torch.no_grad():
        model_probe.logits(
            model, CYCLE[-1:], {0: ObservedReconstruction(f, layout, families.rope(model, 0), look)}
        )
    return seen


@pytest.mark.parametrize("target", [0.125, 0.25, 0.4, 1.0])
def test_at_the_start_a_layer_has_one_level_and_the_budget_is_kept(target):
    gates = trained("post_rope", GateTraining(target=target, steps=0, hidden=8))
    levels = [set(level_of_tokens(gate, "post_rope")) for gate in gates.gates.values()]
    assert all(len(x) == 1 for x in levels) and gates.share <= target + 1e-6
    if target == 1.0:
        assert gates.share == 1.0 and gates.divergence < 1e-5


def test_training_that_goes_astray_ends_at_its_start():
    start, end = (trained("post_rope", replace(SHORT, steps=n, lr=lr)) for n, lr in ((0, 1.0), (3, 1e4)))
    assert end.divergence <= start.divergence


def test_training_twice_gives_the_same_gates():
    first, again = (
        train_gates(
            attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=6)
        )
        for _ in "ab"
    )
    for i, gate in first.gates.items():
        assert all(torch.equal(t, getattr(again.gates[i], name)) for name, t in vars(gate).items())
        assert all(not t.requires_grad for t in vars(gate).values())


def stopping_at(last):
    """Progress that is cut off at a training step, as a killed process is."""

    def progress(items, text, total):
        for item in items:
            if text == "training gates" and item == last:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("last", [9, 10, 39])
def test_interrupted_training_goes_on_to_the_same_gates(tmp_path, last):
    """Saved every 8 of 40 steps; a second stop on the way changes nothing either."""
    said = attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", SHORT
    for stop in (last, last):
        with pytest.raises(KeyboardInterrupt):
            train_gates(*said, stopping_at(stop), tmp_path)
    steps = []
    found = train_gates(*said, lambda items, text, total: steps.append((text, total)) or items, tmp_path)
    assert dict(steps)["training gates"] == 40 - last // 8 * 8
    whole = trained("post_rope")
    assert (found.share, found.divergence) == (whole.share, whole.divergence)
    for i, gate in whole.gates.items():
        assert all(torch.equal(t, getattr(found.gates[i], name)) for name, t in vars(gate).items())


def test_a_work_folder_of_another_job_is_emptied(tmp_path):
    def made(target):
        training = GateTraining(target=target, steps=2, hidden=8)
        return make_dynamic_plan(
            attached("llama"), pico.tokenizer(), TEXT, sample=Sample(8, 24), training=training, work=tmp_path
        )

    made(0.4)
    before = list(tmp_path.glob(f"*/{dynakv.GATE_FILE}.safetensors"))
    assert len(before) == 1
    assert made(0.3).share <= 0.3 + 1e-6
    assert not before[0].exists()


def test_training_leaves_the_model_and_the_random_state_alone():
    model = attached("llama")
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    train_gates(model, found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=2))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_relaxed_choice_is_a_mixture_of_what_the_levels_rebuild(layout):
    """Of one layer's keys and values; and its share is the mixture of theirs."""
    maps = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in found_bases(layout).items()}
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    outs: dict[object, list[Tensor]] = {}

    def run(key, choose):
        training = dynakv._GateTrainer(
            attached("llama"), {0: maps[0]}, layout, LEVELS, SHORT, CYCLE, HELD, trained(layout).gates
        )
        plain = dynakv.ObservedReconstruction.update

        def recording(self, keys, values):
            outs[key] = list(plain(self, keys, values))
            return keys, values

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(dynakv.ObservedReconstruction, "update", recording)
            return float(training.forward(CYCLE[:2], training.gates, choose)[1])

    mixed = run("mixed", lambda numbers: weights.expand_as(numbers))
    shares = [run(i, lambda numbers, i=i: torch.eye(4)[i].expand_as(numbers)) for i in range(4)]
    assert shares == [r / HEAD_DIM for r in LEVELS] and mixed == pytest.approx(
        float(weights @ torch.tensor(shares))
    )
    for side in range(2):
        assert torch.allclose(
            outs["mixed"][side], sum(w * outs[i][side] for i, w in enumerate(weights)), atol=1e-5
        )


def test_held_out_windows_are_never_trained_on(monkeypatch):
    seen = []
    inside = dynakv._GateTrainer.loss
    monkeypatch.setattr(
        dynakv._GateTrainer, "loss", lambda self, ids, *rest: seen.append(ids) or inside(self, ids, *rest)
    )
    train_gates(
        attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", replace(SHORT, steps=3)
    )
    training = {tuple(r.tolist()) for r in CYCLE[:-HELD]}
    assert len(seen) == 3 and all(tuple(r.tolist()) in training for ids in seen for r in ids)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.0},
        {"target": 1.5},
        {"steps": -1},
        {"batch": 0},
        {"hidden": 0},
        {"lr": 0.0},
        {"temperature": 0.0},
        {"penalty": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(LowkeyError, match=next(iter(options))):
        GateTraining(**options)


def test_a_target_below_the_least_level_is_refused():
    with pytest.raises(LowkeyError, match=r"0\.125 or more"):
        train_gates(
            attached("llama"), found_bases("post_rope"), CYCLE, HELD, "post_rope", GateTraining(target=0.1)
        )


# -- the plan

TEXT = "the cat sat on the mat. " * 40


def small_plan(layout="post_rope") -> DynamicPlan:
    training = GateTraining(target=0.4, steps=2, hidden=8)
    return make_dynamic_plan(
        attached("llama"), pico.tokenizer(), TEXT, layout=layout, sample=Sample(8, 24), training=training
    )


def test_a_plan_is_made_saved_and_loaded(tmp_path, layout):
    model, ids = attached("llama"), prompt(LENGTH)
    plan = small_plan(layout)
    assert plan.share <= 0.4 + 1e-6 and plan.levels == LEVELS and plan.training["target"] == 0.4
    plan.save(tmp_path / "plan")
    again = DynamicPlan.load(tmp_path / "plan", model)
    assert torch.equal(
        feed(model, ids, make_dynamic_cache(model, plan)), feed(model, ids, make_dynamic_cache(model, again))
    )
    for field in ("layout", "levels", "share", "divergence", "training", "provenance"):
        assert getattr(again, field) == getattr(plan, field)
    plan.save(tmp_path / "plan")


def test_bytes_per_token_are_those_of_a_cache(layout):
    """Were all tokens like the held-out ones: here, at one level."""
    model = attached("llama")
    plan = replace(make_plan("llama", layout, level=1), share=0.5)
    sizes = []
    for length in (12, 24):
        past = make_dynamic_cache(model, plan)
        feed(model, prompt(length), past)
        sizes.append(past.nbytes())
    assert (sizes[1] - sizes[0]) / (2 * 12) == plan.bytes_per_token(4)


def test_another_models_plan_is_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with pytest.raises(LowkeyError, match="made for model"):
        DynamicPlan.load(tmp_path / "plan", lowkey.attach(pico.build("llama-mha")))


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(LowkeyError, match="other files"):
        small_plan().save(tmp_path)


DAMAGE = {
    "newer": lambda about, tensors: about.update(format=99),
    "levels": lambda about, tensors: about.update(levels=[8, 16]),
    "layout": lambda about, tensors: about.update(layout="sideways"),
    "missing": lambda about, tensors: about.pop("share"),
    "numbers": lambda about, tensors: about.update(divergence="little"),
    "huge": lambda about, tensors: about.update(share=10**400),
    "target": lambda about, tensors: about["training"].pop("target"),
    "geometry": lambda about, tensors: about["geometry"].update(head_dim="16"),
    "layers": lambda about, tensors: about.update(layers=[0, 7]),
    "nan": lambda about, tensors: tensors["1.gate.hidden"].fill_(math.nan),
    "shape": lambda about, tensors: tensors.update({"0.gate.out": torch.zeros(3, 3)}),
    "skewed": lambda about, tensors: tensors["2.v_down"].mul_(2),
    "lacking": lambda about, tensors: tensors.pop("2.k_down"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused_in_one_line(tmp_path, kind):
    small_plan().save(tmp_path / "plan")
    about, tensors = (tmp_path / "plan" / name for name in (DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS))
    if kind in ("nan", "shape", "skewed", "lacking"):
        forging.edit_tensors(tensors, lambda found: DAMAGE[kind]({}, found), about)
    else:
        forging.edit_json(about, lambda found: DAMAGE[kind](found, {}))
    with pytest.raises(LowkeyError, match="newer" if kind == "newer" else "damaged") as error:
        DynamicPlan.load(tmp_path / "plan")
    assert "\n" not in str(error.value)


def test_tensors_of_another_plan_are_refused(tmp_path):
    small_plan().save(tmp_path / "plan")
    with (tmp_path / "plan" / DYNAMIC_PLAN_TENSORS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(LowkeyError, match="damaged"):
        DynamicPlan.load(tmp_path / "plan")


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(LowkeyError, match="layout"):
        make_dynamic_plan(attached("llama"), pico.tokenizer(), TEXT, layout="sideways")
