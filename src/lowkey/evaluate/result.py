"""`evaluate`: run the chosen tasks over the settings and give one Result, with the environment it was measured in."""

from __future__ import annotations

import datetime
import hashlib
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import families, text
from lowkey.evaluate import layerwise, likelihood, recall, speed
from lowkey.evaluate.settings import Setting, distinct
from lowkey.options import Checked, option
from lowkey.plan import versions
from lowkey.progress import Progress, silent
from lowkey.types import LowkeyError, device_of

FORMAT = 1


@dataclass(frozen=True)
class Task(Checked):
    """What to measure on: windows of `context` tokens of `text_name`, at most `windows` of them; `cases` of recall, with the
    question fed again over what was kept or not."""

    text: str = option(any_text=True)
    text_name: str = option(any_text=True)
    context: int = option(512, at_least=8, at_most=2**24)
    windows: int = option(16, at_least=1, at_most=2**20)
    cases: int = option(20, at_least=1, at_most=10**6)
    seed: int = option(0, at_least=0)
    batch: int = option(2, at_least=1, at_most=4096)
    refeed: bool = True


@dataclass
class _Run:
    """Everything a measurement needs, tokenised once."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Sequence[Setting]
    task: Task
    progress: Progress

    def __post_init__(self) -> None:
        self.ids = text.encode(self.tokenizer, self.task.text, self.model)
        self.rows = text.windows(self.ids, self.tokenizer, self.task.context, f"data {self.task.text_name!r}", 1)[: self.task.windows]


def _perplexity(run: _Run) -> dict[str, dict]:
    return likelihood.measure(run.model, run.tokenizer, run.settings, run.rows, run.task.batch, run.progress)


def _layers(run: _Run) -> dict[str, dict]:
    if families.stores_its_own(run.model.config):  # nothing stands in for its cache, so there is nothing to compare
        return {}
    return layerwise.measure(run.model, run.settings, run.rows[: max(1, len(run.rows) // 2)], run.task.batch, run.progress)


def _recall(run: _Run) -> dict[str, dict]:
    t = run.task
    recall.check_positions(run.model, run.tokenizer, t.context)
    return recall.measure(run.model, run.tokenizer, run.settings, run.ids.tolist(), t.context, t.cases, t.seed, run.progress, t.refeed)


def _speed(run: _Run) -> dict[str, dict]:
    return speed.measure(run.model, run.tokenizer, run.settings, run.rows[:1], run.progress)


TASKS: dict[str, Callable[[_Run], dict[str, dict]]] = {
    "perplexity": _perplexity,
    "layers": _layers,
    "recall": _recall,
    "speed": _speed,
}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    task: Task,
    names: Sequence[str] = tuple(TASKS),
    progress: Progress = silent,
) -> dict:
    """A Result: {"format", "model", "environment", "rows"}; rows[0] is the first setting, which should be the full cache.

    names: keys of TASKS; bytes are always measured, whatever is asked. Errors: LowkeyError for an unknown task, a text that is
    too short, or a context longer than the model's.
    """
    for name in names:
        if name not in TASKS:
            raise LowkeyError(f"task {name!r} is unknown; choose among {', '.join(TASKS)}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and not 8 <= task.context <= longest:
        raise LowkeyError(f"context {task.context}: must lie between 8 and the model's {longest}; choose a context in that range")
    run = _Run(model, tokenizer, distinct(settings), task, progress)
    rows = {s.name: s.row() | {"task": ",".join(names)} for s in run.settings}
    for name in dict.fromkeys([*names, "speed"]):
        for row, measured in TASKS[name](run).items():
            rows[row] |= measured
    return {
        "format": FORMAT,
        "model": model.config._name_or_path,
        "environment": environment(model, task, run),
        "rows": list(rows.values()),
    }


def environment(model: PreTrainedModel, task: Task, run: _Run) -> dict:
    data = {
        "name": task.text_name,
        "sha256": hashlib.sha256(task.text.encode()).hexdigest(),
        "tokens": run.rows.numel(),
        "context": task.context,
        "recall_cases": task.cases,
        "refeed": task.refeed,
        "seed": task.seed,
    }
    return versions() | {
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(device_of(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "data": data,
    }
