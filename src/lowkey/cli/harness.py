"""The options of `lowkey eval --harness`, checked before torch or lm-eval are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_settings, check_word, with_range
from lowkey.cli.options import LM_EVAL
from lowkey.core.errors import LowkeyError
from lowkey.harness.task_settings import SUITE, check_installed

PROTOCOL_HELP = "; ".join(f"{name}: {summary}" for name, summary in choices.PROTOCOLS.items())


def _whole(field: str, help: str) -> Any:
    """An option that takes a whole number, with its range."""
    return typer.Option(metavar="N", help=with_range("TaskMeasuring", field, help), rich_help_panel=LM_EVAL)


HarnessTasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="measure these in the place of --task: tasks of lm-eval by name or as a .yaml file, and "
        f"{SUITE}NAME or {SUITE}NAME/TASK for {', '.join(choices.SUITES)}; several separated by commas",
        rich_help_panel=LM_EVAL,
    ),
]
Protocol = Annotated[str, typer.Option(metavar="NAME", help=PROTOCOL_HELP, rich_help_panel=LM_EVAL)]
Limit = Annotated[
    int | None, _whole("limit", "documents of each task at most (default: all, or --cases of a suite)")
]
BatchSize = Annotated[int, _whole("batch_size", "contexts that are read together")]
Chunk = Annotated[int | None, _whole("chunk", "tokens of a context that are read at a time (default: all)")]
MaxLength = Annotated[
    int | None, _whole("max_length", "tokens that the model reads at most (default: its positions)")
]
Shots = Annotated[
    int | None, _whole("shots", "examples before each question (default: the task's own number)")
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="put prompts into the tokenizer's chat template", rich_help_panel=LM_EVAL),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="the published files of suites, those of each in a folder of its name, or of one alone",
        rich_help_panel=LM_EVAL,
    ),
]


def check_harness(
    names: Sequence[str] | None, task: Sequence[str] | None, folder: Path | None, how: Mapping[str, Any]
) -> list[str]:
    """Check the options.

    Args:
        names: what `--harness` was given.
        task: what `--task` was given.
        folder: what `--data-dir` was given.
        how: fields of `TaskMeasuring`.

    Returns:
        The names of tasks; none without `--harness`.

    Raises:
        LowkeyError: for an option without `--harness`, an unknown suite, or a number out of range.
    """
    if not names:
        unused = {"data_dir": folder} | {name: value for name, value in how.items() if name != "batch_size"}
        given = [n for n, v in unused.items() if v not in (None, False, choices.ASK_AFTER)]
        if how["batch_size"] != 1:
            given.append("batch_size")
        if given:
            option = given[0].replace("_", "-")
            raise LowkeyError(f"{option}: is for tasks of lm-eval; give --harness NAMES too, or leave it out")
        return []
    if task:
        raise LowkeyError(f"task {task[0]!r}: --harness measures other tasks; give one of the two")
    check_settings("TaskMeasuring", **{k: v for k, v in how.items() if k != "chat"})
    wanted = [name for item in names for name in item.split(",") if name]
    for name in wanted:
        if name.startswith(SUITE):
            check_word("suite", name.removeprefix(SUITE).partition("/")[0], choices.SUITES)
    if folder is not None and not folder.is_dir():
        raise LowkeyError(f"data-dir {str(folder)!r}: is no folder; give the folder with a suite's files")
    check_installed()
    return wanted
