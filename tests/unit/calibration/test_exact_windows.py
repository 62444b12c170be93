"""Exact tokens beside a plan: in its budget, its errors and its statistics.

Also plans that name the packing of their latents.
"""

from __future__ import annotations

import string
from dataclasses import replace

import pico
import pytest
import torch
from commands import printed, refused
from forging import edit_json
from pico import LAYERS, attached, prompt
from statistics_by_hand import activations, outer
from transformers import AutoModelForCausalLM

import lowkey
from lowkey import Exact, LowkeyError, Sample
from lowkey.calibration.recommended import Recommended, recommended
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.types import Budget, Factors
from lowkey.methods import KQSVD, PCA, FisherSVD, KVHeadSVD
from lowkey.models import families
from lowkey.plan.card import bytes_kept, plan_card
from lowkey.plan.plan import Plan
from lowkey.plan.reading import PLAN_JSON
from lowkey.plan.window_bytes import CacheBytes
from lowkey.policies import POLICIES
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe, LowRankReconstruction
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.packing import scheme
from lowkey.storage.reconstruction import ReconstructionLayer

TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
FULL = 2 * 4 * pico.HEAD_DIM * 4 * LAYERS  # bytes per token of the pico llama in fp32


def calibrate(method=None, **kwargs) -> Plan:
    given = {
        "method": method or PCA(),
        "sample": Sample(windows=8, length=24, batch=4),
        "allocator": "uniform",
        **kwargs,
    }
    return lowkey.calibrate(attached("llama"), pico.tokenizer(), TEXT, **given)


def held(plan: Plan, tokens: int, model=None) -> int:
    """Bytes of a real cache that has read so many tokens, as it says itself before and after the fact."""
    model = model or attached("llama")
    cache = lowkey.make_cache(model, plan)
    for ids in prompt(tokens, batch=1).split(200, dim=1):
        pico.feed(model, ids, cache)
    assert cache.nbytes() == cache.predicted_nbytes()
    return cache.nbytes()


# -- budgets


@pytest.mark.parametrize(
    ("bits", "at", "budget", "window"),
    [
        (None, 512, "50%", (4, 32)),
        (None, 90, "60%", (1, 7)),
        ("int8", 200, "40%", (4, 32)),
        ("int4", 512, "25%", (4, 32)),
        ("hadamard4", 333, "22%", (0, 5)),
        ("kivi8", 512, "25%", (4, 32)),
        ("kivi4", 509, "25%", (4, 40)),
        ("kivi4", 300, "24%", (0, 0)),  # the scheme keeps 32 recent tokens of its own
        ("kivi2", 400, "330 B/token", (4, 32)),
        ("int8", 256, "150 KiB", (2, 16)),
    ],
)
def test_one_more_rank_would_exceed_the_budget_of_a_cache(bits, at, budget, window):
    plan = calibrate(
        PCA("per_head", "per_head"), budget=budget, bits=bits, at=at, sinks=window[0], recent=window[1]
    )
    room = {"%": lambda n: n / 100 * FULL * at, "B/token": lambda n: n * at, "KiB": lambda n: n * 1024}
    unit = next(u for u in room if budget.endswith(u))
    limit = room[unit](float(budget.removesuffix(unit)))
    (rank,) = {r for pair in plan.ranks.values() for r in pair}
    more = pico.plan(attached("llama"), rank + 1, rank + 1, bits=plan.bits, sinks=window[0], recent=window[1])
    assert plan.bits == bits and rank < 16
    assert held(plan, at) <= limit < held(more, at)


@pytest.mark.parametrize("bits", [None, "int4", "kivi8"])
@pytest.mark.parametrize("group", [2, 0])
@pytest.mark.parametrize("allocator", ["greedy", "uniform"])
def test_merged_heads_hold_the_budget_too(bits, group, allocator, layout):
    plan = calibrate(KQSVD(group=group), budget="35%", bits=bits, at=300, layout=layout, allocator=allocator)
    found = held(plan, 300) / (FULL * 300)
    assert 0.35 - 2 / 16 < found <= 0.35  # two ranks of sixteen, at most


@pytest.mark.parametrize("allocator", ["greedy", "spectrum", "fisher", "depth", "condition", "tail"])
@pytest.mark.parametrize("bits", ["int4", "kivi8"])
def test_a_budget_is_used_however_it_is_split(bits, allocator):
    """Packed, one rank more takes nothing here and the bytes of several ranks there."""
    plan = calibrate(budget="30%", bits=bits, at=400, allocator=allocator)
    assert 0.29 < held(plan, 400) / (FULL * 400) <= 0.3


@pytest.mark.parametrize(("bits", "waiting"), [(None, 0), ("int8", 0), ("kivi4", 31)])
def test_a_longer_cache_holds_the_budget_but_for_waiting_tokens(bits, waiting):
    plan = calibrate(budget="40%", bits=bits, at=256)
    for tokens in (257, 287, 288, 400):
        assert held(plan, tokens) <= 0.4 * FULL * tokens + waiting * FULL


WINDOW, NEAR, IDS = Exact(4, 32), Exact(2, 5), prompt(20, batch=4)


def holding(exact=WINDOW, tokens=512, bits=None) -> CacheBytes:
    return CacheBytes(LAYERS, 4, pico.HEAD_DIM, 4, exact, bits and scheme(bits), tokens)


def test_what_is_left_for_latents_in_numbers():
    """512 tokens of 100 bytes: 30 % are 15360; 36 whole tokens and 3 layers' 24 + 16 bytes of places leave
    the rest to 480 tokens.
    """
    small = CacheBytes(3, 1, 4, 4, Exact(4, 32), None, 512)
    full = 2 * 3 * 4 * 4
    assert small.latent_bytes(Budget(30, "%")) == pytest.approx((0.3 * 512 * full - 36 * full - 3 * 40) / 480)
    assert CacheBytes(3, 1, 4, 4, Exact(), None, 512).latent_bytes(Budget(30, "%")) == pytest.approx(
        0.3 * full
    )
    assert small.latent_bytes(Budget(100, "%")) == full


@pytest.mark.parametrize(
    ("given", "budget", "says"),
    [
        ({}, Budget(512, "tokens"), "per token"),
        ({}, Budget(FULL + 1, "bytes/token"), "more than the 1.5 KiB/token of the full cache"),
        ({}, Budget(2**31, "bytes"), "more than the 1.5 KiB/token of the full cache"),
        ({}, Budget(7, "%"), "of a cache of 512 tokens: 4 sinks and 32 recent tokens alone take 7%.*--at"),
        ({"tokens": 30}, Budget(50, "%"), "of a cache of 30 tokens: 4 sinks and 32 recent tokens alone take"),
        (
            {"tokens": 64, "bits": "kivi4", "exact": Exact()},
            Budget(40, "%"),
            "0 sinks and 32 recent tokens alone take",
        ),
    ],
)
def test_budgets_smaller_than_the_exact_window_are_refused(given, budget, says):
    with pytest.raises(LowkeyError, match=says):
        holding(**given).latent_bytes(budget)


@pytest.mark.parametrize(("bits", "recent"), [(None, 8), ("int4", 8), ("kivi4", 32)])
def test_a_card_says_what_the_whole_cache_holds(bits, recent):
    model = lowkey.attach(pico.build("llama").to(torch.bfloat16))
    plan = pico.plan(model, bits=bits, sinks=2, recent=8, profile={"at": 200})
    share = 100 * held(plan, 200, model) / (FULL / 2 * 200)
    told = (
        f"; a cache of 200 tokens, with 2 sinks and {recent} recent tokens exact, "
        f"holds {share:.1f} % of the full cache"
    )
    assert bytes_kept(plan).endswith(told) and bytes_kept(plan) in plan_card(plan)
    for other in ({"profile": {}}, {"profile": {"at": "x"}}, {"sinks": 0, "recent": 0, "bits": None}):
        assert bytes_kept(replace(plan, **other)).endswith(" %)"), (
            "an old plan, a garbled one, and one without exact tokens"
        )


@pytest.mark.parametrize("bits", [None, "int8", "kivi4"])
@pytest.mark.parametrize("allocator", ["uniform", "greedy"])
def test_a_budget_that_ranks_exceed_is_refused_with_a_valid_one(bits, allocator):
    """Whole heads of two; the windows, and integers, are in the share that is named."""
    options = {"method": KVHeadSVD(), "bits": bits, "allocator": allocator, "at": 300}
    with pytest.raises(
        LowkeyError, match=r"least that the ranks allow; give a budget of [\d.]+% or more$"
    ) as refusal:
        calibrate(budget="20%", **options)
    advised = float(str(refusal.value).split()[-3].removesuffix("%"))
    plan = calibrate(budget=f"{advised}%", **options)
    assert advised / 100 - 0.001 < held(plan, 300) / (FULL * 300) <= advised / 100


@pytest.mark.parametrize("at", [0, -1])
def test_a_cache_of_no_tokens_is_refused(at):
    with pytest.raises(LowkeyError, match=f"^at {at}: "):
        calibrate(at=at)


# -- the packing of a plan


def packed(**fields) -> Plan:
    return pico.plan(attached("llama"), **{"bits": "int4", "sinks": 2, "recent": 5, **fields})


def logits(*args, **kwargs) -> torch.Tensor:
    return pico.feed(attached("llama"), prompt(), lowkey.make_cache(attached("llama"), *args, **kwargs))


def test_a_plans_bits_are_saved_and_used_and_overridden(tmp_path):
    packed().save(tmp_path)
    plan, bare = Plan.load(tmp_path, attached("llama")), packed(bits=None)
    assert plan.bits == "int4" and plan.describe()["format"] == 4
    assert torch.equal(logits(plan), logits(bare, bits=4))
    assert torch.equal(logits(plan, bits="none"), logits(bare)) and not torch.equal(
        logits(plan), logits(bare)
    )
    assert torch.equal(logits(plan, bits="int8"), logits(bare, bits=8)) and not torch.equal(
        logits(plan), logits(bare, bits=8)
    )


@pytest.mark.parametrize("bits", ["int8", "kivi4", None])
def test_bytes_per_token_are_those_of_the_packed_latents(bits):
    """Six channels of each side: int8 6 + 8 bytes; kivi4 keys 3 + 1.5, as 32 tokens share two constants, and
    values 3 + 8.
    """
    size = {"int8": 2 * (6 + 8), "kivi4": 3 + 8 * 6 / 32 + 3 + 8, None: 2 * 6 * 4}[bits]
    assert packed(bits=bits).bytes_per_token(4) == 4 * LAYERS * size


def test_a_cache_over_a_packed_plan_is_saved_and_goes_on(tmp_path):
    packed().save(tmp_path / "plan")
    plan, model, ids = Plan.load(tmp_path / "plan"), attached("llama"), prompt()
    cache = lowkey.make_cache(model, plan)
    first = pico.feed(model, ids[:, :30], cache)
    cache.save(tmp_path / "cache")
    rest = pico.feed(model, ids[:, 30:], lowkey.load_cache(tmp_path / "cache", model))
    assert torch.equal(
        torch.cat([first, rest], 1), pico.feed(model, ids, lowkey.make_cache(model, plan), splits=[30, 10])
    )


@pytest.mark.parametrize("bits", [4, "int3", "", ["int4"], {"a": 1}, True, "x" * 5000, "int4\n"])
def test_garbled_bits_are_refused_in_one_line(tmp_path, bits):
    packed().save(tmp_path)
    edit_json(tmp_path / PLAN_JSON, bits=bits)
    with pytest.raises(LowkeyError, match="bits are") as refusal:
        Plan.load(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 1000


def test_a_plan_of_format_2_says_nothing_of_bits_and_is_loaded(tmp_path):
    packed(bits=None, sinks=0, recent=0).save(tmp_path)
    edit_json(tmp_path / PLAN_JSON, lambda written: written.pop("bits"), format=2)
    plan = Plan.load(tmp_path, attached("llama"))
    assert (plan.bits, plan.sinks, plan.recent) == (None, 0, 0)
    assert torch.equal(logits(plan), logits(packed(bits=None, sinks=0, recent=0)))


# -- the command line

SMALL = ("--windows", 8, "--context", 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("model") / "pico", pad_token_id=None)


def test_compress_takes_bits_and_the_length_of_a_byte_budget(folder, tmp_path):
    words = (
        "--method",
        "pca",
        "--allocator",
        "uniform",
        "--budget",
        "102 KiB",
        "--bits",
        4,
        "--at",
        256,
        *SMALL,
    )
    told = printed("compress", folder, tmp_path / "plan", *words)
    assert (told["bits"], told["profile"]["at"], told["budget"], told["sinks"], told["recent"]) == (
        "int4",
        256,
        "102 KiB",
        4,
        32,
    )
    model = lowkey.attach(AutoModelForCausalLM.from_pretrained(folder))
    assert held(Plan.load(tmp_path / "plan", model), 256, model) <= 102 * 2**10


def test_compress_without_a_method_takes_what_is_recommended(folder, tmp_path):
    words = ("compress", folder, tmp_path / "plan", *SMALL)
    told = printed(*words, "--budget", "25%")
    assert (told["method"]["name"], told["layout"], told["bits"]) == ("fisher-svd", "pre_rope", "kivi4")
    assert printed(*words, "--force", "--bits", "none", "--budget", "40%")["bits"] is None
    assert "name it with --method" in refused(*words, "--force", "-O", "group=2")
    assert "name it with --allocator" in refused(*words, "--force", "-A", "step=0.1")


# -- errors beside exact tokens


def probe(name="llama", layer=1, layout="post_rope", exact=NEAR, ids=IDS) -> LayerProbe:
    return LayerProbe.of(
        attached(name), layer, layout, dict(layer_inputs(attached(name), ids, 4))[layer], 2, exact=exact
    )


@pytest.mark.parametrize("exact", [Exact(2, 5), Exact(3, 0), Exact(0, 4)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_errors_are_those_of_a_cache_with_the_same_exact_tokens(name, layout, exact):
    """By hand: one layer of a real cache compressed, its output token by token, but for the first that see
    nothing compressed.
    """
    model, layer, ids = attached(name), 1, IDS
    f = pico.factors(families.geometry(model).kv_heads, 5, 7)
    cache = lowkey.make_cache(model)
    cache.layers[layer] = CodedLayer(LowRank(f, layout, families.rope(model, layer)), exact)
    with torch.no_grad():
        ours = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states[layer + 1][-2:]
        stock = pico.stock(name)(ids, output_hidden_states=True).hidden_states[layer + 1][-2:]
    first = exact.sinks + exact.recent
    assert torch.allclose(ours[:, :first], stock[:, :first], atol=1e-4)
    found = [
        float((a - b).norm() / b.norm())
        for a, b in zip(ours[:, first:].flatten(0, 1), stock[:, first:].flatten(0, 1), strict=True)
    ]
    assert probe(name, layer, layout, exact, ids).held_out_error(f) == pytest.approx(
        sum(found) / len(found), rel=1e-3
    )


def test_a_window_longer_than_the_text_leaves_no_token_out():
    f = pico.factors(4, 5, 7)
    assert probe(exact=Exact(4, 16)).held_out_error(f) == probe(exact=Exact()).held_out_error(f) > 0.1


def test_reconstruction_beside_exact_tokens_is_differentiable(layout):
    """Along one direction, against central differences."""
    it, f, generator = probe(layout=layout), pico.factors(4, 5, 7), torch.Generator().manual_seed(0)
    maps = [f.k_down, f.k_up, f.v_down, f.v_up]
    ways = [torch.randn(m.shape, generator=generator) for m in maps]

    def out(step: float, tracked: bool = False):
        moved = [(m + step * w).clone().requires_grad_(tracked) for m, w in zip(maps, ways, strict=True)]
        layer = ReconstructionLayer(LowRankReconstruction(Factors(*moved), layout, it.rope), it.exact)
        return (it.run(it.inputs[:2], layer) * it.outputs[:2]).mean(), moved

    value, moved = out(0.0, True)
    value.backward()
    slope = sum(float((m.grad * w).sum()) for m, w in zip(moved, ways, strict=True))
    with torch.no_grad():
        assert slope == pytest.approx(float(out(1e-2)[0] - out(-1e-2)[0]) / 2e-2, rel=2e-2)
    assert all(m.grad.abs().max() > 0 for m in moved)


def test_statistics_leave_the_sinks_of_every_row_out():
    ids, layer = prompt(10, batch=3), 1
    kept = torch.cat([torch.arange(3, 10) + 10 * row for row in range(3)])
    found, all_of = (
        gather_statistics(attached("llama"), ids.split(2), sinks=3)[layer],
        activations("llama", layer, ids),
    )
    keys, values = (all_of[name][kept].flatten(1) for name in ("keys_pre", "values"))
    assert found.tokens == len(kept)
    assert torch.allclose(found.values.double(), outer(values), atol=1e-3)
    assert torch.allclose(found.values_mean.double().flatten(), values.mean(0), atol=1e-4)
    assert torch.allclose(found.keys("pre_rope").double()[1], outer(keys[:, 16:32]), atol=1e-3)
    # the two of the third KV head
    queries = all_of["queries_post"][kept].unflatten(1, (4, 2))[:, 2].flatten(0, 1)
    assert torch.allclose(found.queries("post_rope").double()[2], outer(queries), atol=1e-3)
    assert torch.allclose(found.inputs.double(), outer(all_of["inputs"][kept]), atol=1e-3)


# -- what is measured


@pytest.fixture
def counted(monkeypatch):
    """How many errors of a layer were measured."""
    found, measure = [], LayerProbe.held_out_error
    monkeypatch.setattr(LayerProbe, "held_out_error", lambda *args: found.append(1) or measure(*args))
    return found


@pytest.mark.parametrize("allocator", ["uniform", "fisher", "tail", "depth", "condition"])
def test_an_allocator_that_reads_no_errors_has_none_measured(counted, allocator):
    assert calibrate(allocator=allocator).profile["surface"] is None and not counted


def test_keys_and_values_are_measured_apart(counted):
    """Of 4 ranks 7 pairs have a side in full."""
    both, n = calibrate(allocator="greedy", ranks=4, sinks=2, recent=5), len(counted)
    assert n == LAYERS * 7
    every = calibrate(allocator="greedy", ranks=4, sinks=2, recent=5, pairs=True)
    assert len(counted) - n == LAYERS * 16
    one, other = (torch.tensor(plan.profile["surface"]) for plan in (both, every))
    assert torch.equal(one[:, -1], other[:, -1]) and torch.equal(one[:, :, -1], other[:, :, -1])
    assert torch.allclose(one, other, rtol=0.25) and not torch.equal(one, other)
    assert torch.allclose(one[:, 0, 1], (one[:, 0, -1].square() + one[:, -1, 1].square()).sqrt())


def test_nats_of_keys_and_values_add_up():
    surface = torch.tensor(
        calibrate(allocator="greedy", ranks=2, judge="loss", budget="60%").profile["surface"]
    )
    assert torch.allclose(surface[:, 0, 0], surface[:, 0, 1] + surface[:, 1, 0])


def test_an_error_budget_measures_all_pairs(counted):
    assert (
        calibrate(allocator="pareto", ranks=3, budget=None, error_budget=0.3).profile["surface"] is not None
    )
    assert len(counted) == LAYERS * 9


# -- with a policy


def test_a_policy_keeps_a_plans_window_and_counts_it():
    model, ids = attached("llama"), prompt(60, batch=1)
    policy = POLICIES["streamingllm"]("50%", sinks=0, recent=0)
    cache = lowkey.make_cache(model, pico.plan(model, sinks=4, recent=10), policy)
    pico.feed(model, ids, cache)
    kept = cache.kept_positions(0)
    assert [p.tolist() for p in kept] == [[*range(4), *range(34, 60)]] * 4
    assert cache.layers[0].recent_k.shape[2] == 10 and cache.nbytes() == cache.predicted_nbytes()


@pytest.mark.parametrize(
    ("share", "allocator", "bits"),
    [
        (None, "greedy", "none"),
        (1.0, "spectrum", "none"),
        (0.46, "spectrum", "kivi8"),
        (0.45, "spectrum", "kivi4"),
        (0.1, "spectrum", "kivi4"),
    ],
)
def test_what_is_recommended_at_a_budget(share, allocator, bits):
    assert recommended(attached("llama"), share) == Recommended(FisherSVD(), "pre_rope", allocator, bits)


def test_recommendations_fit_rope_scaling_and_frozen_weights():
    turned = lowkey.attach(
        pico.build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    )
    assert recommended(turned, 0.2) == Recommended(FisherSVD(), "post_rope", "spectrum", "kivi4")
    away = lowkey.attach(pico.build("llama").to("meta"))
    assert recommended(away, 0.2) == Recommended(KQSVD(group=0), "pre_rope", "uniform", "kivi4")


def test_an_error_budget_without_a_method_bounds_measured_errors():
    plan = lowkey.calibrate(
        attached("llama"), pico.tokenizer(), TEXT, error_budget=0.3, sample=Sample(8, 48), sinks=0, recent=0
    )
    assert plan.allocator["name"] == "greedy" and plan.bits is None
    assert (
        plan.profile["bounded"]["what"] == "the largest error of a layer"
        and plan.profile["bounded"]["reached"] <= 0.3
    )
