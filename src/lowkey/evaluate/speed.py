"""Bytes really held after a prompt, and the time of a prompt and of a step. Times compare only inside one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.evaluate.settings import Setting
from lowkey.prefill import prefill
from lowkey.progress import Progress
from lowkey.types import device_of

STEPS, ROUNDS = 8, 3


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sequence[Setting], ids: Tensor, progress: Progress
) -> dict[str, dict]:
    """One prompt (1, t): medians over rounds in which the settings take turns, and the bytes held after the prompt;
    of settings that evict, the tokens kept per compressible layer and KV head."""
    ids = ids.to(device_of(model))
    runs: dict[str, list[dict]] = {s.name: [] for s in settings}
    for _ in progress(range(ROUNDS + 1), "bytes and speed"):
        for setting in settings:
            runs[setting.name].append(_run(model, tokenizer, setting, ids))
    rows = {name: _row(found[1:], ids.shape[1]) for name, found in runs.items()}  # the first round warms up
    full = rows[settings[0].name]["bytes_held"]
    return {name: {**row, "bytes_full": full} for name, row in rows.items()}


def _row(runs: list[dict], tokens: int) -> dict:
    held = runs[0]["bytes_held"]
    times = {name: statistics.median(r[name] for r in runs) for name in ("prefill_ms", "step_ms")}
    kept = {"kept_per_head": runs[0]["kept"]} if runs[0]["kept"] else {}
    return {"bytes_per_token": held / tokens, "bytes_held": held, "bytes_predicted": runs[0]["bytes_predicted"], **kept, **times}


def _run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, ids: Tensor) -> dict:
    cache = setting.make()
    took = _timed(lambda: prefill(model, tokenizer, cache, ids), ids.device)
    kept = [[len(p) for p in layer.kept_positions(0)] for layer in cache.evicting]
    held = {"bytes_held": cache.nbytes(), "bytes_predicted": cache.predicted_nbytes(), "kept": kept}
    steps = [_timed(lambda: model(ids[:, -1:], past_key_values=cache), ids.device) for _ in range(STEPS)]
    return {**held, "prefill_ms": took, "step_ms": statistics.median(steps)}


def _timed(call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
