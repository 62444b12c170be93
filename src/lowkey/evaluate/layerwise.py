"""How much the output of each decoder layer changes when its cache alone is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
        `layer_cosine`, the cosine of f and f~, with f the output of the layer over the full cache and f~ that
        over the setting's.
    """
    measured, shape = measured or Measured(), families.geometry(model)
    settings = [s for s in settings if not s.evicts]
    # every process walks through the layers, with the settings that it takes
    own = measured.share(
        s for s in settings if any(f"layers {i} {s.name}" not in measured for i in shape.compressible)
    )
    todo = {i: [s for s in own if f"layers {i} {s.name}" not in measured] for i in shape.compressible}
    if any(todo.values()):
        # Layers are walked in order, because the exact outputs of one are the inputs of the next.
        for i, inputs in progress(layer_inputs(model, rows, batch), "layer error", shape.layers):
            if not todo.get(i):
                continue
            probe = LayerProbe.of(model, i, "post_rope", inputs, 0, batch)
            for setting in todo[i]:
                measured.once(f"layers {i} {setting.name}", partial(_compare, probe, setting, batch))
    measured.gather()
    means = {}
    for setting in settings:
        pairs = [measured[f"layers {i} {setting.name}"] for i in shape.compressible]
        errors, cosines = zip(*pairs, strict=True)
        means[setting.name] = {
            "layer_error": sum(errors) / len(errors),
            "layer_cosine": sum(cosines) / len(cosines),
        }
    return means


def _compare(probe: LayerProbe, setting: Setting, batch: int) -> tuple[float, float]:
    """Mean error and cosine of one layer under one setting, over windows and tokens."""
    errors, cosines = [], []
    for windows in torch.arange(len(probe.inputs)).split(batch):
        exact, device = probe.outputs[windows], device_of(probe.block)
        storage = setting.storage(probe.index)  # a fresh one for each batch, because it keeps what it reads
        out = exact if storage is None else probe.run(probe.inputs[windows].to(device), storage).cpu()
        errors.append(relative_errors(out, exact, NO_EXACT_TOKENS))
        cosines.append(torch.cosine_similarity(out, exact, dim=-1).mean(1))
    return float(torch.cat(errors).mean()), float(torch.cat(cosines).mean())
