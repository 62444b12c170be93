"""SmallKV (arXiv:2508.02751): a small model reads along, and its attention says what the large one keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError
from lowkey.core.options import option
from lowkey.ops.matching import head_overlaps
from lowkey.policies.base import EvictionContext, Policy

Mix = Literal["sum", "exact"]


@dataclass(frozen=True)
class SmallKVTokens(Policy):
    """SmallKV's choice of tokens: every head keeps what its match in a small model attends to.

    The small model has the same tokenizer, reads the same tokens first, and keeps all of them. At the first
    eviction each query head of the large model is matched with the head of the small one whose tokens of most
    attention overlap most with its own (Jaccard; of equal heads the first). Score of token j, with b the
    attention weights of the matched heads: `mean over g of (sum over q of b[g, q, j])`.

    Args:
        window: number of newest queries of the small model whose attention is summed; 0 for all that it ever
            had, as in the paper (default 0).
        kernel: number of neighbouring positions of which the largest score counts, an odd number; 1 for none,
            as in the paper (default 1). Tokens of the window are left out.
        matched_queries: number of newest queries by whose attention heads are matched (default 128).
        matched_share: share of the tokens that count as those of most attention (default 0.1). The first 4
            and the newest 16 tokens are left out, since every head looks at them.
        offload: move what is dropped to host memory, from where a later eviction (`every`) may bring it back,
            as in the paper (default False: it is gone). Host memory then holds all tokens that are not kept,
            and `nbytes` counts them (`host_nbytes`); the budget is of what is kept, and counts no bytes.

    Raises:
        LowkeyError: as the base class; `offload` with a budget of bytes.

    It needs `make_cache(small=...)`. Sequences of a batch have heads matched by themselves, and cannot be
    padded.

    Source: arXiv:2508.02751. The paper matches by 100 to 200 tokens of the prompt and does not say how many
    tokens count as those of most attention. Where we differ: without `offload`, what the large model drops is
    gone; with it, tokens move when an eviction has chosen, while the paper fetches them as the small model
    reads the next token; the mean over the query heads of a KV head lets a KV
    head store each token once.
    """

    summary: ClassVar[str] = "what a small model attends to that reads along"
    paper: ClassVar[str] = "arXiv:2508.02751"
    layer: ClassVar[str] = "guided"
    reads_along: ClassVar[bool] = True
    # Whether some tokens are held by their values alone, which the small model's weights then meet.
    holds_values: ClassVar[bool] = False

    window: int = option(0, at_least=0, at_most=2**24)
    kernel: int = option(1, odd=True, at_least=1, at_most=4095)
    matched_queries: int = option(128, at_least=1, at_most=2**24)
    matched_share: float = option(0.1, above=0, at_most=1)
    offload: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.offload:
            return
        name = type(self).__name__
        if isinstance(self.budget, Budget) and self.budget.unit not in ("%", "tokens"):
            raise LowkeyError(
                f"budget {self.budget} with offload of {name}: host memory holds what is not kept, so that "
                "no number of bytes bounds it; give a share like '25%' or a number like '512 tokens'"
            )
        if self.holds_values:
            raise LowkeyError(
                f"offload of {name}: its second tier keeps values without keys; leave it out, or use "
                "smallkv-tokens"
            )

    @property
    def storing_layer(self) -> str:
        """See `Policy.storing_layer`."""
        return "offloading" if self.offload else super().storing_layer

    def match(self, own: Tensor, small: Tensor, tokens: int) -> Tensor:
        """The number of the small model's head for each head of the large one.

        Args:
            own: positions (b, H, k) of the tokens of most attention of the large model's query heads.
            small: positions (b, S, k') of those of the small model's.
            tokens: how many there are.

        Returns:
            (b, H), from 0 to S - 1.
        """
        return head_overlaps(own, small, tokens).argmax(2)

    def token_scores(self, small: Tensor) -> Tensor:
        """The score of every token that was ever seen.

        Args:
            small: (b, h, g, n), attention of the matched heads; see `EvictionContext.small`.

        Returns:
            (b, h, n).
        """
        scores = small.mean(2)
        if self.kernel == 1:
            return scores
        stop = max(0, scores.shape[2] - self.window)
        pooled = max_pool1d(scores[..., :stop], self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([pooled, scores[..., stop:]], 2) if stop else scores

    def score(self, context: EvictionContext) -> Tensor:
        """Attention of the matched heads (b, h, s); see `Policy.score`.

        Raises:
            LowkeyError: no small model has read along.
        """
        if context.small is None:
            raise LowkeyError(
                "smallkv: needs a small model that reads along; make the cache with "
                "lowkey.make_cache(model, policy=..., small=SMALL_MODEL)"
            )
        at = context.positions.clamp(0, context.small.shape[3] - 1)
        return self.token_scores(context.small).gather(2, at)


@dataclass(frozen=True)
class SmallKV(SmallKVTokens):
    """SmallKV: as `SmallKVTokens`, with a tier of tokens between those that stay and those that go, of which
    only the values are held.

    The attention weights of these come from the matched heads of the small model, as they are there. With b
    these weights, m their sum, and o what the tokens with keys give:
    `o + sum over j of b_j v_j`, or with `mix=exact` `(1 - m) o + sum over j of b_j v_j`.

    Args:
        marginal: share of the budget that values without keys take (default 0.25). A value takes about half
            of what a token takes.
        mix: `sum` adds both parts, as in the paper, so that weights sum to 1 + m; `exact` is what attention
            gives if the small model has the model's own weights and nothing is dropped (default `sum`).

    A token that has lost its key does not get it back. The small model reads every token, also of steps. It
    takes neither a plan nor integers.

    Source: arXiv:2508.02751, equation 6, and its split of 2 : 1 : 2 tokens into critical, recent and marginal
    ones. Where we differ: the `recent` tokens are a number and not a quarter of the budget.
    """

    summary: ClassVar[str] = "what a small model attends to, and values of further tokens"
    layer: ClassVar[str] = "value-rows"
    holds_values: ClassVar[bool] = True
    needs_whole_keys: ClassVar[str] = "holds values of the model's own without their keys"

    marginal: float = option(0.25, at_least=0, at_most=1)
    mix: Mix = "sum"
