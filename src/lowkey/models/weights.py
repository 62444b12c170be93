"""The weights of a model, wherever they are: on its devices, or offloaded by accelerate to memory or disk."""

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
def weights_loaded(module: nn.Module) -> Iterator[None]:
    """Inside the block, offloaded weights of a module and its parts are on the device where it computes."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


@contextmanager
def only_trainable(wanted: Sequence[Tensor], model: nn.Module) -> Iterator[None]:
    """Inside the block, only the wanted parameters require gradients; afterwards, each does as before."""
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


def state_entries(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The entries of a model's state dict, offloaded ones too.

    Offloaded weights are read module by module. A value has numbers only until the next one is asked for.

    Yields:
        (name, value).

    Raises:
        LowkeyError: for a weight without numbers.
    """
    missing: set[str] = set()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_meta:
            missing.add(name)
        else:
            yield name, value
    if not missing:
        return
    # offloaded weights: one module at a time is loaded, so that the whole model need not fit into memory
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
        raise missing_numbers(min(missing))


def storage_address(t: Tensor) -> int:
    """Where a tensor lies in memory, or another number that differs between tensors."""
    try:
        return t.data_ptr()
    except RuntimeError:  # a tensor that is made of others has no memory of its own
        return id(t)


def missing_numbers(name: str) -> LowkeyError:
    """The error for a weight that holds no numbers."""
    return LowkeyError(
        f"model: weight {name} is on device 'meta' and holds no numbers; load the model with from_pretrained"
    )


def standalone_copy(module: nn.Module) -> nn.Module:
    """A copy of a part of a model that needs nothing of the model.

    Offloaded weights are loaded, and accelerate's hooks are left out.
    """
    shared: dict[int, Any] = {}  # hooks know of the whole model, which must not be copied with a part of it
    for part in module.modules():
        known = vars(part._hf_hook).values() if hasattr(part, "_hf_hook") else ()
        shared |= {id(x): x for x in known if isinstance(x, Mapping)}
    with weights_loaded(module):
        return remove_hook_from_module(copy.deepcopy(module, shared), recurse=True)


def check_plain(what: str, model: nn.Module, blocks: nn.Module) -> None:
    """Refuse a model whose weights cannot be replaced by new ones.

    Args:
        what: what wants to replace them, for messages.
        model: the model.
        blocks: its decoder layers.

    Raises:
        LowkeyError: for adapters, offloaded weights, and quantised or packed weights in the decoder layers.
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
        if not is_plain_weight(weight):
            raise LowkeyError(
                f"{what}: weight {name} of the decoder layers is quantised or packed; load it as bfloat16 or "
                "wider"
            )


def is_plain_weight(weight: Any) -> bool:
    """Whether a state-dict entry is a plain weight of at least 16 bits, not a packed or quantised one."""
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.dtype.itemsize >= 2
        and not weight.is_quantized
    )
