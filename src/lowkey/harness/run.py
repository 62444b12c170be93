"""Measure tasks of lm-eval over settings: one result, with the difference of every setting from the first."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_tasks
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.errors import on_one_line
from lowkey.core.files.measured import Measured
from lowkey.core.intervals import half_width, paired_bootstrap
from lowkey.core.processes import ALONE, Processes
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError
from lowkey.evaluate.result import RESULT_FORMAT, machine_described, model_described
from lowkey.evaluate.settings import Setting, distinct
from lowkey.harness.model import LowkeyLM, check_setting
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.models import families


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    tasks: Mapping[str, Any],
    how: TaskMeasuring,
    progress: Progress = silent,
    work: Path | None = None,
    processes: Processes = ALONE,
) -> dict:
    """Measure tasks over settings.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared; the first should be the full cache.
        tasks: what `load_tasks` gave.
        how: how they are measured.
        progress: shows progress.
        work: folder in which answers are saved, so that the same job can resume.
        processes: the processes that share the requests, each of which calls this.

    Returns:
        A result as JSON has it, with one row per setting. `harness` of a row has, by task: `metrics`, each
        with its `value`, `half_95` (half of the 95 % interval over documents), `values` of the documents in
        their order, and `difference`, the mean difference from the first setting with the ends of its paired
        95 % interval; what `requests.summary` gives; and the task's `version` and `shots`.

    Raises:
        LowkeyError: for a setting that cannot be measured, a setting given twice, or a max_length that the
            model does not have.
    """
    settings = distinct(settings)
    for setting in settings:
        check_setting(setting)
    longest = families.max_positions(model)
    if how.max_length is not None and longest is not None and how.max_length > longest:
        raise LowkeyError(
            f"max_length {how.max_length}: the model has {longest} positions; give at most that"
        )
    job = harness_job(model, tokenizer, settings, tasks, how) if work else None
    measured, progress = Measured(work, job, processes), processes.shown(progress)
    rows, first, full = list[dict](), None, None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for setting in settings:
        adapter = LowkeyLM(
            model,
            tokenizer,
            setting=setting,
            protocol=how.protocol,
            chunk=how.chunk,
            batch_size=how.batch_size,
            max_length=how.max_length,
            measured=measured,
            progress=progress,
        )
        found = _found(adapter, tasks, how)
        of_tasks = _by_task(found, adapter.summaries())
        first = of_tasks if first is None else first
        for name, task in of_tasks.items():
            _compare(task["metrics"], first[name]["metrics"])
        groups = {name: _scores(scores) for name, scores in (found.get("groups") or {}).items()}
        held = _held(adapter.measures)
        full = held["bytes_held"] if full is None else full
        more = {"task": "harness", "bytes_full": full, "harness": of_tasks, "harness_groups": groups}
        rows.append(setting.row() | held | more)
    names = list(tasks["tasks"])
    about = {
        "name": ", ".join(names) if len(names) < 6 else f"{len(names)} tasks of lm-eval",
        "sha256": hashlib.sha256(json.dumps([names, vars(how)], sort_keys=True).encode()).hexdigest(),
        "tasks": names,
        **vars(how),
    }
    return {
        "format": RESULT_FORMAT,
        "model": model.config._name_or_path,
        "environment": machine_described(model) | {"data": about, "processes": processes.count},
        "rows": rows,
    }


def harness_job(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    tasks: Mapping[str, Any],
    how: TaskMeasuring,
) -> dict:
    """Everything that decides what is measured: saved work of another job is not resumed.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        settings: what is compared.
        tasks: what `load_tasks` gave.
        how: how they are measured.
    """
    return model_described(model, tokenizer) | {
        "harness": {name: str(task.VERSION) for name, task in tasks["tasks"].items()},
        "how": vars(how),
        "settings": [[s.name, s.made_of] for s in settings],
    }


def _found(adapter: LowkeyLM, tasks: Mapping[str, Any], how: TaskMeasuring) -> Any:
    """What lm-eval finds. Raises: LowkeyError for what it refuses."""
    _prepare(tasks, how)
    task_dict: Any = dict(tasks)
    try:
        return run_tasks(
            lm=adapter,
            task_dict=task_dict,
            limit=how.limit,
            bootstrap_iters=0,
            apply_chat_template=how.chat,
            fewshot_as_multiturn=how.chat,
        )
    except LowkeyError:
        raise
    except ValueError as error:  # more examples than there are documents, a template that is missing
        remedy = "leave --chat out" if "chat template" in str(error) else "give fewer --shots, or other tasks"
        raise LowkeyError(
            f"tasks {', '.join(tasks['tasks'])}: lm-eval refuses them ({on_one_line(error)}); {remedy}"
        ) from error


def _prepare(tasks: Mapping[str, Any], how: TaskMeasuring) -> None:
    """Let every task draw the same examples for every setting, as many as are wanted."""
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        # a task that says 0 itself takes no examples, as in lm-eval
        shots = own if how.shots is None or own == 0 else how.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=how.seed)


def _held(measures: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean bytes of the compressed contexts of all requests, and for each of their tokens."""
    held, tokens = sum(m["kept_bytes"] for m in measures), sum(m["context_tokens"] for m in measures)
    return {"bytes_held": held / len(measures), "bytes_per_token": held / tokens if tokens else None}


def _by_task(found: Mapping[str, Any], summaries: Mapping[str, dict]) -> dict[str, dict]:
    """What lm-eval found and what its requests took, by task."""
    tasks = {}
    for name, samples in found["samples"].items():
        metrics = _scores(found["results"][name])
        for metric, score in metrics.items():
            measure, _, kind = metric.partition(",")
            own = sorted(
                (s for s in samples if s["filter"] == (kind or "none") and measure in s),
                key=lambda s: s["doc_id"],
            )
            score["values"] = values = _numbers([s[measure] for s in own])
            score["half_95"] = half_width(values) if values else None
            score["higher_is_better"] = (found["higher_is_better"].get(name) or {}).get(measure)
        tasks[name] = {
            "metrics": metrics,
            **summaries.get(name, {}),
            "documents": len({s["doc_id"] for s in samples}),
            "documents_sha256": _digest(samples),
            "version": str(found["versions"].get(name)),
            "shots": found["n-shot"].get(name),
        }
    return tasks


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """The checksum of the documents of a task, as they are asked and judged: equal for equal samples."""
    told = sorted({tuple(str(s[f"{part}_hash"]) for part in ("doc", "prompt", "target")) for s in samples})
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics among lm-eval's results of a task or group, by name and filter."""
    return {
        key.removesuffix(",none"): {"value": float(value)}
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """Values of documents as numbers; None if they are something else.

    A log-likelihood with the number of words or bytes becomes the loss per word or byte.
    """
    if values and all(isinstance(v, tuple) and len(v) == 2 for v in values):
        return [-float(v[0]) / float(v[1]) if v[1] else 0.0 for v in values]
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError):
        return None


def _compare(metrics: Mapping[str, dict], first: Mapping[str, dict]) -> None:
    """Add to each metric its difference from the first setting."""
    for name, score in metrics.items():
        values, others = score["values"], first.get(name, {}).get("values")
        if values and others and len(values) == len(others):
            score["difference"] = list(paired_bootstrap(values, others))
        else:
            score["difference"] = None
