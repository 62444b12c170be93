"""How much a layer's keys and values matter, from gradients or weights alone: what some allocators split a
budget by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.families import ProjectionPart
from lowkey.models.weights import only

Signal = list[tuple[float, float]]  # per compressible layer a number for keys and one for values
# of a singular value, relative to the largest: what fp32 weights resolve
LEAST_SHARE = torch.finfo(torch.float32).eps


def fisher(model: PreTrainedModel, rows: Tensor, batch: int) -> Signal:
    """The Fisher information of Palu (arXiv:2407.21118) and ReCalKV (arXiv:2505.24357): per weight the square
    root of the mean over samples of the squared gradient, averaged over each of W_K and W_V (h d, D).

    rows: unpadded token ids (n, t), one sample each. The loss is the mean next-token cross-entropy of a row,
    in fp32; the published code shifts its labels twice and so predicts the token after the next, which we do
    not follow. Gradients come in the model's dtype and through the attention implementation it is set to;
    they are squared and summed in fp32.
    batch: not used; a gradient per sample takes a backward pass per row. Memory beyond one such pass: an fp32
    copy of all W_K and W_V.
    Errors: LowkeyError for no rows, or rows of fewer than 2 tokens.
    """
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < 2:
        raise LowkeyError(
            f"rows of shape {tuple(rows.shape)}: Fisher information needs token ids (n, t), n >= 1, t >= 2; "
            "give more text"
        )
    parts = [
        p for i in families.geometry(model).compressible for p in families.projection_parts(model, i)[1:]
    ]
    squares: list[Tensor | float] = [0.0] * len(parts)
    with only([p.linear.weight for p in parts], model), torch.enable_grad():
        for row in rows.to(device_of(model)).split(1):
            squares = [
                s + g.float().square() for s, g in zip(squares, _gradients(model, row, parts), strict=True)
            ]
    means = [float(torch.as_tensor(s).div(len(rows)).sqrt().mean()) for s in squares]
    return list(zip(means[::2], means[1::2], strict=True))


def condition(model: PreTrainedModel, rows: Tensor, batch: int) -> Signal:
    """log kappa of W_K and W_V, each as one matrix (h d, D), in fp64: what LoRC (arXiv:2410.03111)
    accumulates over layers.

    kappa = largest / smallest singular value, with the smallest raised to at least 2^-23 of the largest, so
    log kappa <= 15.9 even where a matrix has no full rank. The paper's own clipping is not known. rows,
    batch: not used.
    """
    found = (families.projections(model, i) for i in families.geometry(model).compressible)
    return [(_log_condition(p.k), _log_condition(p.v)) for p in found]


SIGNALS: dict[str, Callable[[PreTrainedModel, Tensor, int], Signal]] = {
    "fisher": fisher,
    "condition": condition,
}


def check_signals(model: PreTrainedModel, needs: Sequence[str]) -> None:
    """Refuse at once what `fisher` would come upon after all the fitting. Errors: LowkeyError."""
    parts = [
        p for i in families.geometry(model).compressible for p in families.projection_parts(model, i)[1:]
    ]
    if "fisher" in needs and not all(weights.in_full(w := p.linear.weight) and not w.is_meta for p in parts):
        raise LowkeyError(
            "allocator 'fisher': takes gradients, which offloaded or quantised weights have not; choose "
            "another allocator"
        )


def _gradients(model: PreTrainedModel, row: Tensor, parts: list[ProjectionPart]) -> list[Tensor]:
    """Of the loss of one row (1, t): (h d, D) for every part."""
    logits = model(row, use_cache=False).logits
    loss = cross_entropy(logits[0, :-1].float(), row[0, 1:].to(logits.device))
    gradients = torch.autograd.grad(loss, [p.linear.weight for p in parts])
    return [g[p.rows] for g, p in zip(gradients, parts, strict=True)]


def _log_condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.flatten(0, 1).double())
    ratio = (values[-1] / values[0]).nan_to_num(0.0)  # a matrix of zeros
    return -float(ratio.clamp_min(LEAST_SHARE).log())
