"""An evaluation that is interrupted resumes to the same rows; another job starts from the beginning."""

from __future__ import annotations

import itertools

import pico
import pytest
from evaluations import BATCH, COUNT, LENGTH, OTHER, TEXT, TIMES, Counted, calibrated, run

from lowkey import LowkeyError
from lowkey.core.progress import silent
from lowkey.evaluate.result import Task, evaluate, evaluation_job
from lowkey.evaluate.settings import planned


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
        names = ("decode",) if change == "names" else ("perplexity",)
        context = 24 if change == "context" else LENGTH
        run(settings[:-1] if change == "settings" else settings, names, tmp_path / "work", context=context)
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
