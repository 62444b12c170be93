"""What a protocol lets a policy see, on tasks that the embedded model solves."""

from __future__ import annotations

import pytest

from lowkey.evaluate.settings import full
from lowkey.harness.run import measure_tasks
from lowkey.harness.setting import setting_of
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.harness.tasks import load_tasks
from lowkey.models import loading


@pytest.fixture(scope="module")
def tiny():
    return loading.load("tiny")


def measured(tiny, files, settings, **how):
    return measure_tasks(*tiny, settings, load_tasks(files), TaskMeasuring(**how))["rows"]


def score(row, task="local_recall", metric="exact_match,number"):
    return row["harness"][task]["metrics"][metric]


@pytest.fixture(scope="module")
def by_protocol(tiny, task_files):
    """Rows of the full cache and of a quarter. Only the question says which fact is asked for."""
    settings = [full(tiny[0]), setting_of(tiny[0], policy="snapkv", budget="25%")]
    return {
        protocol: measured(tiny, [task_files["recall"]], settings, protocol=protocol, batch_size=4)
        for protocol in ("ask-after", "ask-with")
    }


def test_only_a_known_question_saves_its_answer(by_protocol):
    values = {name: [score(row)["value"] for row in rows] for name, rows in by_protocol.items()}
    assert values["ask-after"][0] == values["ask-with"][0] >= 5 / 6  # the full cache answers under both
    assert values["ask-with"][1] >= values["ask-after"][1] + 0.5


def test_differences_are_paired_with_the_full_cache(by_protocol):
    whole, quarter = by_protocol["ask-after"]
    pairs = list(zip(score(quarter)["values"], score(whole)["values"], strict=True))
    mean, low, high = score(quarter)["difference"]
    assert mean == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))
    assert low <= mean <= high
    assert low < 0
    assert score(whole)["difference"] == [0.0, 0.0, 0.0]


def test_results_carry_bytes_tokens_and_protocol(by_protocol):
    for protocol, (whole, quarter) in by_protocol.items():
        a, b = whole["harness"]["local_recall"], quarter["harness"]["local_recall"]
        assert a["protocol"] == b["protocol"] == protocol
        assert 0.2 < b["kept_bytes"] / a["kept_bytes"] < 0.4
        assert a["context_tokens"] == b["context_tokens"] > 100
        assert (a["question_tokens"] == 1) == (protocol == "ask-with")
        assert 1 <= a["output_tokens"] <= 6
        assert a["over_length"] == 0
        assert quarter["bytes_held"] == b["kept_bytes"]
        assert quarter["bytes_full"] == a["kept_bytes"]


@pytest.mark.parametrize("protocol", ["ask-after", "ask-with"])
@pytest.mark.parametrize("policy", ["snapkv", "streamingllm", "kvzip"])
def test_answers_do_not_depend_on_the_batch(tiny, task_files, policy, protocol):
    files = [task_files[name] for name in ("letters", "endings", "recall")]
    settings = [setting_of(tiny[0], policy=policy, budget="50%")]
    one, eight = (
        measured(tiny, files, settings, protocol=protocol, batch_size=size)[0]["harness"] for size in (1, 8)
    )
    for task, found in one.items():
        for metric, own in found["metrics"].items():
            assert own["values"] == eight[task]["metrics"][metric]["values"], (task, metric)


def test_chunks_change_nothing_of_a_full_cache(tiny, task_files):
    files = [task_files["letters"], task_files["recall"]]
    whole, pieces = (
        measured(tiny, files, [full(tiny[0])], chunk=chunk, batch_size=2)[0]["harness"]
        for chunk in (None, 16)
    )
    for task, found in whole.items():
        for metric, own in found["metrics"].items():
            assert own["values"] == pieces[task]["metrics"][metric]["values"]


def test_a_prompt_without_context_is_compressed_while_decoding(tiny, task_files, tmp_path):
    settings = [full(tiny[0]), setting_of(tiny[0], policy="streamingllm", budget="24 tokens")]
    rows = measured(tiny, [task_files["sums"]], settings, shots=0, limit=2)
    assert rows[0]["harness"]["local_sums"]["protocol"] == "decoding"
    assert rows[1]["bytes_held"] < rows[0]["bytes_held"]


def test_texts_are_scored_over_what_was_kept(tiny, task_files):
    settings = [full(tiny[0]), setting_of(tiny[0], policy="streamingllm", budget="16 tokens")]
    whole, short = measured(tiny, [task_files["texts"]], settings)
    values = [row["harness"]["local_texts"]["metrics"]["word_perplexity"] for row in (whole, short)]
    assert values[1]["value"] > values[0]["value"]
    assert values[1]["difference"][1] > 0  # in nats per word, of every document
    assert short["harness"]["local_texts"]["protocol"] == "rolling"
