"""`evaluate`: run tasks over settings and give one result, with the environment it was measured in."""

from __future__ import annotations

import datetime
import hashlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core import text
from lowkey.core.files.measured import Measured
from lowkey.core.options import Checked, option
from lowkey.core.processes import ALONE, Processes
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.evaluate import behaviour, footprint, layerwise, likelihood, questions, recall, speed
from lowkey.evaluate.settings import Setting, distinct
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import versions

RESULT_FORMAT = 1


@dataclass(frozen=True)
class Task(Checked):
    """What is measured on.

    Args:
        texts: texts by name.
        context: tokens of a window, of a recall case and of a prompt of behaviour.
        windows: number of windows at most, taken from the texts in turn.
        cases: number of recall cases, and of cases of each kind of behaviour.
        seed: seed of cases and questions.
        batch: windows that a layer reads at a time.
        refeed: whether questions are asked again over what a setting kept.
        questions: number of questions that the full cache is to answer.
        recall_form: form of recall; `usual` for the one that suits the tokenizer.
    """

    texts: Mapping[str, str] = option(any_text=True)
    context: int = option(512, at_least=8, at_most=2**24)
    windows: int = option(16, at_least=1, at_most=2**20)
    cases: int = option(20, at_least=1, at_most=10**6)
    seed: int = option(0, at_least=0)
    batch: int = option(2, at_least=1, at_most=4096)
    refeed: bool = True
    questions: int = option(64, at_least=1, at_most=10**6)
    recall_form: str = option(recall.USUAL_FORM, choices=(recall.USUAL_FORM, *recall.FORMS))


@dataclass
class TaskInput:
    """What tasks need, tokenised once.

    Attributes:
        rows: windows (n, t).
        ids: ids of all texts, one after the other (m).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Sequence[Setting]
    task: Task
    progress: Progress
    measured: Measured

    def __post_init__(self) -> None:
        ids = {
            name: text.encode(self.tokenizer, words, self.model) for name, words in self.task.texts.items()
        }
        cut = [
            text.windows(own, self.tokenizer, self.task.context, f"data {name!r}", 1)
            for name, own in ids.items()
        ]
        self.ids, self.rows = torch.cat(list(ids.values())), text.in_turn(cut)[: self.task.windows]


def _perplexity(run: TaskInput) -> dict[str, dict]:
    return likelihood.measure_likelihood(run.model, run.settings, run.rows, run.progress, run.measured)


def _decode(run: TaskInput) -> dict[str, dict]:
    return likelihood.measure_decode(
        run.model, run.tokenizer, run.settings, run.rows, run.progress, run.measured
    )


def _layers(run: TaskInput) -> dict[str, dict]:
    # Such a model takes the full cache only, so there is nothing to compare.
    if families.stores_own_form(run.model.config):
        return {}
    # Each layer runs on the inputs of all windows at once; half of them are enough and take half the memory.
    rows = run.rows[: max(1, len(run.rows) // 2)]
    return layerwise.measure_layers(run.model, run.settings, rows, run.task.batch, run.progress, run.measured)


def _recall(run: TaskInput) -> dict[str, dict]:
    task = run.task
    recall.check_positions(run.model, run.tokenizer, task.context, task.recall_form)
    return recall.measure_recall(
        run.model,
        run.tokenizer,
        run.settings,
        run.ids.tolist(),
        task.context,
        task.cases,
        task.seed,
        run.progress,
        task.refeed,
        task.recall_form,
        run.measured,
    )


def _questions(run: TaskInput) -> dict[str, dict]:
    task = run.task
    return questions.measure_questions(
        run.model,
        run.tokenizer,
        run.settings,
        task.questions,
        task.seed,
        run.progress,
        task.refeed,
        measured=run.measured,
    )


def _behaviour(run: TaskInput) -> dict[str, dict]:
    task = run.task
    return behaviour.measure_behaviour(
        run.model,
        run.tokenizer,
        run.settings,
        "\n\n".join(task.texts.values()),
        task.context,
        task.cases,
        task.seed,
        run.progress,
        task.refeed,
        run.measured,
    )


def _speed(run: TaskInput) -> dict[str, dict]:
    return speed.measure_speed(
        run.model, run.tokenizer, run.settings, run.rows[:1], run.progress, run.measured
    )


TASKS: dict[str, Callable[[TaskInput], dict[str, dict]]] = {
    "perplexity": _perplexity,
    "decode": _decode,
    "layers": _layers,
    "recall": _recall,
    "questions": _questions,
    "behaviour": _behaviour,
    "speed": _speed,
}
USUAL_TASKS = ("perplexity",)  # the tasks when none is named


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    task: Task,
    names: Sequence[str] = USUAL_TASKS,
    progress: Progress = silent,
    work: Path | None = None,
    processes: Processes = ALONE,
) -> dict:
    """Run tasks over settings.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared; the first should be the full cache.
        task: what is measured on.
        names: names of `TASKS`.
        progress: shows progress.
        work: folder in which measurements are saved, so that the same job can resume.
        processes: the processes that share the work, each of which calls this. All of them return the same,
            and the main one alone shows progress.

    Returns:
        A result as JSON has it: its format, the model, the environment and one row per setting.

    Raises:
        LowkeyError: an unknown task, a context that the model cannot read, or a setting given twice.
    """
    for name in names:
        if name not in TASKS:
            raise LowkeyError(f"task {name!r} is unknown; choose among {', '.join(TASKS)}")
    longest = families.max_positions(model)
    if longest is not None and not 8 <= task.context <= longest:
        raise LowkeyError(
            f"context {task.context}: must lie between 8 and the model's {longest}; choose a context in that "
            "range"
        )
    settings = distinct(settings)
    blind = [name for name in names if name != "recall"]
    for setting in settings:
        if setting.sees_answer and blind:
            raise LowkeyError(
                f"{setting.name}: is shown the right answer, which task {blind[0]!r} does not have; give "
                "--task recall alone"
            )
    job = evaluation_job(model, tokenizer, settings, task, names) if work else None
    measured, progress = Measured(work, job, processes), processes.shown(progress)
    run = TaskInput(model, tokenizer, settings, task, progress, measured)
    rows = {s.name: s.row() | {"task": ",".join(names)} for s in settings}
    try:
        for name in dict.fromkeys(names):
            for row, numbers in TASKS[name](run).items():
                rows[row] |= numbers
        for row, numbers in footprint.measure_footprint(
            model, tokenizer, settings, run.rows[:1], progress, measured
        ).items():
            rows[row] |= numbers
    finally:
        measured.write()  # also after an interrupt: the same job then resumes
    measured.gather()  # nobody writes any more, and the saved work may be removed
    return {
        "format": RESULT_FORMAT,
        "model": model.config._name_or_path,
        "environment": environment(model, task, run) | {"processes": processes.count},
        "rows": list(rows.values()),
    }


def evaluation_job(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    task: Task,
    names: Sequence[str],
) -> dict:
    """Everything that decides what is measured: saved work of another job is not resumed.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        settings: what is compared.
        task: what is measured on.
        names: names of `TASKS`.

    Returns:
        What JSON can hold; texts and weights as their checksums.
    """
    return model_described(model, tokenizer) | {
        "texts": {name: _sha256(words) for name, words in task.texts.items()},
        "task": {name: value for name, value in vars(task).items() if name != "texts"},
        "names": list(names),
        "settings": [[s.name, s.made_of] for s in settings],
    }


def model_described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The part of a job that the model decides, as checksums and words.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turns = getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map, ends
    return {
        "model_sha256": model_fingerprint(model),
        "vocabulary": _sha256(repr(sorted(tokenizer.get_vocab().items()))),
        "turns": _sha256(repr(turns)),
        "dtype": str(model.dtype),
        "device": str(device_of(model)),
        "versions": versions(),
    }


def _sha256(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def environment(model: PreTrainedModel, task: Task, run: TaskInput) -> dict:
    """Where and with what a result was measured.

    Args:
        model: the model.
        task: what was measured on.
        run: its windows.
    """
    sums = {name: _sha256(words) for name, words in task.texts.items()}
    data = {
        "name": ", ".join(sums),
        "sha256": next(iter(sums.values())) if len(sums) == 1 else _sha256("".join(sums.values())),
        **({"texts": sums} if len(sums) > 1 else {}),
        "tokens": run.rows.numel(),
        "windows": len(run.rows),
        "context": task.context,
        "recall_cases": task.cases,
        "recall_form": task.recall_form,
        "questions": task.questions,
        "refeed": task.refeed,
        "seed": task.seed,
    }
    return machine_described(model) | {"data": data}


def machine_described(model: PreTrainedModel) -> dict:
    """Where and when something is measured, and by which versions.

    Args:
        model: the model.
    """
    return versions() | {
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(device_of(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
