"""Optimizers, learning rates, and which parameters go to which."""

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
HEAD_GATE = "self_attn.gate_proj"  # the MLP's `gate_proj` is a hidden matrix like any other


def split_parameters(model: PreTrainedModel) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split parameters into hidden matrices and all others, by name; tied ones occur once.

    Hidden matrices are the 2-D weights inside the layers. Muon takes them, or AdamW with weight decay. All
    others go to AdamW without weight decay: embeddings, the output head, norms, biases and

    - per-head up-factors `k_up`, `v_up` (H, r, h). torch's Muon takes 2-D only. Read as one (H r, h) matrix
      they would be orthogonalised against one another, although heads are independent maps. Decay would
      shrink a head's residual towards the shared part.
    - head mixes `k_mix`, `v_mix` (m, G): a dozen numbers that start as an identity, which decay would pull to
      zero. An orthogonalised update would be as large for a mix that is already right.
    - output gates of the attention: they saturate, and decay works against that.

    Returns:
        Hidden matrices, and all others.
    """
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    outer |= {id(p) for p in head.parameters()} if head is not None else set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {
        name: p
        for name, p in trained.items()
        if p.ndim == 2 and id(p) not in outer and not _is_mix_or_gate(name)
    }
    return hidden, {name: p for name, p in trained.items() if name not in hidden}


def _is_mix_or_gate(name: str) -> bool:
    """Whether a parameter is a head mix or an output gate."""
    return any(part in HEAD_MIXES for part in name.split(".")) or HEAD_GATE in name


def matched(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that contain a pattern (* and ? stand for any characters)."""
    return [name for name in names if fnmatchcase(name, f"*{pattern}*")]


def factors(model: PreTrainedModel, training: Training) -> dict[str, float]:
    """Factor on the learning rate of every trained parameter, by name.

    Raises:
        LowkeyError: a pattern of `training.lr_factors` matches no parameter, or two match the same one.
    """
    names: list[str] = [name for name, p in model.named_parameters() if p.requires_grad]
    factor_of: dict[str, float] = {}
    for pattern, factor in training.lr_factors.items():
        matching = matched(pattern, names)
        if not matching:
            raise LowkeyError(
                f"training.lr_factors {pattern!r}: no trained parameter has such a name; "
                f"{nearest_name(pattern, names)}"
            )
        if twice := [name for name in matching if name in factor_of]:
            raise LowkeyError(
                f"training.lr_factors {pattern!r}: parameter {twice[0]!r} has another factor already; name "
                "it once"
            )
        factor_of |= dict.fromkeys(matching, factor)
    return {name: factor_of.get(name, 1.0) for name in names}


def optimizers(model: PreTrainedModel, training: Training) -> list[Optimizer]:
    """One AdamW, or Muon and AdamW.

    Muon's updates are scaled to AdamW's RMS (arXiv:2502.16982, Eq. 4), so that one learning rate serves both.
    Groups of parameters carry their `factor` of the rate.
    """
    factor_of = factors(model, training)

    def groups(parameters: dict[str, nn.Parameter], decay: float) -> list[dict]:
        """One group of parameters for each factor."""
        return [
            {
                "params": [p for name, p in parameters.items() if factor_of[name] == factor],
                "weight_decay": decay,
                "factor": factor,
            }
            for factor in dict.fromkeys(factor_of[name] for name in parameters)
        ]

    hidden, others = split_parameters(model)
    decayed, plain = groups(hidden, training.weight_decay), groups(others, 0.0)
    first, second = training.betas
    if training.optimizer == "adamw":
        return [AdamW([*decayed, *plain], lr=training.lr, betas=(first, second), fused=True)]
    muon = Muon(decayed, lr=training.lr, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(plain, lr=training.lr, betas=(first, second), fused=True)]


def rate(training: Training) -> Callable[[int], float]:
    """The share of the peak learning rate at a step, counted from 0, by transformers' schedules.

    Those give 0 at their point 0, and the end of the decay at their last point. They are made with one point
    more than there are steps, and the first is left out, so that no step is trained at a rate of 0.
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
