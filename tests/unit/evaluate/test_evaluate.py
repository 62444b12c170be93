"""Evaluation against slow, direct computations with transformers' own forward."""

from __future__ import annotations

import itertools
import math
import string

import dense
import pico
import pytest
import torch

import lowkey
from lowkey import LowkeyError, Sample
from lowkey.core.progress import silent
from lowkey.evaluate import footprint, layerwise, likelihood
from lowkey.evaluate.intervals import half_width, t95
from lowkey.evaluate.result import TASKS, Task, evaluate, evaluation_job
from lowkey.evaluate.settings import Setting, distinct, full, packed, planned
from lowkey.methods import PCA
from lowkey.models import families
from lowkey.storage.coded import Exact

TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
OTHER = "".join(string.printable[(i * i * 3 + 11 * i) % 95] for i in range(300))
LENGTH, COUNT, BATCH = 25, 5, 2  # an odd length
TIMES = ("prefill_ms", "step_ms")


def windows() -> torch.Tensor:
    """The scored windows, cut by hand."""
    ids = pico.tokenizer()(OTHER).input_ids
    return torch.tensor([[0, *ids[i * (LENGTH - 1) : (i + 1) * (LENGTH - 1)]] for i in range(COUNT)])


def calibrated(budget: str, **kwargs: object) -> lowkey.Plan:
    """Without a window of exact tokens, which would be all of these short texts."""
    sample, words = Sample(windows=8, length=24, batch=4), kwargs.pop("seed_text", TEXT)
    given = {"method": PCA(), "budget": budget, "sample": sample, "sinks": 0, "recent": 0, **kwargs}
    return lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), words, **given)


def integers(model, bits: int) -> Setting:
    """Alone, again without a window."""
    return packed(model, bits, Exact())


@pytest.fixture(scope="module")
def half():
    return calibrated("50%")


@pytest.fixture(scope="module")
def settings(half):
    model = pico.attached("llama")
    whole = calibrated("100%")
    assert set(whole.ranks.values()) == {(pico.HEAD_DIM, pico.HEAD_DIM)}
    return [
        full(model),
        planned(model, whole, "whole"),
        planned(model, half, "half"),
        integers(model, 8),
        integers(model, 4),
    ]


def run(settings, names=("perplexity",), work=None, **task: object) -> dict:
    what = Task({"other": OTHER}, **{"context": LENGTH, "windows": COUNT, "batch": BATCH, "cases": 1, **task})
    return evaluate(pico.attached("llama"), pico.tokenizer(), settings, what, names, work=work)


def by_name(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


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


@pytest.fixture(scope="module")
def rows(settings):
    """Rows by name, with likelihoods, layer errors and bytes."""
    return by_name(run(settings, ("perplexity", "decode", "layers")))


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


def test_decode_only_reads_the_first_half_exactly_and_then_token_by_token(rows, half):
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


def test_a_hopeless_perplexity_is_infinite():
    window = {"nll": 1e6, "kl": 1.0, "agree": 0, "tokens": 1}
    assert likelihood.row([window])["perplexity"] == math.inf
    assert math.isnan(likelihood.row([window | {"nll": None}])["perplexity"])


# -- only what was asked for, and no more forward passes than that takes


class Counted:
    """How many tokens a model reads."""

    def __init__(self, model, monkeypatch):
        self.tokens, forward = 0, model.forward

        def counting(input_ids, **kwargs):
            self.tokens += input_ids.numel()
            return forward(input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", counting)


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


# -- unfinished work


class StopError(Exception):
    pass


def stopping(after: int):
    """Progress that ends the work after so many items in all."""
    count = itertools.count()

    def progress(items, label, total=None):
        for item in items:
            if next(count) == after:
                raise StopError
            yield item

    return progress


EVERYTHING = ("perplexity", "decode", "layers", "recall", "speed")


@pytest.mark.parametrize("name", EVERYTHING)
def test_interrupted_work_goes_on_to_the_same_rows(settings, name, tmp_path, monkeypatch):
    task = Task({"other": OTHER}, 192 if name == "recall" else LENGTH, 1 if name == "recall" else COUNT, 2)
    model = pico.attached("llama")

    def again(progress=silent, work=tmp_path / "work"):
        return evaluate(model, pico.tokenizer(), settings, task, (name,), progress, work)["rows"]

    straight = again(work=None)
    for after in (2, 3):
        with pytest.raises(StopError):
            again(stopping(after))
    counted = Counted(model, monkeypatch)
    rest = again()
    partial, counted.tokens = counted.tokens, 0
    again(work=None)
    # one layer at a time, which no forward pass of the model does
    assert partial < counted.tokens or name == "layers"
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in rest] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in straight
    ]


def test_finished_work_is_not_done_again(settings, tmp_path, monkeypatch):
    first = run(settings, EVERYTHING, tmp_path / "work", context=192, windows=1)["rows"]
    counted = Counted(pico.attached("llama"), monkeypatch)
    assert run(settings, EVERYTHING, tmp_path / "work", context=192, windows=1)["rows"] == first
    assert counted.tokens == 0


@pytest.mark.parametrize("change", ["text", "context", "settings", "plan", "names"])
def test_another_job_starts_anew(settings, half, change, tmp_path, monkeypatch):
    model = pico.attached("llama")
    run(settings, work=tmp_path / "work")
    counted = Counted(model, monkeypatch)
    if change == "plan":  # another one of the same name in the same place
        other = calibrated("50%", allocator="uniform", seed_text=OTHER)
        run([*settings[:2], planned(model, other, "half"), *settings[3:]], work=tmp_path / "work")
    elif change == "text":
        what = Task({"other": TEXT}, LENGTH, COUNT, 1, batch=BATCH)
        evaluate(model, pico.tokenizer(), settings, what, work=tmp_path / "work")
    else:
        run(settings[:-1] if change == "settings" else settings, ("decode",) if change == "names" else ("perplexity",), tmp_path / "work",
            context=24 if change == "context" else LENGTH)  # fmt: skip
    assert counted.tokens >= 4 * COUNT * 24
    assert len(list((tmp_path / "work").iterdir())) == 1


@pytest.mark.parametrize("change", [{"chat_template": "{{ messages[0]['content'] }}"}, {"eos_token": "a"}])
def test_what_a_tokenizer_says_of_turns_is_part_of_the_job(settings, change):
    model, other, what = (
        pico.attached("llama"),
        pico.tokenizer(),
        Task({"text": TEXT}, LENGTH, COUNT, 1, batch=BATCH),
    )
    for name, value in change.items():
        setattr(other, name, value)
    one, same, another = (
        evaluation_job(model, t, settings, what, ("questions",))
        for t in (pico.tokenizer(), pico.tokenizer(), other)
    )
    assert one == same != another


def test_damaged_work_is_told(settings, tmp_path):
    run(settings, work=tmp_path / "work")
    (file,) = tmp_path.glob("work/*/measured.json")
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(LowkeyError, match="unfinished work"):
        run(settings, work=tmp_path / "work")


# -- layers


@torch.no_grad()
def layer_outputs(run_model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What a decoder layer puts out while `run_model(model, ids)` runs."""
    model, seen = pico.build("llama"), []
    hook = families.decoder_layers(model)[layer].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    run_model(model, ids)
    hook.remove()
    return seen[0]


def test_layer_error_is_the_change_of_one_layers_output_when_it_alone_is_compressed(rows, half):
    scored, errors, cosines = windows()[: COUNT // 2], [], []  # half of the windows
    for i, factors in half.factors.items():
        for row in scored.split(1):
            exact = layer_outputs(lambda model, ids: model(ids), row, i)
            near = layer_outputs(
                lambda model, ids, i=i, f=factors: dense.logits(model, ids, {i: f}, half.layout, Exact()),
                row,
                i,
            )
            pairs = zip(near[0], exact[0], strict=True)
            # the output of <s> is zero
            tokens = [float((a - b).norm() / b.norm()) if b.any() else 0.0 for a, b in pairs]
            errors.append(sum(tokens) / len(tokens))
            cosines.append(float(torch.cosine_similarity(near, exact, dim=-1).mean()))
    assert (
        rows["pca 50%"]["layer_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        and sum(errors) > 0.1
    )
    assert rows["pca 50%"]["layer_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_the_full_cache_has_no_layer_error(rows):
    assert rows["full"]["layer_error"] == 0.0 and rows["pca 100%"]["layer_error"] < 1e-5


def test_layers_that_slide_are_not_counted(half):
    """Gemma 2's first layer slides; only the others can be compressed."""
    model, ids = pico.attached("gemma2"), windows()
    found = layerwise.measure_layers(model, [full(model), integers(model, 4)], ids, BATCH, silent)
    assert found["full"]["layer_error"] == 0.0 < found["int4"]["layer_error"]


# -- bytes


def test_bytes_of_the_full_cache(rows):
    assert (
        rows["full"]["bytes_held"]
        == rows["full"]["bytes_full"]
        == pico.LAYERS * 2 * 4 * LENGTH * pico.HEAD_DIM * 4
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_packed_integers(rows, bits):
    codes, constants = pico.HEAD_DIM * bits // 8, 2 * 4  # a scale and an offset in fp32
    assert rows[f"int{bits}"]["bytes_held"] == pico.LAYERS * (2 * 4 * LENGTH * (codes + constants) + 2 * 8)


def test_bytes_of_a_plan(rows, half):
    places = pico.LAYERS * 2 * 8  # two row positions per layer
    assert rows["pca 50%"]["bytes_held"] == half.bytes_per_token(4) * LENGTH + places


def test_bytes_are_held_as_predicted(rows):
    assert [r["bytes_held"] for r in rows.values()] == [r["bytes_predicted"] for r in rows.values()]
    assert [r["bytes_per_token"] * LENGTH for r in rows.values()] == pytest.approx(
        [r["bytes_held"] for r in rows.values()]
    )


def test_sliding_layers_hold_as_predicted():
    model = pico.attached("gemma2")
    found = footprint.measure_footprint(
        model, pico.tokenizer(), [full(model), packed(model, 8)], pico.prompt(40, 1), silent
    )
    for row in found.values():
        assert row["bytes_held"] == row["bytes_predicted"]
    slides = 2 * 4 * (pico.WINDOW - 1) * pico.HEAD_DIM * 4
    assert found["full"]["bytes_held"] == slides + 2 * 2 * 4 * 40 * pico.HEAD_DIM * 4


def test_times_are_measured_when_asked_for(settings):
    row = run(settings, ("speed",))["rows"][2]
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
    twice = [
        full(model),
        planned(model, half, "x/a"),
        planned(model, half, "x/b"),
        packed(model, 8, Exact()),
        packed(model, 8),
    ]
    result = run(twice, ("layers",))["rows"]
    assert [row["name"] for row in result] == [
        "full",
        "pca 50% a",
        "pca 50% b",
        "int8",
        "int8 + 4 sinks + 32 recent",
    ]
    assert [row["plan"] for row in result] == [None, "x/a", "x/b", None, None]
    assert result[1]["layer_error"] == result[2]["layer_error"]
    assert [s.name for s in distinct(settings)] == [s.name for s in settings]


def test_a_name_says_in_what_plans_differ():
    model = pico.attached("llama")
    sample = Sample(windows=8, length=24, batch=4)

    def made(layout, **options):
        method = lowkey.methods.KQSVD(**options)
        plan = lowkey.calibrate(
            model,
            pico.tokenizer(),
            TEXT,
            method=method,
            budget="50%",
            layout=layout,
            sample=sample,
            allocator="uniform",
        )
        return planned(model, plan, f"plans/{layout}-{options}")

    plans = [made("pre_rope", group=2), made("pre_rope"), made("post_rope")]
    names = [s.name for s in distinct([full(model), *plans])]
    assert names == ["full", "kq-svd 50% pre_rope group=2", "kq-svd 50% pre_rope", "kq-svd 50% post_rope"]
    assert [s.name for s in distinct([full(model), plans[0]])] == ["full", "kq-svd 50%"]


def test_a_setting_given_twice_is_refused(half):
    model = pico.attached("llama")
    with pytest.raises(LowkeyError, match="'int8': is given twice"):
        distinct([full(model), packed(model, 8), packed(model, "int8")])
    with pytest.raises(LowkeyError, match="given twice"):
        distinct([planned(model, half, "a"), planned(model, half, "a")])


def test_a_plan_row_carries_its_profile(settings, half):
    row = run(settings, ("speed",))["rows"][2]
    assert row["profile"]["chosen"] == [list(pair) for pair in half.ranks.values()]
    assert (row["method"], row["layout"], row["budget"]) == ("pca", "post_rope", "50%")


def test_the_environment_names_the_data(settings):
    data = run(settings[:1], ("speed",))["environment"]["data"]
    assert (data["name"], data["tokens"], data["context"]) == ("other", COUNT * LENGTH, LENGTH)


def test_recall_through_a_model_that_knows_nothing_is_no_evidence(settings):
    rows = run(settings, ("recall",), context=192, windows=1)["rows"]
    assert [row["exact_match"] for row in rows] == [0.0] * 5 and not any(
        row["recall_evidence"] for row in rows
    )
    assert "no evidence" in rows[0]["recall_note"] and [
        row["recall_kept"] for row in rows[:3]
    ] == pytest.approx([1, 1, 0.5], rel=1e-3)


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
