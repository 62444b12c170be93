"""The gradients of the model's loss with respect to what a cache holds: second moments, and the maps that
cost the loss least.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lowkey.core import files
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Basis, LayerBases, Layout, device_of, head_blocks
from lowkey.models import families
from lowkey.models.families import Rope
from lowkey.models.weights import only
from lowkey.ops.products import oblique_basis
from lowkey.ops.rope import rotate, unrotate
from lowkey.probes import model_probe
from lowkey.storage.exact import NOTHING, Exact
from lowkey.storage.second_moments import joint_moment

WINDOWS_BETWEEN_SAVES = 8  # windows between two saves of the pass
MOMENT_NAMES = ("keys", "values", "key_gradients", "value_gradients")
GradientMoments = dict[int, dict[str, Tensor]]


class GradientCapture:
    """Gives keys and values back with a zero added, as which their gradient can be had. Attributes: keys and
    values as they are stored (b, h, t, d), and the zeros."""

    def __init__(self, layout: Layout, rope: Rope) -> None:
        self.layout, self.rope = layout, rope

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        if self.layout == "pre_rope":
            keys = unrotate(keys, cos, sin)
        self.keys, self.values = keys.detach(), values.detach()
        self.zeros = [torch.zeros_like(x, requires_grad=True) for x in (keys, values)]
        keys, values = keys + self.zeros[0], values + self.zeros[1]
        return rotate(keys, cos, sin) if self.layout == "pre_rope" else keys, values


def gather_gradient_moments(
    model: PreTrainedModel,
    rows: Tensor,
    layout: Layout,
    exact: Exact,
    seed: int,
    work: Path | None = None,
    progress: Progress = silent,
) -> GradientMoments:
    """Of every compressible layer, in fp64: `keys`, `values`, `key_gradients` and `value_gradients` (h d, h
    d), sums of outer products over windows (n, t) of ids, heads side by side.

    Gradients are those of the loss summed over a window; the token that each position predicts is drawn from
    the model. Tokens that are always exact (the first `sinks`, the last `recent`) are not counted; where they
    are more than half of a window, all are.
    work: a folder of this very job, to save into and to go on from, to the same numbers.
    """
    length = rows.shape[1]
    if 2 * (exact.sinks + exact.recent) > length:
        exact = NOTHING
    kept = slice(exact.sinks, length - exact.recent)
    sums, done = _load(work, model, len(rows))
    with only([], model), torch.enable_grad():
        windows = list(enumerate(rows))[done:]
        for n, row in progress(windows, "Fisher information", len(windows)):
            for i, layer in window_gradients(model, row.unsqueeze(0), layout, exact, seed + n).items():
                x = {
                    name: joint_moment(t[:, :, kept].float()).double().cpu()
                    for name, t in zip(MOMENT_NAMES, layer, strict=True)
                }
                sums[i] = {name: sums[i][name] + t for name, t in x.items()} if i in sums else x
            if (n + 1) % WINDOWS_BETWEEN_SAVES == 0 or n + 1 == len(rows):
                _save(work, sums, n + 1)
    return sums


def window_gradients(
    model: PreTrainedModel, ids: Tensor, layout: Layout, exact: Exact, seed: int
) -> dict[int, tuple[Tensor, ...]]:
    """Keys, values and their gradients (1, h, t, d) in every layer."""
    layers = {
        i: GradientCapture(layout, families.rope(model, i)) for i in families.geometry(model).compressible
    }
    logits = model_probe.logits(model, ids.to(device_of(model)), dict(layers), exact)[0].float()
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss = cross_entropy(logits, labels, reduction="sum")
    gradients = iter(torch.autograd.grad(loss, [zero for layer in layers.values() for zero in layer.zeros]))
    return {i: (layer.keys, layer.values, next(gradients), next(gradients)) for i, layer in layers.items()}


def fisher_bases(found: GradientMoments, heads: int, t: int, ridge: float) -> dict[int, LayerBases]:
    """Per layer the oblique projectors P that minimise tr(F E C E^T), E = I - P, of every t of the heads side
    by side, for keys and for values, from their second moments C and those of their gradients F. ridge: what
    is added to C, relative to its mean eigenvalue."""

    def basis(layer: dict[str, Tensor], of: str, gradients: str) -> Basis:
        moment, fisher = (head_blocks(layer[name], heads // t) for name in (of, gradients))
        return oblique_basis(moment, fisher, ridge, t)

    return {
        i: LayerBases(basis(x, "keys", "key_gradients"), basis(x, "values", "value_gradients"))
        for i, x in found.items()
    }


def _save(work: Path | None, sums: GradientMoments, done: int) -> None:
    if work is not None:
        tensors = {f"{i}.{name}": t for i, layer in sums.items() for name, t in layer.items()}
        files.write_work(work, "gradients", tensors | {"done": torch.tensor(done)})


def _load(work: Path | None, model: PreTrainedModel, windows: int) -> tuple[GradientMoments, int]:
    tensors = files.read_work(work, "gradients")
    if work is None or tensors is None:
        return {}, 0
    shape = families.geometry(model)
    wide = torch.empty(shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim, dtype=torch.float64)
    like = dict.fromkeys(MOMENT_NAMES, wide)
    done = int(files.checked_tensor(tensors, "done", torch.tensor(0), work))
    if not 0 < done <= windows:
        raise files.damaged_work(work, f"{done} of {windows} windows are done")
    found = {
        i: {name: files.checked_tensor(tensors, f"{i}.{name}", t, work) for name, t in like.items()}
        for i in shape.compressible
    }
    return found, done
