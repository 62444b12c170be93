"""Evaluation against slow, direct computations with transformers' own forward."""

from __future__ import annotations

import math
import string

import dense
import pico
import pytest
import torch

import lowkey
from lowkey import LowkeyError, Sample, families
from lowkey.evaluate import layerwise, likelihood, speed
from lowkey.evaluate.result import TASKS, Task, evaluate
from lowkey.evaluate.settings import distinct, full, packed, planned
from lowkey.layers.coded import Exact
from lowkey.methods import PCA
from lowkey.progress import silent

TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
OTHER = "".join(string.printable[(i * i * 3 + 11 * i) % 95] for i in range(300))
LENGTH, COUNT, BATCH = 25, 5, 2  # an odd length, and a last batch of one
TIMES = ("prefill_ms", "step_ms")


def windows() -> torch.Tensor:
    """The scored windows, cut by hand."""
    ids = pico.tokenizer()(OTHER).input_ids
    return torch.tensor([[0, *ids[i * (LENGTH - 1) : (i + 1) * (LENGTH - 1)]] for i in range(COUNT)])


def calibrated(budget: str, **kwargs: object) -> lowkey.Plan:
    sample = Sample(windows=8, length=24, batch=4)
    return lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), TEXT, method=PCA(), budget=budget, sample=sample, **kwargs)


@pytest.fixture(scope="module")
def half():
    return calibrated("50%")


@pytest.fixture(scope="module")
def settings(half):
    model = pico.attached("llama")
    whole = calibrated("100%")
    assert set(whole.ranks.values()) == {(pico.HEAD_DIM, pico.HEAD_DIM)}
    return [full(model), planned(model, whole, "whole"), planned(model, half, "half"), packed(model, 8), packed(model, 4)]


def run(settings, names=("perplexity",), **task: object) -> dict:
    what = Task(OTHER, "other", **{"context": LENGTH, "windows": COUNT, "batch": BATCH, "cases": 1, **task})
    return evaluate(pico.attached("llama"), pico.tokenizer(), settings, what, names)


def by_name(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_a_window_of_exact_tokens_beside_what_is_compressed(half):
    """As long as the text, it keeps everything."""
    model = pico.attached("llama")
    found = [
        f(Exact(recent=n)) for n in (4, LENGTH) for f in (lambda e: packed(model, 4, e), lambda e: planned(model, half, "half", exact=e))
    ]
    rows = by_name(run([full(model), *found, packed(model, 4), planned(model, half, "half")]))
    assert list(rows)[1:5] == ["int4 + 4 recent", "pca 50% + 4 recent", f"int4 + {LENGTH} recent", f"pca 50% + {LENGTH} recent"]
    for name in ("int4", "pca 50%"):
        assert rows[name]["bytes_held"] < rows[f"{name} + 4 recent"]["bytes_held"] < rows[f"{name} + {LENGTH} recent"]["bytes_held"]
        assert rows[f"{name} + {LENGTH} recent"]["kl"] < 1e-6 < rows[f"{name} + 4 recent"]["kl"]


@pytest.fixture(scope="module")
def rows(settings):
    """Rows by name, with likelihoods, layer errors and bytes."""
    return by_name(run(settings, ("perplexity", "layers")))


def reference() -> torch.Tensor:
    """Log-probabilities (n, t, V) of the stock model, one window at a time."""
    return torch.cat([pico.feed(pico.stock("llama"), row.unsqueeze(0)) for row in windows()]).log_softmax(-1)


def compressed(plan: lowkey.Plan, exact: Exact, splits: list[int]) -> torch.Tensor:
    """The same under the plan's factors, with the dense definition of low-rank attention."""
    model = pico.build("llama")
    parts = [dense.logits(model, row.unsqueeze(0), plan.factors, plan.layout, exact, splits=splits) for row in windows()]
    return torch.cat(parts).log_softmax(-1)


def slow_perplexity(logs: torch.Tensor, first: int) -> float:
    """Of the tokens from index `first` on, one by one."""
    nll = [-float(logs[n, t - 1, row[t]]) for n, row in enumerate(windows()) for t in range(first, LENGTH)]
    return math.exp(sum(nll) / len(nll))


# -- likelihood


def test_perplexity_of_the_full_cache(rows):
    assert rows["full"]["perplexity"] == pytest.approx(slow_perplexity(reference(), 1), rel=1e-5)


def test_decode_only_changes_nothing_for_the_full_cache(rows):
    assert rows["full"]["perplexity_decode"] == pytest.approx(slow_perplexity(reference(), LENGTH // 2 + 1), rel=1e-5)


def test_the_full_cache_agrees_with_itself(rows):
    assert abs(rows["full"]["kl"]) < 1e-7 and rows["full"]["top1_agreement"] == 1.0


def test_full_rank_is_the_full_cache(rows):
    whole, same = rows["pca 100%"], rows["full"]
    assert whole["perplexity"] == pytest.approx(same["perplexity"], rel=1e-4)
    assert whole["perplexity_decode"] == pytest.approx(same["perplexity_decode"], rel=1e-4)
    assert abs(whole["kl"]) < 1e-6 and whole["top1_agreement"] == 1.0


def test_perplexity_of_a_plan(rows, half):
    logs = compressed(half, Exact(), [LENGTH])
    assert rows["pca 50%"]["perplexity"] == pytest.approx(slow_perplexity(logs, 1), rel=1e-4)


def test_kl_and_agreement_of_a_plan(rows, half):
    p, q = (x[:, :-1] for x in (reference().double(), compressed(half, Exact(), [LENGTH]).double()))
    kl = [float((p[n, t].exp() * (p[n, t] - q[n, t])).sum()) for n in range(COUNT) for t in range(LENGTH - 1)]
    agree = [bool(p[n, t].argmax() == q[n, t].argmax()) for n in range(COUNT) for t in range(LENGTH - 1)]
    assert rows["pca 50%"]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3) and sum(kl) > 0.1
    assert rows["pca 50%"]["top1_agreement"] == sum(agree) / len(agree) < 1


def test_decode_only_reads_the_first_half_exactly_and_then_token_by_token(rows, half):
    before = LENGTH // 2
    logs = compressed(half, Exact(prefill="exact"), [before] + [1] * (LENGTH - before))
    expected = slow_perplexity(logs, before + 1)
    assert rows["pca 50%"]["perplexity_decode"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected / slow_perplexity(compressed(half, Exact(), [LENGTH]), before + 1) - 1) > 1e-3  # the halves matter


@torch.no_grad()
def test_packed_integers_token_by_token(rows):
    model, nll = pico.attached("llama"), []
    for row in windows():
        cache = lowkey.make_cache(model, bits=4)
        for t in range(LENGTH - 1):
            logs = model(row[None, t : t + 1], past_key_values=cache).logits[0, -1].log_softmax(-1)
            nll.append(-float(logs[row[t + 1]]))
    assert rows["int4"]["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_more_bits_are_closer(rows):
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"]


def test_the_batch_size_does_not_matter(rows, settings):
    other = by_name(run(settings, batch=3))
    for name, row in other.items():
        assert row["perplexity"] == pytest.approx(rows[name]["perplexity"], rel=1e-5)
        assert row["kl"] == pytest.approx(rows[name]["kl"], rel=1e-3, abs=1e-7)


def test_a_hopeless_perplexity_is_infinite():
    assert likelihood.Tally(nll=1e6, nll_decode=1e6, tokens=1, tokens_decode=1).row()["perplexity"] == math.inf
    assert math.isnan(likelihood.Tally(nll=math.nan, nll_decode=1.0, tokens=1, tokens_decode=1).row()["perplexity"])


# -- layers


@torch.no_grad()
def layer_outputs(run_model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What a decoder layer puts out while `run_model(model, ids)` runs."""
    model, seen = pico.build("llama"), []
    hook = families.decoder_layers(model)[layer].register_forward_hook(lambda module, args, out: seen.append(out))
    run_model(model, ids)
    hook.remove()
    return seen[0]


def test_layer_error_is_the_change_of_one_layers_output_when_it_alone_is_compressed(rows, half):
    scored, errors, cosines = windows()[: COUNT // 2], [], []  # half of the windows
    for i, factors in half.factors.items():
        for row in scored.split(1):
            exact = layer_outputs(lambda model, ids: model(ids), row, i)
            near = layer_outputs(lambda model, ids, i=i, f=factors: dense.logits(model, ids, {i: f}, half.layout, Exact()), row, i)
            errors.append(float((near - exact).norm() / exact.norm()))
            cosines.append(float(torch.cosine_similarity(near, exact, dim=-1).mean()))
    assert rows["pca 50%"]["layer_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4) and sum(errors) > 0.1
    assert rows["pca 50%"]["layer_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_the_full_cache_has_no_layer_error(rows):
    assert rows["full"]["layer_error"] == 0.0 and rows["pca 100%"]["layer_error"] < 1e-5


def test_layers_that_slide_are_not_counted(half):
    """Gemma 2's first layer slides; only the others can be compressed."""
    model, ids = pico.attached("gemma2"), windows()
    found = layerwise.measure(model, [full(model), packed(model, 4)], ids, BATCH, silent)
    assert found["full"]["layer_error"] == 0.0 < found["int4"]["layer_error"]


# -- bytes


def test_bytes_of_the_full_cache(rows):
    assert rows["full"]["bytes_held"] == rows["full"]["bytes_full"] == pico.LAYERS * 2 * 4 * LENGTH * pico.HEAD_DIM * 4


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_packed_integers(rows, bits):
    codes, constants = pico.HEAD_DIM * bits // 8, 2 * 4  # a scale and an offset in fp32
    assert rows[f"int{bits}"]["bytes_held"] == pico.LAYERS * (2 * 4 * LENGTH * (codes + constants) + 2 * 8)


def test_bytes_of_a_plan(rows, half):
    places = pico.LAYERS * 2 * 8  # two row positions per layer
    assert rows["pca 50%"]["bytes_held"] == half.bytes_per_token(4) * LENGTH + places


def test_bytes_are_held_as_predicted(rows):
    assert [r["bytes_held"] for r in rows.values()] == [r["bytes_predicted"] for r in rows.values()]
    assert [r["bytes_per_token"] * LENGTH for r in rows.values()] == pytest.approx([r["bytes_held"] for r in rows.values()])


def test_sliding_layers_hold_as_predicted():
    model = pico.attached("gemma2")
    found = speed.measure(model, pico.tokenizer(), [full(model), packed(model, 8)], pico.prompt(40, 1), silent)
    for row in found.values():
        assert row["bytes_held"] == row["bytes_predicted"]
    slides = 2 * 4 * (pico.WINDOW - 1) * pico.HEAD_DIM * 4
    assert found["full"]["bytes_held"] == slides + 2 * 2 * 4 * 40 * pico.HEAD_DIM * 4


def test_bytes_and_times_are_measured_whatever_is_asked(settings):
    row = run(settings, ("layers",))["rows"][2]
    assert row["bytes_held"] > 0 and row["prefill_ms"] > 0 and row["step_ms"] > 0
    assert row["perplexity"] is None and row["exact_match"] is None


# -- results


def test_rows_stand_in_the_order_of_the_settings(settings):
    result = run(settings)
    assert list(result) == ["format", "model", "environment", "rows"]
    assert [row["name"] for row in result["rows"]] == ["full", "pca 100%", "pca 50%", "int8", "int4"]
    assert {row["task"] for row in result["rows"]} == {"perplexity"}


def test_the_same_again_gives_the_same(settings):
    a, b = (run(settings, tuple(TASKS), context=192, windows=1)["rows"] for _ in range(2))
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in a] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in b
    ]


def test_settings_of_the_same_name_are_told_apart(half, settings):
    model = pico.attached("llama")
    twice = [full(model), planned(model, half, "a"), planned(model, half, "b"), packed(model, 8), packed(model, 8)]
    result = run(twice, ("layers",))["rows"]
    assert [row["name"] for row in result] == ["full", "pca 50%", "pca 50% (2)", "int8", "int8 (2)"]
    assert [row["plan"] for row in result] == [None, "a", "b", None, None]
    assert result[1]["layer_error"] == result[2]["layer_error"]
    assert [s.name for s in distinct(settings)] == [s.name for s in settings]


def test_a_plan_row_carries_its_profile(settings, half):
    row = run(settings, ("speed",))["rows"][2]
    assert row["profile"]["chosen"] == [list(pair) for pair in half.ranks.values()]
    assert (row["method"], row["layout"], row["budget"]) == ("pca", "post_rope", "50%")


def test_the_environment_names_the_data(settings):
    data = run(settings[:1], ("speed",))["environment"]["data"]
    assert (data["name"], data["tokens"], data["context"]) == ("other", COUNT * LENGTH, LENGTH)


def test_recall_is_scored_through_generate(settings, monkeypatch):
    model = pico.attached("llama")
    monkeypatch.setattr(model, "generate", lambda ids, **_: ids)
    assert [row["exact_match"] for row in run(settings, ("recall",), context=192, windows=1)["rows"]] == [0.0] * 5


@pytest.mark.parametrize(
    "names, task",
    [
        (("perplexitty",), {}),
        ((), {"context": 513}),
        ((), {"context": 7}),
        ((), {"context": 500}),
        (("recall",), {"context": 16}),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_one_line(settings, names, task):
    with pytest.raises(LowkeyError) as refusal:
        run(settings, names, **task)
    assert len(str(refusal.value).splitlines()) == 1


def test_another_models_plan_is_refused(half):
    with pytest.raises(LowkeyError, match="was made for model"):
        planned(pico.attached("llama-mha"), half, "half")
