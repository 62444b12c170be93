"""Time of a prompt and of a decode step. Times can be compared only within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import device_of
from lowkey.evaluate import footprint
from lowkey.evaluate.settings import Setting

STEPS, ROUNDS = 8, 3  # decode steps of a round, and rounds that count


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    ids: Tensor,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Time of reading a prompt and of one decode step after it.

    Settings take turns in each round; a first round, which warms up, is left out.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared.
        ids: the prompt (1, t).
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        By setting, medians over rounds in milliseconds: `prefill_ms` and `step_ms`.
    """
    measured, ids = measured or Measured(), ids.to(device_of(model))
    todo = [(r, s) for r in range(ROUNDS + 1) for s in settings if f"speed {r} {s.name}" not in measured]
    # one process takes all times, and the others wait, so that they do not slow it down
    for r, setting in progress(
        todo if measured.processes.main else [], lambda unit: f"speed, {unit[1].name}"
    ):
        measured.once(f"speed {r} {setting.name}", lambda: _run(model, tokenizer, setting, ids, measured))  # noqa: B023
    measured.gather()
    return {s.name: _row([measured[f"speed {r} {s.name}"] for r in range(1, ROUNDS + 1)]) for s in settings}


def _row(runs: list[dict]) -> dict:
    """Medians over rounds."""
    return {name: statistics.median(r[name] for r in runs) for name in ("prefill_ms", "step_ms")}


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    ids: Tensor,
    measured: Measured,
) -> dict:
    """Times of one round, in milliseconds."""
    cache = setting.make()
    took = _timed(lambda: prefill(model, tokenizer, cache, ids), ids.device)
    footprint.record_footprint(setting, cache, measured)
    steps = [_timed(lambda: _step(model, cache, ids[:, -1:]), ids.device) for _ in range(STEPS)]
    return {"prefill_ms": took, "step_ms": statistics.median(steps)}


def _step(model: PreTrainedModel, cache: LowkeyCache, token: Tensor) -> None:
    """Read a token (1, 1), after the small model if there is one."""
    with cache.reading(token):
        model(token, past_key_values=cache)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":  # calls return before their work is done
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
