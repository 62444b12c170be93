"""KVzip (arXiv:2505.23416): what the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowkey.options import option
from lowkey.policies.base import Policy, Scene
from lowkey.types import LowkeyError


@dataclass(frozen=True)
class KVzip(Policy):
    """Largest attention that a token gets, over all queries and query heads of its KV head, while the model repeats the context.

    So nothing depends on a question, and one cache serves many. The repetition is a second pass over the context in pieces of `chunk`
    tokens, which `lowkey.prefill` makes; a cache that was filled otherwise refuses to evict. Each piece is asked for with `prompt` and the
    `bridge` tokens before it. Scores are softmax weights over the whole context; the published code puts only the piece, the sinks and the
    repetition under the softmax. All layers and heads share one threshold (`global`), as in the paper's non-uniform mode.
    """

    summary: ClassVar[str] = "what the model needs to repeat its context"
    paper: ClassVar[str] = "arXiv:2505.23416"
    carries: ClassVar[bool] = True
    repeats: ClassVar[bool] = True

    chunk: int = option(2000, at_least=1, at_most=2**24)
    bridge: int = option(8, at_least=0, at_most=2**24)
    prompt: str = option("\n\nRepeat the previous context exactly.\n\n", any_text=True)

    def score(self, scene: Scene) -> Tensor:
        if not scene.queries.shape[3]:
            return scene.carried
        if not scene.looking:
            raise LowkeyError(
                "policy kvzip: needs a second pass over the context; fill the cache with lowkey.prefill(model, tokenizer, cache, ids)"
            )
        found = scene.carried
        for first in range(0, scene.queries.shape[3], BLOCK):
            found = found.maximum(scene.weights(first + BLOCK, first).amax((2, 3)))
        return found


BLOCK = 64  # queries at a time
