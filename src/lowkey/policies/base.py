"""What an eviction policy is (`Policy`), and what its score is given (`EvictionContext`).

Letters: b rows of the batch, h KV heads, g query heads per KV head, s candidate tokens, w queries, d head
width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from lowkey.backends.segment import softcapped
from lowkey.core.budget import Budget, too_few_tokens
from lowkey.core.errors import LowkeyError
from lowkey.core.options import check_options, option
from lowkey.ops.precision import for_products
from lowkey.policies.allocators import TOKEN_ALLOCATORS
from lowkey.policies.sharing import HeadImportance, TokenAllocator

Pooling = Literal["max", "mean"]
Rest = Literal["drop", "int8", "int4", "int2", "kivi8", "kivi4", "kivi2"]
CosAndSin = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Attention weights that are formed at once. On an accelerator a block takes 128 MiB in fp32, and a few copies
# of it exist for a moment. On a CPU a block is faster if it stays in the processor's own cache.
BLOCK_ON_ACCELERATOR, BLOCK_ON_CPU = 2**25, 2**20
# A product of few queries reads all keys for little work, so a block holds this many queries even if that
# exceeds the limits above.
MIN_QUERIES = 16


def newest_query_positions(at: Tensor, last: int = 0) -> Tensor:
    """Positions (b, w) with -1 for all queries that are not among the newest `last` of a row; 0 for all."""
    return at.masked_fill(at <= at.amax(1, keepdim=True) - last, -1) if last and at.shape[1] else at


def block_of_queries(numbers: int, device: torch.device) -> int:
    """How many queries to score at a time, of which each takes so many numbers."""
    block_size = BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ON_ACCELERATOR
    return max(MIN_QUERIES, block_size // max(1, numbers))


@dataclass(frozen=True)
class EvictionContext:
    """What a score is given: the tokens of one layer that may be evicted, and the queries that were recorded.

    Positions are counted from the first token of each row, whatever position ids the model uses.

    Args:
        keys: candidate keys (b, h, s, d), rotated, as attention reads them.
        values: candidate values (b, h, s, d).
        positions: position of each candidate (b, h, s).
        valid: (b, h, s), False for padding and for the gaps behind heads that hold fewer tokens.
        queries: queries (b, h, g, w, d) of the newest w tokens, rotated: all since the last eviction.
        query_positions: position of each query (b, w); -1 for padding.
        scaling: factor that attention multiplies logits with.
        softcap: attention's logit soft cap, or None.
        rope: cos and sin of positions that are counted as here.
        previous_scores: scores (b, h, s) that stateful policies gave at earlier evictions; 0 for new tokens.
        repeated_span: (b, 2), given if the queries repeat an earlier part of the row: the position of its
            first token and the one behind its last.
        repetition_lse: (b, h, g, w), given with `repeated_span`: log-sum-exp of each query's logits over that
            part and over the tokens of the repetition itself.
        visible: (b or 1, w, c), given where attention is not causal: which of the newest c candidates each
            query sees.
        transient: how many of the newest tokens only score the others and are then forgotten.
        layer: which of the cache's evicting layers this is.
        gates: what the policy has learnt of this layer; see `Policy.learns`.
        small: (b, h, g, n), given where a small model reads along: what the head that is matched with each
            query head attended to, summed over queries, at every position up to now.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    queries: Tensor
    query_positions: Tensor
    scaling: float
    softcap: float | None
    rope: CosAndSin
    previous_scores: Tensor
    repeated_span: Tensor | None = None
    repetition_lse: Tensor | None = None
    visible: Tensor | None = None
    transient: int = 0
    layer: int = 0
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    small: Tensor | None = None

    def newest_query_positions(self, last: int = 0) -> Tensor:
        """Positions of the newest queries of each row.

        Args:
            last: number of queries; 0 for all.

        Returns:
            `query_positions` (b, w) with -1 for all queries that are not among the newest `last`.
        """
        return newest_query_positions(self.query_positions, last)

    def logits(self, last: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Attention logits of the newest queries, in blocks of queries, so that the whole matrix never
        exists.

        Args:
            last: number of newest queries of each row; 0 for all.

        Returns:
            For each block, which queries it holds and their logits (b, h, g, block, n) in fp32. n is the
            number of candidates up to the last that a query of the block can see; candidates behind it have
            no logits. Padding, and what a query does not see, is -inf.
        """
        b, h, g, w = self.queries.shape[:4]
        positions = self.positions.masked_fill(~self.valid, torch.iinfo(torch.int64).max)
        # The lowest and highest position of each candidate over rows and heads. A candidate that some head
        # lacks has the largest integer as its highest, so that it always takes the masked path below.
        lowest, highest = positions.amin((0, 1)), positions.amax((0, 1))
        keys = for_products(self.keys).mT
        step = block_of_queries(b * h * g * keys.shape[3], keys.device)
        newest = self.newest_query_positions(last)
        for start in range(int(_true_at_first((newest < 0).all(0))), w, step):
            block = slice(start, start + step)
            at, queries = newest[:, block], for_products(self.queries[:, :, :, block]) * self.scaling
            # Causal attention: no query of the block sees candidates from `stop` on, every query sees the
            # first `clear` ones, and only those between need a mask.
            ends = _true_at_first((lowest > at.max()).flip(0)), _true_at_first(highest <= at.min())
            unseen, clear = torch.stack(ends).tolist()
            stop = len(lowest) - unseen
            if self.visible is not None:
                stop, clear = keys.shape[3], min(clear, keys.shape[3] - self.visible.shape[2])
            products = (queries.flatten(2, 3) @ keys[..., :stop]).float().unflatten(2, queries.shape[2:4])
            logits = softcapped(products, self.softcap)
            seen = self.valid[:, :, None, clear:stop] & (
                self.positions[:, :, None, clear:stop] <= at[:, None, :, None]
            )
            if self.visible is not None:
                chunk = slice(stop - clear - self.visible.shape[2], None)
                visible = self.visible[:, None, block] & (at >= 0)[:, None, :, None]
                seen[..., chunk] = self.valid[:, :, None, clear:][..., chunk] & visible
            logits[..., clear:].masked_fill_(~seen.unsqueeze(2), -torch.inf)
            yield block, logits

    def attention(self, last: int = 0) -> Iterator[Tensor]:
        """Attention weights of the newest queries, in blocks: the softmax of `logits`.

        Args:
            last: number of newest queries of each row; 0 for all.

        Returns:
            Weights (b, h, g, block, n) in fp32, as `logits`; the weights of padding are 0.
        """
        for block, logits in self.logits(last):
            weights = logits.softmax(-1)
            # The softmax of a query that sees nothing is NaN.
            padding = self.newest_query_positions(last)[:, block] < 0
            some_see_nothing = self.visible is not None or bool(padding.any())
            yield weights.nan_to_num_(0.0) if some_see_nothing else weights


@dataclass(frozen=True)
class SecondPass:
    """How a model reads its context a second time, piece by piece: each piece behind a request to repeat it.

    Args:
        chunk: number of tokens of each piece.
        bridge: number of tokens before a piece that are given with the request.
        prompt: text of the request.
        whole_context: whether the queries of a piece are scored over all of the context, not over the piece
            that they repeat.
    """

    chunk: int
    bridge: int
    prompt: str
    whole_context: bool


@dataclass(frozen=True)
class Policy(ABC):
    """An eviction policy: a score for every token, an allocator that says how many each head keeps, and a
    trigger.

    Every head keeps the tokens of the highest scores, as many as the allocator gives it. Eviction follows
    each prompt or chunk, and each `every` decode steps.

    Args:
        budget: what is kept of the tokens seen, per head on average: `10%`, `512 tokens`, `1.5 GiB` or
            `4 KiB/token`. Bytes are those of the whole cache. None only with an allocator that keeps every
            token of a sufficient score (`at-least`).
        allocator: how the budget is split over layers and heads: a name of `TOKEN_ALLOCATORS`, or an object
            (default `uniform`).
        sinks: number of first tokens of each row that are always kept; they count in the budget (default 4).
        recent: number of newest tokens of each row that are always kept; they count in the budget (default
            8).
        every: evict after this many decode steps, too; 0 evicts after prompts and chunks only (default 0).
        head_pooling: how the scores of KV heads that share a latent, and so keep the same tokens, become one:
            `mean` or `max` (default `mean`).
        protect_prompt: keep all tokens that came before the first step of decoding (default False). The
            budget then counts the tokens that came after them; it is a share or a number of tokens. Later
            turns of a conversation count as what came after.
        rest: what becomes of tokens that are not kept: `drop`, or the integers in which they are held
            instead, fewer bits than those of the cache (default `drop`). What is said of kept tokens, like
            the budget, is then of those that stay in the cache's own form; a budget of bytes still counts
            everything. A token that once is in fewer bits stays so.

    Raises:
        LowkeyError: an option out of its range, a budget without need or missing, or one that does not hold
            the sinks and recent tokens, or counts bytes beside a protected prompt.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    # Whether the score reads queries. Those of decode steps are recorded only for policies that do.
    uses_queries: ClassVar[bool] = True
    # Whether scores are stored with the tokens and given back at the next eviction (`previous_scores`).
    stateful: ClassVar[bool] = False
    # The cache layer that stores what this policy keeps, a name of `lowkey.cache.cache.EVICTING_LAYERS`.
    layer: ClassVar[str] = "evicting"
    # Whether that layer holds, in every KV head, one token that stands for all that were dropped.
    compensates: ClassVar[bool] = False
    # Whether it must be shown the right answer, too, which only an evaluation can.
    sees_answer: ClassVar[bool] = False
    # What it needs that was learnt from one model: a method of `lowkey gates`, or empty.
    learns: ClassVar[str] = ""
    # Whether a small model has to read every token before the model does, see `lowkey.make_cache(small=...)`.
    reads_along: ClassVar[bool] = False
    # Whether that layer drops channels of the keys that it keeps.
    prunes_channels: ClassVar[bool] = False
    # Whether a token that was kept stays kept at later evictions, as long as there is no budget.
    keeps_for_good: ClassVar[bool] = False
    # Whether that layer holds a bias beside every stored key, in one more channel.
    holds_biases: ClassVar[bool] = False
    # Whether that layer holds one row for a chunk of tokens; see `lowkey.policies.chunks.ChunkPolicy`.
    pools_chunks: ClassVar[bool] = False
    # In words, what it does to keys that neither a plan nor integers allow; empty if any stored form will do.
    needs_whole_keys: ClassVar[str] = ""

    budget: Budget | str | None
    allocator: str | TokenAllocator = "uniform"
    sinks: int = option(4, at_least=0, at_most=2**24)
    recent: int = option(8, at_least=0, at_most=2**24)
    every: int = option(0, at_least=0, at_most=2**24)
    head_pooling: Pooling = "mean"
    protect_prompt: bool = False
    rest: Rest = "drop"

    def __post_init__(self) -> None:
        parsed = None if self.budget is None else Budget.parse(self.budget)
        object.__setattr__(self, "budget", parsed)
        check_options(self)
        if isinstance(self.allocator, str) and self.allocator not in TOKEN_ALLOCATORS:
            raise LowkeyError(
                f"allocator {self.allocator!r} is unknown; choose one of {', '.join(TOKEN_ALLOCATORS)}"
            )
        if self.resolved_allocator().bounded != (parsed is not None):
            unbounded = " or ".join(repr(name) for name, kind in TOKEN_ALLOCATORS.items() if not kind.bounded)
            rule = (
                "its allocator keeps what scores enough and takes none; leave it out"
                if parsed
                else f"it needs a budget, like '10%' or '64 tokens'; only allocator {unbounded} does without"
            )
            raise LowkeyError(f"budget {parsed} of {type(self).__name__}: {rule}")
        if parsed and parsed.unit == "tokens" and parsed.amount < self.sinks + self.recent:
            raise too_few_tokens(parsed, parsed.amount, self.sinks, self.recent)
        if self.protect_prompt and parsed and parsed.unit not in ("%", "tokens"):
            raise LowkeyError(
                f"budget {parsed} with protect_prompt: it is of the tokens that come after the prompt, not "
                "of bytes; give a share like '25%' or a number like '512 tokens'"
            )
        if self.rest != "drop" and self.layer != "evicting":
            raise LowkeyError(
                f"rest {self.rest!r} of {type(self).__name__}: its layers hold tokens in a form of their own "
                "and drop the others; leave it out, or use another policy"
            )
        if self.protect_prompt and self.prunes_channels:
            raise LowkeyError(
                f"protect_prompt of {type(self).__name__}: it drops channels of the prompt's keys; leave it "
                "out"
            )

    def resolved_allocator(self) -> TokenAllocator:
        """The allocator as an object; one given by name has its default options."""
        return TOKEN_ALLOCATORS[self.allocator]() if isinstance(self.allocator, str) else self.allocator

    @property
    def storing_layer(self) -> str:
        """The cache layer that stores what this policy keeps, and its `rest` if it has one."""
        return self.layer if self.rest == "drop" else "mixed"

    @property
    def second_pass(self) -> SecondPass | None:
        """How the model must read its context a second time before it can be scored, as `lowkey.prefill` does
        it; None for a policy that needs no second pass.
        """
        return None

    @property
    def is_sparse(self) -> bool:
        """Whether the tokens of a prompt that are not kept attend to nothing in a layer."""
        return False

    @property
    def needs_second_pass(self) -> bool:
        """Whether tokens can be scored only after a second pass over the context."""
        return self.second_pass is not None

    @property
    def uses_rotations(self) -> bool:
        """Whether the score calls `EvictionContext.rope`.

        A model whose rotations change with the length of the text cannot serve such a score: rotations
        computed for the score would change what the model itself gets.
        """
        return False

    def gate_shapes(self, heads: int, groups: int, width: int, rotated: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what it has learnt of one layer, by name; none unless it `learns`.

        Args:
            heads: KV heads.
            groups: query heads of each.
            width: channels of a head.
            rotated: how many of these are rotated.
        """
        return {}

    def with_head_scores(self, heads: HeadImportance) -> Self:
        """A copy whose allocator has the head scores that it needs.

        Args:
            heads: head scores by kind.

        Raises:
            LowkeyError: scores of a kind that the allocator needs are not among `heads`.
        """
        return replace(self, allocator=self.resolved_allocator().with_head_scores(heads))

    @abstractmethod
    def score(self, context: EvictionContext) -> Tensor:
        """The score of every candidate (b, h, s); the tokens of the highest scores are kept.

        Scores of invalid candidates, of sinks and of recent tokens are ignored.
        """

    def score_and_mass(self, context: EvictionContext) -> tuple[Tensor, Tensor | None]:
        """Scores, and what the tokens weigh (b, h, s) where an allocator counts shares of a layer's mass.

        None for the mass says that scores are weights themselves.
        """
        return self.score(context), None


def attention_sums(context: EvictionContext, last: int = 0, squared: bool = False) -> Tensor:
    """Attention that each candidate gets, summed over queries.

    Args:
        context: keys and queries of one layer.
        last: number of newest queries of each row; 0 for all.
        squared: sum the squares of the attention weights instead.

    Returns:
        Sums (b, h, g, s) in fp32.
    """
    b, h, g, _ = context.queries.shape[:4]
    total = torch.zeros(b, h, g, context.keys.shape[2], device=context.keys.device)
    for weights in context.attention(last):
        total[..., : weights.shape[-1]] += (weights.square_() if squared else weights).sum(3)
    return total


def attention_maxima(context: EvictionContext, last: int = 0) -> Tensor:
    """The largest attention that each candidate gets from any query of any head of its KV head.

    Args:
        context: keys and queries of one layer.
        last: number of newest queries of each row; 0 for all.

    Returns:
        Maxima (b, h, s) in fp32.
    """
    largest = context.keys.new_zeros(context.keys.shape[:3], dtype=torch.float32)
    for weights in context.attention(last):
        seen = largest[..., : weights.shape[-1]]
        torch.maximum(seen, weights.amax((2, 3)), out=seen)
    return largest


def norms(x: Tensor) -> Tensor:
    """Euclidean norms of vectors (..., d): (...), in fp32 or in the dtype of `x` if that is finer."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def pooled_scores(
    context: EvictionContext, scores: Tensor, kernel: int, pooling: Pooling, window: int
) -> Tensor:
    """Pool scores over neighbouring positions, so that clusters of tokens are kept together.

    Tokens of the observation window are not pooled: they neither raise scores of the prompt nor take from it.

    Args:
        context: gives the position of every score.
        scores: (b, h, s).
        kernel: number of positions that are pooled, an odd number; 1 changes nothing.
        pooling: `max`, or `mean`: the sum over `kernel`, in which missing positions count as 0.
        window: number of newest queries whose tokens are the observation window; 0 for none.

    Returns:
        Pooled scores (b, h, s).

    Source: `max` with a kernel of 7 is arXiv:2404.14469, PyramidKV and HeadKV; `mean` with a kernel of 5 is
    SnapKV's published code and kvpress.
    """
    if kernel == 1:
        return scores
    prompt = prompt_tokens(context, window)
    # Scores are laid out by position first, because tokens between two candidates may have been evicted:
    # neighbours in memory are not neighbours in the text.
    slot = context.positions.masked_fill(~prompt, 0)
    by_position = scores.new_zeros(*scores.shape[:2], int(slot.max()) + 1).scatter_add(
        2, slot, scores.masked_fill(~prompt, 0.0)
    )
    pool = max_pool1d if pooling == "max" else avg_pool1d
    return pool(by_position, kernel, stride=1, padding=kernel // 2).gather(2, slot).where(prompt, scores)


def prompt_tokens(context: EvictionContext, window: int) -> Tensor:
    """(b, h, s): which candidates come before the observation window of so many queries; 0 for no window."""
    observing = context.newest_query_positions(window)
    if window:
        prompt_ends = observing.masked_fill(observing < 0, observing.max()).amin(1)
    else:
        prompt_ends = observing.amax(1) + 1
    return context.valid & (context.positions < prompt_ends[:, None, None])


def _true_at_first(flags: Tensor) -> Tensor:
    """How many flags are true before the first that is not."""
    return flags.long().cumprod(0).sum()
