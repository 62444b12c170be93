"""The state of an optimizer as named tensors, for a file from which training goes on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from lowkey.core.types import LowkeyError

PREFIX = "adam."
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything it keeps for its parameters, by their place: `adam.3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{PREFIX}{place}.{name}": t for place, kept in state.items() for name, t in kept.items()}


def fill_state(optimizer: Optimizer, found: Mapping[str, Tensor], where: str) -> None:
    """Give it what `tensors_of` had found, on its parameters' devices; other names are left alone.

    Errors: LowkeyError, which names the file or folder `where`, for what does not fit the parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in found.items():
        if name.startswith(PREFIX):
            place, _, kept = name.removeprefix(PREFIX).partition(".")
            known = place.isdecimal() and int(place) < len(parameters) and kept in ADAM_STATE
            if not known or t.shape != (() if kept == "step" else parameters[int(place)].shape):
                raise LowkeyError(
                    f"{where!r}: {name!r} is not of this optimizer; it is damaged: delete it and start anew"
                )
            state.setdefault(int(place), {})[kept] = t
    if any(set(kept) != set(ADAM_STATE) for kept in state.values()):
        raise LowkeyError(
            f"{where!r}: the state of an optimizer is not whole; it is damaged: delete it and start anew"
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
