"""Layer errors, bytes, times and names in the rows of a result."""

from __future__ import annotations

import dense
import pico
import pytest
import torch
from evaluations import BATCH, COUNT, LENGTH, TEXT, TIMES, integers, run, windows

import lowkey
from lowkey import LowkeyError, Sample
from lowkey.core.progress import silent
from lowkey.evaluate import footprint, layerwise
from lowkey.evaluate.result import TASKS
from lowkey.evaluate.settings import distinct, full, packed, planned
from lowkey.models import families
from lowkey.storage.exact import Exact

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


def test_layer_error_is_that_of_one_layer_compressed_alone(rows, half):
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
    names = tuple(name for name in TASKS if name != "behaviour")  # needs more words than this text has
    a, b = (run(settings, names, context=192, windows=1)["rows"] for _ in range(2))
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


def test_recall_of_a_random_model_is_no_evidence(settings):
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
