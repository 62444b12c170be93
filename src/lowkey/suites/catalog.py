"""The suites by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from lowkey.core.errors import LowkeyError
from lowkey.suites.gsm8k import GSM8K
from lowkey.suites.sample import Source, Suite, SuiteSample

SUITES: dict[str, Suite] = {
    "gsm8k": GSM8K,
}


def load_samples(name: str, source: Source, tasks: Sequence[str] = ()) -> list[SuiteSample]:
    """The samples of a suite.

    Args:
        name: a name of `SUITES`.
        source: what samples are made of.
        tasks: names of tasks of the suite; all if none is named.

    Raises:
        LowkeyError: a suite or task is not known, or a file is missing or damaged.
    """
    if name not in SUITES:
        raise LowkeyError(f"suite {name!r} is unknown; choose {_nearest(name, list(SUITES))}")
    suite = SUITES[name]
    for task in tasks:
        if task not in suite.tasks:
            raise LowkeyError(
                f"task {task!r} is not one of {name}'s; choose {_nearest(task, list(suite.tasks))}"
            )
    return [sample for task in tasks or suite.tasks for sample in suite.samples(task, source)]


def _nearest(word: str, names: list[str]) -> str:
    """The nearest names, or all."""
    near = get_close_matches(word, names, 3)
    return " or ".join(near) if near else f"among {', '.join(names)}"
