"""Optimizers, schedules, and what each kind of parameter is given to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from lowkey.core.options import nearest_name
from lowkey.core.types import LowkeyError
from lowkey.pretraining.recipe import Training

HEAD_MIXES = ("k_mix", "v_mix")
HEAD_GATE = "self_attn.gate_proj"  # not the MLP's gate, which is a hidden matrix like any other


def split_parameters(model: PreTrainedModel) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(hidden matrices, all other trained parameters), by name, tied ones once.

    Hidden matrices are the 2-D weights inside the layers. Muon takes those, or AdamW with weight decay; the
    others always go to AdamW without weight decay. Among the others, besides embeddings, the output head,
    norms and biases:

    - per-head up-factors `k_up`, `v_up` (H, r, h): torch's Muon takes 2-D only, and reading them as one (H r,
    h) matrix would orthogonalise
      heads against one another, which are independent maps; decay would shrink a head's residual towards the
      shared part;
    - head mixes `k_mix`, `v_mix` (m, G): a dozen numbers that begin as an identity, which decay would pull to
    zero, and whose
      orthogonalised update would be as large for a mix that is right already;
    - output gates of the attention: they saturate, and decay fights where they want to stand.

    Down-factors (`k_down`, `v_down`, (H r, d)) and latent projections are plain linear maps and so hidden
    matrices: Muon orthogonalises all heads' down-factors as one matrix, as it does with all heads of a query
    projection. The papers do not say; all this is our own.
    """
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    outer |= {id(p) for p in head.parameters()} if head is not None else set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {
        name: p for name, p in trained.items() if p.ndim == 2 and id(p) not in outer and not _thin(name)
    }
    return hidden, {name: p for name, p in trained.items() if name not in hidden}


def _thin(name: str) -> bool:
    return any(part in HEAD_MIXES for part in name.split(".")) or HEAD_GATE in name


def matched(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern is a part of."""
    return [name for name in names if fnmatchcase(name, f"*{pattern}*")]


def factors(model: PreTrainedModel, training: Training) -> dict[str, float]:
    """What the rate of every trained parameter is multiplied by, by name. Errors: LowkeyError for a pattern
    that is no parameter's, and for a parameter of two patterns."""
    names: list[str] = [name for name, p in model.named_parameters() if p.requires_grad]
    found: dict[str, float] = {}
    for pattern, factor in training.lr_factors.items():
        mine = matched(pattern, names)
        if not mine:
            raise LowkeyError(
                f"training.lr_factors {pattern!r}: no trained parameter has such a name; "
                f"{nearest_name(pattern, names)}"
            )
        if twice := [name for name in mine if name in found]:
            raise LowkeyError(
                f"training.lr_factors {pattern!r}: parameter {twice[0]!r} has another factor already; name "
                "it once"
            )
        found |= dict.fromkeys(mine, factor)
    return {name: found.get(name, 1.0) for name in names}


def optimizers(model: PreTrainedModel, training: Training) -> list[Optimizer]:
    """One AdamW, or Muon and AdamW. Muon's updates are scaled to AdamW's RMS (arXiv:2502.16982, Eq. 4), so
    one `lr` serves both. Groups of parameters keep their `factor` of the rate."""
    times = factors(model, training)
    decayed, plain = (
        [
            {
                "params": [p for name, p in part.items() if times[name] == factor],
                "weight_decay": decay,
                "factor": factor,
            }
            for factor in dict.fromkeys(times[name] for name in part)
        ]
        for part, decay in zip(split_parameters(model), (training.weight_decay, 0.0), strict=True)
    )
    first, second = training.betas
    if training.optimizer == "adamw":
        return [AdamW([*decayed, *plain], lr=training.lr, betas=(first, second), fused=True)]
    muon = Muon(decayed, lr=training.lr, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(plain, lr=training.lr, betas=(first, second), fused=True)]


def rate(training: Training) -> Callable[[int], float]:
    """The share of the peak learning rate at a step, counted from 0, by transformers' schedules.

    Those give 0 at their point 0 and the end of the decay at their last: one point more than there are steps,
    and the first left out, so that no step is spent at a rate of 0.
    """
    points, warmup = training.steps + 1, training.warmup_steps
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if training.schedule == "wsd":
        made = get_wsd_schedule(
            optimizer,
            warmup,
            training.decay_steps,
            num_training_steps=points,
            decay_type="linear",
            min_lr_ratio=training.min_lr,
        )
    elif training.schedule == "cosine":
        made = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, points, min_lr_rate=training.min_lr
        )
    else:
        made = get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, points, lr_end=training.min_lr, power=1.0
        )
    share = made.lr_lambdas[0]
    return lambda step: share(step + 1)
