"""Tasks of lm-eval by name, with one clear line for what cannot be loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from lowkey.core.errors import LowkeyError, on_one_line
from lowkey.core.options import nearest_name

FILES = (".yaml", ".yml")  # of tasks that lm-eval does not come with
RETRY = "connect to the hub and give the command again, which keeps what was downloaded"


def load_tasks(
    names: Sequence[str],
    own: Sequence[Task] = (),
    metadata: dict | None = None,
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """Load tasks, groups and tags.

    Args:
        names: names that lm-eval knows, with wildcards, or `.yaml` files of tasks.
        own: tasks that are made already.
        metadata: for tasks that make their documents with the tokenizer.
        others: names that could have been given, for messages.

    Returns:
        What lm-eval's `evaluate` takes.

    Raises:
        LowkeyError: for an unknown name, data that cannot be read, or a task that cannot be measured.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    _add(loaded, {"tasks": {task.task_name: task for task in own}})
    builtin = any(Path(name).suffix not in FILES for name in names)  # reading their index takes seconds
    manager = TaskManager(metadata=metadata, include_defaults=builtin)
    for name in names:
        if Path(name).suffix in FILES:
            if not Path(name).is_file():
                raise LowkeyError(f"task {name!r}: is no file; give one, or the name of a task")
            found = [name]
        else:
            found = manager.match_tasks([name])
        if not found:
            remedy = nearest_name(name, [*manager.all_tasks, *others])
            raise LowkeyError(f"task {name!r} is unknown; {remedy}")
        for spec in found:
            _add(loaded, _loaded(manager, spec))
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise LowkeyError(f"task {name!r}: has images or sound; give tasks of text")
        if getattr(task, "UNSAFE_CODE", False):
            raise LowkeyError(f"task {name!r}: runs code that the model writes; give another task")
        for metric, function in (getattr(task, "_metric_fn_list", None) or {}).items():
            if function is None:
                raise LowkeyError(f"task {name!r}: metric {metric!r} is unknown to lm-eval; correct the file")
    return loaded


def _add(loaded: dict[str, Any], more: Any) -> None:
    """Add tasks to others. Raises: LowkeyError for one that is there already."""
    for name in more["tasks"]:
        if name in loaded["tasks"]:
            raise LowkeyError(f"task {name!r}: is given twice; give it once")
    for kind, found in more.items():
        loaded[kind].update(found)


def _loaded(manager: TaskManager, name: str) -> Any:
    """Tasks and groups of a name, with their data. Raises: LowkeyError."""
    try:
        return manager.load([name])
    except ImportError as error:
        raise LowkeyError(f"task {name!r}: needs a package ({on_one_line(error)}); install it") from None
    except StopIteration:
        raise LowkeyError(f"task {name!r}: holds no documents; give its data") from None
    except Exception as error:  # data sets raise many kinds; each is data that cannot be read
        reason = f"{type(error).__name__}: {on_one_line(error)}"
        away = isinstance(error, ConnectionError) or re.search(r"offline|\bHub\b", reason)
        own = Path(name).suffix in FILES and not away
        remedy = "correct the file, or the data that it names" if own else RETRY
        raise LowkeyError(f"task {name!r}: cannot be read ({reason}); {remedy}") from None
