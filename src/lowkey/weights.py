"""Weights, wherever a model keeps them: on its devices, or offloaded by accelerate to memory or to disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from lowkey.types import LowkeyError


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, offloaded weights of `module` and of all its parts are where the module computes."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def entries(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of the state dict. Offloaded weights are read module by module, and a value is real only until the next one is asked.

    Errors: LowkeyError for a weight without numbers.
    """
    missing, seen = set(), set()
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
                if name in missing - seen and not value.is_meta:
                    seen.add(name)
                    yield name, value
    if missing - seen:
        raise without_numbers(min(missing - seen))


def without_numbers(name: str) -> LowkeyError:
    return LowkeyError(f"model: weight {name} is on device 'meta' and holds no numbers; load the model with from_pretrained")


def in_full(name: str, weight: Any) -> bool:
    """Whether a state-dict entry is a plain weight of 16 bits or more, not part of a packed or quantised one."""
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_quantized
