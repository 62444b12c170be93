"""The state of an optimizer as named tensors, so that training can go on from a file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from lowkey.core.types import LowkeyError

PREFIX = "adam."
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that an Adam optimizer keeps for its parameters.

    Names hold the parameter's number in the optimizer, like `adam.3.exp_avg`.
    """
    state = optimizer.state_dict()["state"]
    return {f"{PREFIX}{number}.{name}": t for number, own in state.items() for name, t in own.items()}


def fill_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give an optimizer the state that `tensors_of` returned, on its parameters' devices.

    Args:
        optimizer: with the same parameters, in the same order.
        tensors: may hold others, whose names do not begin with `adam.`.
        where: the file or folder they came from, for messages.

    Raises:
        LowkeyError: for tensors that do not fit the parameters, or a state that is incomplete.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name.startswith(PREFIX):
            number, _, kind = name.removeprefix(PREFIX).partition(".")
            # a file may hold anything, and `load_state_dict` checks neither numbers nor shapes
            known = number.isdecimal() and int(number) < len(parameters) and kind in ADAM_STATE
            if not known or t.shape != (() if kind == "step" else parameters[int(number)].shape):
                raise LowkeyError(
                    f"{where!r}: {name!r} is not of this optimizer; it is damaged: delete it and start anew"
                )
            state.setdefault(int(number), {})[kind] = t
    if any(set(own) != set(ADAM_STATE) for own in state.values()):
        raise LowkeyError(
            f"{where!r}: the state of an optimizer is not whole; it is damaged: delete it and start anew"
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
