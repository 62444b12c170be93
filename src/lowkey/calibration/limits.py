"""What a calibration may spend: bytes, or error. Imports no torch: the command line checks both budgets."""

from __future__ import annotations

import math

from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError

JUDGES = {  # what a layer's error is
    "layers": "the relative error of the layer's output, in the mean over tokens",
    "loss": "nats by which the cross-entropy grows when that layer alone is compressed",
}
BUDGET_LENGTH = 1024  # tokens of the cache that a budget is counted for


def resolve_budget(budget: str | Budget | None, error: float | None, judge: str) -> Budget | float:
    """Return the budget that is given, or 50% when none is.

    Args:
        budget: bytes of the compressed layers, or a share of them.
        error: the largest layer error, in the place of a budget.
        judge: what that error is, a key of JUDGES.

    Raises:
        LowkeyError: if both are given, or if the error is out of range for the judge.
    """
    if budget is not None and error is not None:
        raise LowkeyError(f"budget {budget} and error budget {error}: give one of them")
    if error is not None:
        if judge == "layers" and not 0 < error <= 1:
            raise LowkeyError(
                f"error budget {error}: a relative layer-output error above 0 and up to 1; the paper uses "
                "0.03"
            )
        if not 0 < error < math.inf:
            raise LowkeyError(
                f"error budget {error}: with judge 'loss' these are nats of cross-entropy, a finite number "
                "above 0; try 0.01"
            )
        return error
    return Budget.parse("50%" if budget is None else budget)
