"""Gradients of the model's loss with respect to keys and values, and the maps that cost the loss least."""

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
from lowkey.models.weights import only_trainable
from lowkey.ops.products import oblique_basis
from lowkey.ops.rope import rotate, unrotate
from lowkey.probes import model_probe
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact
from lowkey.storage.second_moments import joint_moment

WINDOWS_BETWEEN_SAVES = 8  # windows between two saves of an unfinished pass
GRADIENT_FILE = "gradients"  # name of the saved pass in the work folder
MOMENT_NAMES = ("keys", "values", "key_gradients", "value_gradients")
GradientMoments = dict[int, dict[str, Tensor]]  # by layer and name: (h d, h d) in fp64


class GradientCapture:
    """Returns keys and values plus a zero tensor, whose gradient is that of the keys and values.

    Attributes, after `update`:
        keys, values: keys and values in the form that is stored (b, h, t, d), detached.
        zeros: the added zeros, keys' and values', which require gradients.
    """

    def __init__(self, layout: Layout, rope: Rope) -> None:
        self.layout, self.rope = layout, rope

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Record keys and values (b, h, t, d) and return them unchanged in value."""
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        if self.layout == "pre_rope":
            keys = unrotate(keys, cos, sin)
        self.keys, self.values = keys.detach(), values.detach()
        # Adding a zero does not change the model, and its gradient is that of the sum.
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
    """Sum the second moments of keys, values and their gradients over windows, by one pass forward and back.

    The gradients are those of the loss summed over a window. The label of each position is drawn from the
    model, so that the moment of the gradients estimates the Fisher information. Tokens that are always exact
    (the first `sinks`, the last `recent`) are not counted. If they are more than half of a window, every
    token counts and none is exact.

    Args:
        model: an attached model.
        rows: token ids (n, t).
        layout: whether keys are stored before or after their rotation.
        exact: the tokens that a query sees uncompressed.
        seed: of the labels.
        work: a folder of this very job, to save into and to resume from, to the same numbers.
        progress: shows how far the pass is.

    Returns:
        By compressible layer `keys`, `values`, `key_gradients` and `value_gradients`: sums of outer products
        (h d, h d) in fp64, heads side by side.
    """
    length = rows.shape[1]
    if 2 * (exact.sinks + exact.recent) > length:
        exact = NO_EXACT_TOKENS
    counted = slice(exact.sinks, length - exact.recent)
    sums, done = _load(work, model, len(rows))
    with only_trainable([], model), torch.enable_grad():
        windows = list(enumerate(rows))[done:]
        for n, row in progress(windows, "Fisher information", len(windows)):
            # The seed depends on the window alone, so a resumed pass draws the same labels.
            for i, tensors in window_gradients(model, row.unsqueeze(0), layout, exact, seed + n).items():
                moments = {
                    name: joint_moment(t[:, :, counted].float()).double().cpu()
                    for name, t in zip(MOMENT_NAMES, tensors, strict=True)
                }
                sums[i] = {name: sums[i][name] + m for name, m in moments.items()} if i in sums else moments
            if work is not None and ((n + 1) % WINDOWS_BETWEEN_SAVES == 0 or n + 1 == len(rows)):
                _save(work, sums, n + 1)
    return sums


def window_gradients(
    model: PreTrainedModel, ids: Tensor, layout: Layout, exact: Exact, seed: int
) -> dict[int, tuple[Tensor, ...]]:
    """Return keys, values and the gradients of the loss with respect to them, of one window.

    Args:
        model: an attached model.
        ids: token ids (1, t).
        layout: whether keys are stored before or after their rotation.
        exact: the tokens that a query sees uncompressed; a gradient counts only what queries see compressed.
        seed: of the labels, which are drawn from the model's own distribution.

    Returns:
        By compressible layer (keys, values, key gradients, value gradients), each (1, h, t, d).
    """
    layers = {
        i: GradientCapture(layout, families.rope(model, i)) for i in families.geometry(model).compressible
    }
    logits = model_probe.logits(model, ids.to(device_of(model)), layers, exact)[0].float()
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    # The labels are drawn, not the text's own: with those it would be the empirical Fisher matrix.
    loss = cross_entropy(logits, labels, reduction="sum")
    gradients = iter(torch.autograd.grad(loss, [zero for layer in layers.values() for zero in layer.zeros]))
    return {i: (layer.keys, layer.values, next(gradients), next(gradients)) for i, layer in layers.items()}


def fisher_bases(moments: GradientMoments, heads: int, t: int, ridge: float) -> dict[int, LayerBases]:
    """Return the oblique projectors P that minimise tr(F E C E^T), E = I - P, for keys and for values.

    C is the second moment of t heads side by side, and F that of their gradients.

    Args:
        moments: second moments by layer.
        heads: number of KV heads.
        t: how many of them share one latent.
        ridge: what is added to C, relative to its mean eigenvalue.
    """

    def basis(layer: dict[str, Tensor], name: str, gradients: str) -> Basis:
        moment, fisher = (head_blocks(layer[key], heads // t) for key in (name, gradients))
        return oblique_basis(moment, fisher, ridge, t)

    return {
        i: LayerBases(basis(x, "keys", "key_gradients"), basis(x, "values", "value_gradients"))
        for i, x in moments.items()
    }


def _save(work: Path, sums: GradientMoments, done: int) -> None:
    tensors = {f"{i}.{name}": t for i, layer in sums.items() for name, t in layer.items()}
    files.write_work(work, GRADIENT_FILE, tensors | {"done": torch.tensor(done)})


def _load(work: Path | None, model: PreTrainedModel, windows: int) -> tuple[GradientMoments, int]:
    """Return the saved sums and how many windows are in them; nothing and 0 if there are none.

    Raises:
        LowkeyError: if the file is damaged or does not fit this model.
    """
    tensors = files.read_work(work, GRADIENT_FILE)
    if work is None or tensors is None:
        return {}, 0
    shape = families.geometry(model)
    width = shape.kv_heads * shape.head_dim
    like = torch.empty(width, width, dtype=torch.float64)
    # the file is read as if anyone could have written it: every shape and count is checked
    done = int(files.checked_tensor(tensors, "done", torch.tensor(0), work))
    if not 0 < done <= windows:
        raise files.damaged_work(work, f"{done} of {windows} windows are done")
    sums = {
        i: {name: files.checked_tensor(tensors, f"{i}.{name}", like, work) for name in MOMENT_NAMES}
        for i in shape.compressible
    }
    return sums, done
