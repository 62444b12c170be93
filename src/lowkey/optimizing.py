"""The state of an optimizer as named tensors, for a file from which training goes on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

PREFIX = "adam."


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything it keeps for its parameters, by their place: `adam.3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{PREFIX}{place}.{name}": t for place, kept in state.items() for name, t in kept.items()}


def fill(optimizer: Optimizer, found: Mapping[str, Tensor]) -> None:
    """Give it what `tensors_of` had found, on its parameters' devices; other names are left alone."""
    state: dict[int, dict[str, Tensor]] = {}
    for name in found:
        if name.startswith(PREFIX):
            place, kept = name.removeprefix(PREFIX).split(".")
            state.setdefault(int(place), {})[kept] = found[name]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
