"""How much a layer's keys and values matter, from gradients or weights: signals that some allocators read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.projections import ProjectionPart, projection_parts, projections
from lowkey.models.weights import only_trainable

Signal = list[tuple[float, float]]  # per compressible layer a number for keys and one for values
# The smallest singular value that counts, relative to the largest: what fp32 weights resolve.
LEAST_SHARE = torch.finfo(torch.float32).eps


def fisher(model: PreTrainedModel, rows: Tensor, batch: int) -> Signal:
    """Return the Fisher information of W_K and W_V, as Palu and ReCalKV use it.

    For each weight it is the square root of the mean over samples of the squared gradient; these are averaged
    over each of W_K and W_V (h d, D). The loss is the mean next-token cross-entropy of a row, in fp32.
    Gradients have the model's dtype, and pass through the attention implementation that it is set to; they
    are squared and summed in fp32.

    Memory beyond one forward and backward pass: an fp32 copy of all W_K and W_V.

    Source: arXiv:2407.21118 and arXiv:2505.24357. The published code shifts its labels twice, and so predicts
    the token after the next; we do not follow that.

    Args:
        model: the model.
        rows: token ids (n, t), unpadded; each row is one sample.
        batch: not used, since a gradient per sample takes a backward pass per row.

    Raises:
        LowkeyError: for no rows, or rows of fewer than 2 tokens.
    """
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < 2:
        raise LowkeyError(
            f"rows of shape {tuple(rows.shape)}: Fisher information needs token ids (n, t), n >= 1, t >= 2; "
            "give more text"
        )
    parts = _key_and_value_projections(model)
    squares: list[Tensor | float] = [0.0] * len(parts)
    with only_trainable([p.linear.weight for p in parts], model), torch.enable_grad():
        for row in rows.to(device_of(model)).split(1):
            gradients = _gradients(model, row, parts)
            squares = [s + g.float().square() for s, g in zip(squares, gradients, strict=True)]
    means = [float(torch.as_tensor(s).div(len(rows)).sqrt().mean()) for s in squares]
    return list(zip(means[::2], means[1::2], strict=True))


def condition(model: PreTrainedModel, rows: Tensor, batch: int) -> Signal:
    """Return log kappa of W_K and W_V, each as one matrix (h d, D), in fp64; LoRC sums it over layers.

    kappa is the largest singular value over the smallest one, which is raised to at least 2^-23 of the
    largest. So log kappa is at most 15.9, even for a matrix without full rank. How the paper clips is not
    known.

    Source: arXiv:2410.03111.

    Args:
        model: the model.
        rows, batch: not used.
    """
    layers = (projections(model, i) for i in families.geometry(model).compressible)
    return [(_log_condition(p.k), _log_condition(p.v)) for p in layers]


SIGNALS: dict[str, Callable[[PreTrainedModel, Tensor, int], Signal]] = {
    "fisher": fisher,
    "condition": condition,
}


def check_signals(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse at once what `fisher` would meet only after all the fitting.

    Args:
        model: the model.
        names: the signals that an allocator needs.

    Raises:
        LowkeyError: if `fisher` is among them and weights are offloaded or quantised.
    """
    parts = _key_and_value_projections(model)
    if "fisher" in names and not all(
        weights.is_plain_weight(w := p.linear.weight) and not w.is_meta for p in parts
    ):
        raise LowkeyError(
            "allocator 'fisher': needs gradients, which offloaded or quantised weights do not have; choose "
            "another allocator"
        )


def _key_and_value_projections(model: PreTrainedModel) -> list[ProjectionPart]:
    """Return W_K and W_V of every compressible layer in turn."""
    layers = families.geometry(model).compressible
    return [part for i in layers for part in projection_parts(model, i)[1:]]


def _gradients(model: PreTrainedModel, row: Tensor, parts: list[ProjectionPart]) -> list[Tensor]:
    """Return the gradients (h d, D) of the loss of one row (1, t), for every part."""
    logits = model(row, use_cache=False).logits
    loss = cross_entropy(logits[0, :-1].float(), row[0, 1:].to(logits.device))
    gradients = torch.autograd.grad(loss, [p.linear.weight for p in parts])
    return [g[p.rows] for g, p in zip(gradients, parts, strict=True)]


def _log_condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.flatten(0, 1).double())
    share = (values[-1] / values[0]).nan_to_num(0.0)  # of a matrix of zeros it is no number
    return -float(share.clamp_min(LEAST_SHARE).log())
