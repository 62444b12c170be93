"""Measure tasks of lm-eval for the command line. Imports lm-eval, so `eval` imports it only for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars, before it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cli.result_paths import interrupted_result
from lowkey.core.options import defaults_of
from lowkey.core.processes import Processes
from lowkey.core.progress import bars
from lowkey.evaluate.settings import Setting, distinct
from lowkey.harness.run import harness_job, measure_tasks
from lowkey.harness.suite_tasks import suite_tasks
from lowkey.harness.task_settings import SUITE, TaskMeasuring
from lowkey.harness.tasks import load_tasks
from lowkey.suites import SUITES, Source


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    names: Sequence[str],
    how: Mapping[str, Any],
    sources: Mapping[str, Any],
    place: Path,
    work: Path,
    look: bool,
    processes: Processes,
) -> tuple[dict, Path, Path]:
    """Measure tasks over settings.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared.
        names: what `--harness` names.
        how: fields of `TaskMeasuring`.
        sources: fields of `Source`, for suites.
        place: the result file.
        work: folder of unfinished work.
        look: whether to look for an interrupted run of the same job, and go on in its place.
        processes: the processes that share the requests.

    Returns:
        The result, its file, and the folder of unfinished work.
    """
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    measuring = TaskMeasuring(**how)
    name = model.config._name_or_path
    own = _suites([n for n in names if n.startswith(SUITE)], tokenizer, measuring, sources)
    tasks = load_tasks(
        [n for n in names if not n.startswith(SUITE)],
        own,
        {"pretrained": name, "tokenizer": name, "max_seq_lengths": [sources["length"]]},
        [SUITE + suite for suite in SUITES],
    )
    if look:
        job = harness_job(model, tokenizer, distinct(settings), tasks, measuring)
        place, work = interrupted_result(f"eval-{Path(name).name}-", job) or (place, work)
    result = measure_tasks(model, tokenizer, settings, tasks, measuring, bars, work, processes)
    return result, place, work


def _suites(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, how: TaskMeasuring, sources: Mapping[str, Any]
) -> list:
    """The tasks of suites."""
    if not names:
        return []
    cases = how.limit or defaults_of(Source)["cases"]
    reserved = len(tokenizer("", verbose=False).input_ids)
    if how.chat:
        reserved += len(_template(tokenizer))
    source = Source(tokenizer, cases=cases, reserved=reserved, **sources)
    return [task for name in names for task in suite_tasks([name], source)]


def _template(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a chat template puts around a message."""
    found: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(found, add_special_tokens=False, verbose=False).input_ids
