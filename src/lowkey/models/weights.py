"""Weights, wherever a model keeps them: on its devices, or offloaded by accelerate to memory or to disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from lowkey.core.types import LowkeyError
from lowkey.models.adapters import Adapters


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, offloaded weights of `module` and of all its parts are where the module computes."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


@contextmanager
def only(wanted: Sequence[Tensor], model: nn.Module) -> Iterator[None]:
    """Only the wanted parameters require gradients inside; afterwards every one does as before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for weight in wanted:
            weight.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def entries(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of the state dict. Offloaded weights are read module by module, and a value is real only
    until the next one is asked.

    Errors: LowkeyError for a weight without numbers.
    """
    missing: set[str] = set()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_meta:
            missing.add(name)
        else:
            yield name, value
    if not missing:
        return
    for prefix, module in model.named_modules():
        if not has_offloaded_params(module):
            continue
        with align_module_device(module, torch.device("cpu")):
            for key, value in module.state_dict().items():
                name = f"{prefix}.{key}" if prefix else key
                if name in missing and not value.is_meta:
                    missing.discard(name)
                    yield name, value
    if missing:
        raise without_numbers(min(missing))


def place(t: Tensor) -> int:
    """Where a tensor lies in memory, or something else that differs between tensors."""
    try:
        return t.data_ptr()
    except RuntimeError:  # a tensor that is made of others
        return id(t)


def without_numbers(name: str) -> LowkeyError:
    return LowkeyError(
        f"model: weight {name} is on device 'meta' and holds no numbers; load the model with from_pretrained"
    )


def copied(module: nn.Module) -> nn.Module:
    """A copy that needs nothing of the original: with offloaded weights at hand and without accelerate's
    hooks.
    """
    shared: dict[int, Any] = {}  # what hooks know of the whole model is not copied with a part of it
    for part in module.modules():
        known = vars(part._hf_hook).values() if hasattr(part, "_hf_hook") else ()
        shared |= {id(x): x for x in known if isinstance(x, Mapping)}
    with at_hand(module):
        return remove_hook_from_module(copy.deepcopy(module, shared), recurse=True)


def check_plain(what: str, model: nn.Module, blocks: nn.Module) -> None:
    """Refuse a model whose decoder layers `blocks` hold something else than plain weights, for what writes
    new ones.

    Errors: LowkeyError.
    """
    if Adapters(model).wrappers:
        raise LowkeyError(
            f"{what}: the model has adapters around its weights; merge them first (merge_and_unload)"
        )
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor) and weight.is_meta:
            raise LowkeyError(
                f"{what}: weight {name} is offloaded or on device 'meta'; load the model without offloading"
            )
    for name, weight in blocks.state_dict().items():
        if not in_full(weight):
            raise LowkeyError(
                f"{what}: weight {name} of the decoder layers is quantised or packed; load it as bfloat16 or "
                "wider"
            )


def in_full(weight: Any) -> bool:
    """Whether a state-dict entry is a plain weight of 16 bits or more, not part of a packed or quantised one."""
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.dtype.itemsize >= 2
        and not weight.is_quantized
    )
