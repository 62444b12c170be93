"""How tasks of lm-eval are measured. Imports neither torch nor lm-eval."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from lowkey.core.errors import LowkeyError
from lowkey.core.options import Checked, option
from lowkey.harness.protocols import ASK_AFTER, PROTOCOLS

SUITE = "suite:"  # stands before the names of the suites that lowkey reads itself


@dataclass(frozen=True)
class TaskMeasuring(Checked):
    """How tasks are measured.

    Args:
        protocol: when the question is known.
        limit: documents of each task at most; None for all.
        batch_size: contexts that are read together.
        chunk: tokens of a context that are read at a time; None for all.
        max_length: tokens that the model reads at most; None for its positions.
        shots: examples before each question; None for the task's own number.
        seed: of the choice of examples.
        chat: whether prompts are put into the tokenizer's chat template.
    """

    protocol: str = option(ASK_AFTER, choices=tuple(PROTOCOLS))
    limit: int | None = option(None, at_least=1, at_most=10**7)
    batch_size: int = option(1, at_least=1, at_most=4096)
    chunk: int | None = option(None, at_least=1, at_most=2**24)
    max_length: int | None = option(None, at_least=8, at_most=2**24)
    shots: int | None = option(None, at_least=0, at_most=1000)
    seed: int = option(1234, at_least=0)
    chat: bool = False


def check_installed() -> None:
    """Raises: LowkeyError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise LowkeyError("lm-eval is not installed: pip install 'lowkey[eval]'")
