"""Perplexity, divergence and agreement against slow computations with transformers' own forward."""

from __future__ import annotations

import math

import dense
import pico
import pytest
import torch
from evaluations import COUNT, LENGTH, OTHER, TEXT, TIMES, Counted, by_name, integers, run, windows

import lowkey
from lowkey.core.intervals import half_width, t95
from lowkey.evaluate import likelihood
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import full, packed, planned
from lowkey.storage.exact import Exact


def test_a_window_of_exact_tokens_beside_what_is_compressed(half):
    """As long as the text, it keeps everything."""
    model = pico.attached("llama")
    found = [
        f(Exact(recent=n))
        for n in (4, LENGTH)
        for f in (lambda e: packed(model, 4, e), lambda e: planned(model, half, "half", exact=e))
    ]
    rows = by_name(run([full(model), *found, integers(model, 4), planned(model, half, "half")]))
    assert list(rows)[1:5] == [
        "int4 + 4 recent",
        "pca 50% + 4 recent",
        f"int4 + {LENGTH} recent",
        f"pca 50% + {LENGTH} recent",
    ]
    assert [rows[name]["recent"] for name in list(rows)[1:]] == [4, 4, LENGTH, LENGTH, 0, 0]
    for name in ("int4", "pca 50%"):
        assert (
            rows[name]["bytes_held"]
            < rows[f"{name} + 4 recent"]["bytes_held"]
            < rows[f"{name} + {LENGTH} recent"]["bytes_held"]
        )
        assert rows[f"{name} + {LENGTH} recent"]["kl"] < 1e-6 < rows[f"{name} + 4 recent"]["kl"]


def reference() -> torch.Tensor:
    """Log-probabilities (n, t, V) of the stock model, one window at a time."""
    return torch.cat([pico.feed(pico.stock("llama"), row.unsqueeze(0)) for row in windows()]).log_softmax(-1)


def compressed(plan: lowkey.Plan, exact: Exact, splits: list[int]) -> torch.Tensor:
    """The same under the plan's factors, with the dense definition of low-rank attention."""
    model = pico.build("llama")
    parts = [
        dense.logits(model, row.unsqueeze(0), plan.factors, plan.layout, exact, splits=splits)
        for row in windows()
    ]
    return torch.cat(parts).log_softmax(-1)


def slow_perplexity(logs: torch.Tensor, first: int) -> float:
    """Of the tokens from index `first` on, one by one."""
    nll = [-float(logs[n, t - 1, row[t]]) for n, row in enumerate(windows()) for t in range(first, LENGTH)]
    return math.exp(sum(nll) / len(nll))


# -- likelihood


def test_perplexity_of_the_full_cache(rows):
    assert rows["full"]["perplexity"] == pytest.approx(slow_perplexity(reference(), 1), rel=1e-5)


def test_decode_only_changes_nothing_for_the_full_cache(rows):
    assert rows["full"]["perplexity_decode"] == pytest.approx(
        slow_perplexity(reference(), LENGTH // 2 + 1), rel=1e-5
    )


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


def test_decode_reads_half_exactly_and_then_single_tokens(rows, half):
    before = LENGTH // 2
    logs = compressed(half, Exact(prefill="exact"), [before] + [1] * (LENGTH - before))
    expected = slow_perplexity(logs, before + 1)
    assert rows["pca 50%"]["perplexity_decode"] == pytest.approx(expected, rel=1e-4)
    # the halves matter
    assert abs(expected / slow_perplexity(compressed(half, Exact(), [LENGTH]), before + 1) - 1) > 1e-3


@torch.no_grad()
def test_packed_integers_token_by_token(rows):
    model, nll = pico.attached("llama"), []
    for row in windows():
        cache = lowkey.make_cache(model, bits=4, exact=Exact())
        for t in range(LENGTH - 1):
            logs = model(row[None, t : t + 1], past_key_values=cache).logits[0, -1].log_softmax(-1)
            nll.append(-float(logs[row[t + 1]]))
    assert rows["int4"]["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_more_bits_are_closer(rows):
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"]


def test_every_window_has_its_sums(rows, half):
    logs, full, per = compressed(half, Exact(), [LENGTH]), reference(), rows["pca 50%"]["per_window"]
    for n, row in enumerate(windows()):
        assert per["nll"][n] == pytest.approx(
            -sum(float(logs[n, t - 1, row[t]]) for t in range(1, LENGTH)), rel=1e-4
        )
        kl = (full[n].double().exp() * (full[n] - logs[n]).double())[:-1].sum()
        assert per["kl"][n] == pytest.approx(float(kl), rel=1e-3)
    assert per["tokens"] == [LENGTH - 1] * COUNT


def test_intervals_are_over_windows(rows, settings):
    """Student's t from a table: 2.776 for five windows."""
    row = rows["pca 50%"]
    kl = [x / (LENGTH - 1) for x in row["per_window"]["kl"]]
    spread = math.sqrt(sum((x - sum(kl) / 5) ** 2 for x in kl) / 4 / 5)
    assert row["kl_95"] == pytest.approx(2.776 * spread, rel=5e-3)
    nll = [x / (LENGTH - 1) for x in row["per_window"]["nll"]]
    spread = math.sqrt(sum((x - sum(nll) / 5) ** 2 for x in nll) / 4 / 5)
    assert row["perplexity_95"] == pytest.approx(row["perplexity"] * 2.776 * spread, rel=5e-3)
    assert by_name(run(settings[:1], windows=2))["full"]["kl_95"] is None


@pytest.mark.parametrize(
    "freedom, t",
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (11, 2.201), (30, 2.042)],
)
def test_students_t(freedom, t):
    assert t95(freedom) == pytest.approx(t, rel=2e-3)


def test_an_interval_needs_three_values_unless_two_are_asked_for():
    assert half_width([1.0, 2.0]) is None and half_width([1.0], least=1) is None
    assert half_width([1.0, 2.0], least=2) == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_windows_are_taken_from_each_text_in_turn(settings):
    """Three of one text, of which the second has one only."""
    ids = [pico.tokenizer()(words).input_ids for words in (OTHER, TEXT[:30])]
    body = LENGTH - 1
    expected = [ids[0][:body], ids[1][:body], ids[0][body : 2 * body], ids[0][2 * body : 3 * body]]
    what = Task({"a": OTHER, "b": TEXT[:30]}, LENGTH, 4)
    result = evaluate(pico.attached("llama"), pico.tokenizer(), settings[:1], what)
    logs = [pico.feed(pico.stock("llama"), torch.tensor([[0, *row]])).log_softmax(-1)[0] for row in expected]
    nll = [-sum(float(log[t, row[t]]) for t in range(body)) for log, row in zip(logs, expected, strict=True)]
    assert result["rows"][0]["per_window"]["nll"] == pytest.approx(nll, rel=1e-4)
    assert list(result["environment"]["data"]["texts"]) == ["a", "b"]


def test_an_overflowing_perplexity_is_infinite():
    window = {"nll": 1e6, "kl": 1.0, "agree": 0, "tokens": 1}
    assert likelihood.row([window])["perplexity"] == math.inf
    assert math.isnan(likelihood.row([window | {"nll": None}])["perplexity"])


# -- only what was asked for, and no more forward passes than that takes


def test_perplexity_is_one_pass_for_each_setting_and_window(settings, monkeypatch):
    """Bytes come from the same passes."""
    counted = Counted(pico.attached("llama"), monkeypatch)
    rows = run(settings)["rows"]
    assert counted.tokens == len(settings) * COUNT * LENGTH
    assert all(row["bytes_held"] for row in rows) and {
        row[key] for row in rows for key in (*TIMES, "layer_error", "perplexity_decode")
    } == {None}


def test_without_a_task_that_fills_caches_bytes_take_one_prompt(settings, monkeypatch):
    counted = Counted(pico.attached("llama"), monkeypatch)
    assert all(row["bytes_held"] for row in run(settings, ())["rows"])
    assert counted.tokens == len(settings) * LENGTH
