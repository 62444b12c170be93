"""How much the output of each decoder layer changes when its cache alone is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import device_of
from lowkey.evaluate.settings import Setting
from lowkey.models import families
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe, relative_errors
from lowkey.storage.exact import NO_EXACT_TOKENS


@torch.no_grad()
def measure_layers(
    model: PreTrainedModel,
    settings: Sequence[Setting],
    rows: Tensor,
    batch: int,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Relative error and cosine of layer outputs, each layer on its exact inputs.

    Args:
        model: the model, attached.
        settings: what is compared. Settings that evict are left out: a window that is read in one piece shows
            nothing of them.
        rows: windows of ids (n, t).
        batch: windows that a layer reads at a time.
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        By setting, means over compressible layers, windows and tokens: `layer_error`, |f - f~| / |f|, and
            `layer_cosine`, the cosine of f and f~, with f the output of the layer over the full cache and f~
            that over the setting's.
    """
    measured, settings, shape = (
        measured or Measured(),
        [s for s in settings if not s.evicts],
        families.geometry(model),
    )
    todo = {i: [s for s in settings if f"layers {i} {s.name}" not in measured] for i in shape.compressible}
    for i, inputs in (
        progress(layer_inputs(model, rows, batch), "layer error", shape.layers) if any(todo.values()) else ()
    ):
        probe = LayerProbe.of(model, i, "post_rope", inputs, 0, batch) if todo.get(i) else None
        for setting in todo.get(i, ()):
            measured.once(f"layers {i} {setting.name}", lambda: _compare(probe, setting, batch))  # noqa: B023
    return {s.name: _means([measured[f"layers {i} {s.name}"] for i in shape.compressible]) for s in settings}


def _means(pairs: list[tuple[float, float]]) -> dict:
    """Means over layers of (error, cosine)."""
    errors, cosines = zip(*pairs, strict=True)
    return {"layer_error": sum(errors) / len(errors), "layer_cosine": sum(cosines) / len(cosines)}


def _compare(probe: LayerProbe | None, setting: Setting, batch: int) -> tuple[float, float]:
    """Mean error and cosine of one layer under one setting."""
    assert probe is not None
    parts = [_pair(probe, setting, w) for w in torch.arange(len(probe.inputs)).split(batch)]
    errors, cosines = (torch.cat(p) for p in zip(*parts, strict=True))
    return float(errors.mean()), float(cosines.mean())


def _pair(probe: LayerProbe, setting: Setting, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Error and cosine of each window. The storage is made anew, because it keeps what it has read."""
    target, device = probe.outputs[windows], device_of(probe.block)
    storage = setting.storage(probe.index)
    out = target if storage is None else probe.run(probe.inputs[windows].to(device), storage).cpu()
    return relative_errors(out, target, NO_EXACT_TOKENS), torch.cosine_similarity(out, target, dim=-1).mean(1)
