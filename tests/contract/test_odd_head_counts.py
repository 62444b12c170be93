"""Models of 1, 3, 5 or 7 KV heads: counts that powers of two do not divide.

What an error recommends is typed as it stands, and must work.
"""

from __future__ import annotations

import re

import pico
import pytest
import torch
from commands import done, printed, refused
from pico import HEAD_DIM, feed, prompt
from transformers import AutoModelForCausalLM

import lowkey
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.statistics import gather_statistics
from lowkey.methods import MEA, KVHeadSVD
from lowkey.plan.plan import Plan
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe

SAMPLE = ("--windows", 4, "--context", 24, "--sinks", 0, "--recent", 0)
WHOLE = {
    "mea": MEA("activations"),
    "layer": KVHeadSVD(),
    "commuting": KVHeadSVD(keys="commuting"),
    "grouped": KVHeadSVD(keys="grouped"),
}


def build(heads):
    return lowkey.attach(
        pico.build(
            "llama", num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * HEAD_DIM
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a saved model of so many KV heads, with three query heads each."""
    made = {}

    def saved(heads):
        if heads not in made:
            shape = {
                "num_attention_heads": 3 * heads,
                "num_key_value_heads": heads,
                "hidden_size": 48 * heads,
                "pad_token_id": None,
            }
            made[heads] = pico.save(tmp_path_factory.mktemp("few") / f"pico-{heads}", **shape)
        return made[heads]

    return saved


def calibrated(model, method, budget):
    sample = Sample(4, 24)
    return lowkey.calibrate(
        model, pico.tokenizer(), method=method, budget=budget, sample=sample, sinks=0, recent=0
    )


@pytest.mark.parametrize(("heads", "kept"), [(3, 1), (3, 2), (5, 3), (7, 6)])
@pytest.mark.parametrize("method", WHOLE)
def test_so_many_of_an_odd_number_of_heads_are_kept_whole(method, heads, kept):
    """The budget is met to the byte, and so many whole heads are what is stored."""
    model = build(heads)
    plan = calibrated(model, WHOLE[method], f"{100 * kept / heads + 0.01:.2f}%")
    cache = lowkey.make_cache(model, plan)
    feed(model, prompt(20), cache)
    before = cache.nbytes()
    assert before == cache.predicted_nbytes()
    feed(model, prompt(1), cache)
    assert cache.nbytes() - before == 2 * plan.bytes_per_token(4) == 2 * 3 * 2 * kept * HEAD_DIM * 4
    assert all(x.shape[-1] == kept * HEAD_DIM for f in plan.factors.values() for x in (f.k_down, f.v_down))
    assert {r for pair in plan.ranks.values() for r in pair} == {-(-kept * HEAD_DIM // heads)}


@pytest.mark.parametrize(("budget", "kept"), [("20.9%", 2), ("20.8%", 1)])
def test_packed_whole_heads_are_counted_by_what_is_stored(budget, kept):
    """32 numbers of a byte and two floats are 40 of 192 bytes, 20.83 %."""
    model = build(3)
    plan = lowkey.calibrate(
        model,
        pico.tokenizer(),
        method=KVHeadSVD(),
        budget=budget,
        sample=Sample(4, 24),
        sinks=0,
        recent=0,
        bits=8,
        at=500,
    )
    assert {f.v_down.shape[-1] for f in plan.factors.values()} == {kept * HEAD_DIM}


@pytest.mark.parametrize("method", WHOLE)
def test_a_plan_of_odd_heads_survives_saving_and_resuming(method, tmp_path):
    model = build(3)
    sample = Sample(4, 24)
    asked = {"method": WHOLE[method], "budget": "67%", "sample": sample, "work": tmp_path / "work"}
    first, again = (lowkey.calibrate(model, pico.tokenizer(), **asked) for _ in range(2))
    first.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan", model)
    want = feed(model, prompt(20), lowkey.make_cache(model, first))
    for plan in (again, back):
        assert plan.ranks == first.ranks and plan.bytes_per_token(2) == first.bytes_per_token(2)
        assert torch.equal(feed(model, prompt(20), lowkey.make_cache(model, plan)), want)


def test_two_of_three_virtual_heads_are_the_best_two_mixtures():
    """By a formula of its own: the two eigenvectors of the 3 x 3 Gram, each over all channels."""
    model, rows = build(3), prompt(20, batch=8)
    inputs, stats = dict(layer_inputs(model, rows, 4))[1], gather_statistics(model, rows[:-2].split(4))[1]
    probe = LayerProbe.of(model, 1, "post_rope", inputs, 2)
    down = MEA("activations").fit(stats, probe, [6, 11, 16], 0).values.at(11)[0][0].double()
    gram = torch.einsum("hdgd->hg", stats.values.view(3, HEAD_DIM, 3, HEAD_DIM))
    mixing = torch.linalg.eigh(gram).eigenvectors[:, 1:]
    want = torch.kron(mixing @ mixing.mT, torch.eye(HEAD_DIM, dtype=torch.float64))
    assert torch.allclose(down @ down.mT, want, atol=1e-5)


# -- what errors recommend


@pytest.mark.parametrize("method", ["mea", "kv-head-svd"])
@pytest.mark.parametrize("heads", [3, 7])
def test_a_budget_below_one_head_is_refused_with_one_that_works(folder, tmp_path, method, heads):
    told = refused(
        "compress", folder(heads), tmp_path / "plan", "--method", method, "--budget", "10%", *SAMPLE
    )
    budget = re.search(r"; give a budget of ([\d.]+%) or more$", told.strip())
    assert budget, told
    done("compress", folder(heads), tmp_path / "plan", "--method", method, "--budget", budget[1], *SAMPLE)


@pytest.mark.parametrize("method", ["mea", "kv-head-svd"])
def test_a_single_head_is_refused_without_advice_that_fails(folder, tmp_path, method):
    told = refused("compress", folder(1), tmp_path / "plan", "--method", method, *SAMPLE)
    assert told.endswith("only full rank can be chosen; choose another method\n")


def test_ranks_and_multiples_are_named_only_where_they_help(folder, tmp_path):
    start = ("compress", folder(3), tmp_path / "plan", *SAMPLE, "--budget", "34%", "--force")
    assert refused(*start, "--method", "mea", "--rank-multiple", 8).endswith(
        "choose another method, or lower --rank-multiple\n"
    )
    done(*start, "--method", "mea", "--rank-multiple", 1)
    assert refused(*start, "--method", "mea", "--ranks", "11,16").endswith(
        "or give smaller --ranks, down to 6\n"
    )
    done(*start, "--method", "mea", "--ranks", "6,16")


@pytest.mark.parametrize("heads", [5])
def test_an_invalid_group_is_refused_with_a_valid_one(folder, tmp_path, heads):
    start = ("compress", folder(heads), tmp_path / "plan", "--method", "kv-head-svd", *SAMPLE)
    told = refused(*start, "-O", "group=2")
    assert told.endswith(f"must divide the model's {heads} KV heads; choose one of {heads}\n")
    done(*start, "-O", f"group={heads}")


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_plans_that_export_recommends_run_in_stock_transformers(folder, tmp_path, heads):
    model, pca, plan, out = folder(heads), tmp_path / "pca", tmp_path / "plan", tmp_path / "out"
    done("compress", model, pca, "--method", "pca", "--ranks", "50%", *SAMPLE)
    told = refused("export", model, pca, out)
    words = re.search(r"; compress with (--method [^;(]*?)( \(25% with -O group=4\))?$", told.strip())
    assert words, told
    forms = [words[1].split()] + (
        [[*words[1].split(), "-O", "group=4", "--budget", "25%"]] if words[2] else []
    )
    for form in forms:
        # the last of two budgets counts
        compressed = printed("compress", model, plan, *SAMPLE[:4], *form, "--force")
        done("export", model, plan, out, "--force")
        plain, ours = (
            AutoModelForCausalLM.from_pretrained(out),
            lowkey.attach(AutoModelForCausalLM.from_pretrained(model)),
        )
        kept = plain.config.num_key_value_heads * plain.config.head_dim / (heads * HEAD_DIM)
        assert kept == 1 / (4 if "group=4" in form else 2 if heads < 3 or heads == 4 else heads)
        ids = prompt(20)
        want = feed(ours, ids, lowkey.make_cache(ours, Plan.load(plan, ours)))
        assert torch.allclose(feed(plain, ids), want, atol=1e-4)
        assert compressed["bytes_per_token"]["float32"] == round(2 * 3 * heads * HEAD_DIM * kept * 4)
