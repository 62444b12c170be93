"""Bytes that a cache really holds after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import device_of
from lowkey.evaluate.settings import Setting


def record_footprint(setting: Setting, cache: LowkeyCache, measured: Measured) -> None:
    """Record what a cache holds that has just read one window as a prompt.

    Args:
        setting: the setting that made the cache.
        cache: the cache.
        measured: takes the record. An earlier one of this setting is kept.
    """
    kept = [[len(p) for p in layer.kept_positions(0)] for layer in cache.evicting]
    held = {"bytes_held": cache.nbytes(), "bytes_predicted": cache.predicted_nbytes(), "kept_per_head": kept}
    if cache.small is not None:
        held["bytes_small_cache"] = cache.small_nbytes()
        held["bytes_small_weights"] = cache.small_weights_nbytes()
        held["bytes_host"] = cache.host_nbytes()
    measured.once(f"bytes {setting.name}", lambda: held)


@torch.no_grad()
def measure_footprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    ids: Tensor,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Bytes held and predicted after a prompt. A prompt is read only for settings whose bytes no other task
    has recorded.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared; `bytes_full` is what the first one holds.
        ids: the prompt (1, t).
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        By setting: bytes per token, held, predicted and of the full cache; for settings that evict, the
        tokens kept per compressible layer and KV head; beside a small model, the part of its cache in the
        bytes held, and the bytes of its weights, which come on top.
    """
    measured = measured or Measured()
    todo = [s for s in settings if f"bytes {s.name}" not in measured]
    for setting in progress(measured.share(todo), lambda s: f"bytes, {s.name}"):
        cache = setting.make()
        # one that is shown the answer takes the last token for it
        prefill(model, tokenizer, cache, ids.to(device_of(model)), question=int(setting.sees_answer))
        record_footprint(setting, cache, measured)
    measured.gather()
    records = {s.name: measured[f"bytes {s.name}"] for s in settings}
    full = records[settings[0].name]["bytes_held"]
    rows = {}
    for name, record in records.items():
        rows[name] = {
            "bytes_per_token": record["bytes_held"] / ids.shape[1],
            "bytes_held": record["bytes_held"],
            "bytes_predicted": record["bytes_predicted"],
            "bytes_full": full,
        }
        if record["kept_per_head"]:  # settings without a policy keep every token
            rows[name]["kept_per_head"] = record["kept_per_head"]
        rows[name] |= {
            field: n for field, n in record.items() if field.startswith(("bytes_small", "bytes_host"))
        }
    return rows
