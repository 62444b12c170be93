"""The attention of the true continuation: a control that no score can know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.core.errors import LowkeyError
from lowkey.policies.base import EvictionContext, Policy, attention_maxima


@dataclass(frozen=True)
class Oracle(Policy):
    """Oracle: the tokens that the question and its right answer will attend to. A control.

    Score of token j: `max over g, q of a[g, q, j]`, with a the attention weights of query head g of the KV
    head and query q, over the queries of the question and of the right answer, which are then forgotten. What
    it loses, no other choice of as many tokens by attention would have kept; it is no bound for choices by
    anything else. Only `lowkey eval --task recall` knows the answer. It has no options of its own.
    """

    summary: ClassVar[str] = "what the right answer attends to, a control"
    paper: ClassVar[str] = ""
    sees_answer: ClassVar[bool] = True

    def score(self, context: EvictionContext) -> Tensor:
        """The largest weight that a query of what comes next gives (b, h, s); see `Policy.score`.

        Raises:
            LowkeyError: nothing comes next.
        """
        if not context.transient:
            raise LowkeyError(
                "policy oracle: needs the question and the right answer behind the prompt, as "
                "lowkey.prefill(question=n) takes them and lowkey eval --task recall gives them"
            )
        return attention_maxima(context, context.transient)
