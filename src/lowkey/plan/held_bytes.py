"""How many bytes a cache of a plan holds after a prompt, as a function of the prompt's length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowkey.core.budget import Budget
from lowkey.core.types import LowkeyError
from lowkey.plan.rows import rows_of_heads
from lowkey.policies import policy_from_dict
from lowkey.policies.base import Policy
from lowkey.policies.sharing import KnownBefore
from lowkey.storage.budgets import LEAST_INCREMENT, EvictionCosts, budget_of, protected_tokens
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_or_none

if TYPE_CHECKING:  # that module imports the card, which imports this one
    from lowkey.plan.plan import Plan

INDEX = 8  # bytes of an index
POSITION, SCORE, SINK_INDEX = 4, 4, 4  # bytes
CHANNEL, PRUNED_UNTIL, IS_FIRM = 2, 4, 1  # bytes of what a policy that prunes channels remembers
MEAN = 4  # bytes of a number of the tokens that stand for dropped ones
CHUNK_COUNT, CHUNK_STATE = 1, 4  # bytes of a chunk's token count, and of a number remembered between chunks


def held_bytes(plan: Plan, tokens: int, itemsize: int, latents: float = 1.0) -> int:
    """The bytes that one sequence takes in the compressed layers after a prompt, which came in one call.

    Exact, unless they depend on the text. Then it is the most that they can be:

    - Where the heads of a layer compete (`ada`) and keys are packed in blocks of tokens, the last block of
      every row counts as filled up.
    - Where layers compete (`global`, `blocks`), those whose tokens take most keep all they can. If all layers
      are alike, `global` is exact but for blocks of tokens, and `blocks` stays below by less than a block.
    - A policy without a budget may keep everything.
    - Sliding layers, which a budget of bytes pays for too, are not known to a plan, and count as nothing.

    Where every token has a rank of its own, it is what tokens like the held-out ones take.

    Args:
        plan: the plan.
        tokens: length of the prompt.
        itemsize: bytes of a number in the model's dtype.
        latents: what the bytes of stored tokens are multiplied with, to ask for other ranks of the same form.

    Raises:
        LowkeyError: for a budget of bytes that is too small for such a prompt, as the cache would.
    """
    if plan.token_ranks is not None:
        # where each level begins and ends, and two indices of the sequence
        indices = len(plan.factors) * INDEX * (2 * len(plan.token_ranks.levels) + 2)
        return math.ceil(tokens * plan.bytes_per_token(itemsize) + indices)
    packed = scheme_or_none(plan.bits)
    whole = plan.cache_bytes(itemsize, tokens)
    lossless = packed is None and not plan.factors
    # a plan that changes no number keeps exact tokens only if it says so
    recent = whole.recent_tokens if not lossless or plan.sinks or plan.recent else 0
    policy = None if plan.policy is None else policy_from_dict(plan.policy)
    if lossless and policy is None and not plan.sinks and not recent:
        return tokens * whole.full_token_bytes  # transformers' own layers
    exact, layers = Exact(plan.sinks, recent), _layers(plan, tokens, itemsize, latents)
    if policy is not None:
        if policy.holds_biases:  # one more channel of every stored key
            layers = tuple(replace(x, sizes=(x.sizes[0] + itemsize, *x.sizes[1:])) for x in layers)
        rest = (
            None
            if policy.rest == "drop"
            else _layers(replace(plan, bits=policy.rest), tokens, itemsize, latents)
        )
        return math.ceil(_Evicted(plan, policy, tokens, itemsize, exact, layers, rest).held())
    by_age = max(layers[0].blocks) > 1 or (recent > 0 and not lossless)
    return math.ceil(_dense(layers, tokens, exact) + len(layers) * INDEX * (3 if by_age else 2))


def text_decides(plan: Plan) -> bool:
    """Whether what a plan holds depends on the text, so that `held_bytes` is the most that it may be."""
    if plan.policy is None:
        return False
    allocator, packed = policy_from_dict(plan.policy).resolved_allocator(), scheme_or_none(plan.bits)
    in_blocks = packed is not None and max(packed.keys.block, packed.values.block) > 1
    return allocator.scores_decide == "layers" or (allocator.scores_decide == "heads" and in_blocks)


@dataclass(frozen=True)
class _Layer:
    """One compressed layer.

    Args:
        rows: of each sequence.
        exact: bytes of one exact token in one row.
        blocks: how many tokens are packed together, of keys and of values.
        sizes: bytes of one stored token in one row, of keys and of values.
    """

    rows: int
    exact: int
    blocks: tuple[int, int]
    sizes: tuple[float, ...]

    @property
    def stored(self) -> float:
        """Bytes of one stored token in one row."""
        return sum(self.sizes)

    @property
    def filled(self) -> float:
        """The most bytes that the last blocks of one row are filled up with."""
        return sum((block - 1) * size for block, size in zip(self.blocks, self.sizes, strict=True))

    def row(self, tokens: int) -> float:
        """Bytes of so many tokens in one row, whose last block is filled up."""
        sides = zip(self.blocks, self.sizes, strict=True)
        return sum(-(-tokens // block) * block * size for block, size in sides)


def _layers(plan: Plan, tokens: int, itemsize: int, latents: float) -> tuple[_Layer, ...]:
    """The compressed layers of a plan; arguments are those of `held_bytes`."""
    g, packed, found = plan.geometry, scheme_or_none(plan.bits), []
    whole = plan.cache_bytes(itemsize, tokens)
    blocks = (packed.keys.block, packed.values.block) if packed else (1, 1)
    for shapes in plan.stored_shapes():
        rows = g["kv_heads"] // math.lcm(*(merged for merged, _ in shapes))
        sizes = [latents * whole.latent_token_bytes(i, *shape) / rows for i, shape in enumerate(shapes)]
        exact = 2 * g["kv_heads"] * g["head_dim"] * itemsize // rows
        found.append(_Layer(rows, exact, blocks, tuple(sizes)))
    return tuple(found)


def _dense(layers: tuple[_Layer, ...], tokens: int, exact: Exact) -> float:
    """The bytes of layers that keep all tokens, and of the indices of sinks, without others."""
    block = max(layers[0].blocks)
    slots = max(0, tokens - exact.recent) // block * block
    return sum(
        layer.rows * (slots * layer.stored + (tokens - slots + exact.sinks) * layer.exact)
        + SINK_INDEX * exact.sinks
        for layer in layers
    )


@dataclass(frozen=True)
class _Evicted:
    """The layers of a plan with a policy, after a prompt.

    Args:
        plan: the plan.
        policy: its policy.
        tokens: length of the prompt.
        itemsize: bytes of a number in the model's dtype.
        exact: sinks and recent tokens that are held exactly.
        layers: the compressed layers; all have the same number of rows.
        rest: the same layers as they hold tokens that are not kept; None if these are dropped.
    """

    plan: Plan
    policy: Policy
    tokens: int
    itemsize: int
    exact: Exact
    layers: tuple[_Layer, ...]
    rest: tuple[_Layer, ...] | None = None

    @property
    def rows(self) -> int:
        """Rows of one layer."""
        return self.layers[0].rows

    @property
    def budget(self) -> Budget:
        """The policy's budget; 100 % if it has none."""
        return budget_of(self.policy)

    @property
    def in_bytes(self) -> bool:
        """Whether the budget is one of bytes."""
        return self.budget.unit in ("bytes", "bytes/token")

    @property
    def beside(self) -> int:
        """Bytes of a kept token's position and score."""
        return POSITION + self.score

    @property
    def score(self) -> int:
        """Bytes of a token's score, if it is held."""
        return SCORE if self.policy.stateful else 0

    def held(self) -> float:
        """The bytes of all layers."""
        indices = len(self.layers) * self.index_bytes()
        lost = 0 if self.keeps_channels() else self.channels_lost()
        if self.in_bytes:
            self.costs(lost).check(self.policy, [self.tokens])
        if not lost and self.stays_dense():
            no_sinks = indices - len(self.layers) * SINK_INDEX * self.exact.sinks
            return _dense(self.layers, self.tokens, self.exact) + no_sinks
        if lost:
            indices += len(self.layers) * self.pruning_bytes(lost)
        total = indices + self.kept_bytes(lost)
        if not self.in_bytes:
            return total
        return min(total, self.budget.amount * (self.tokens if self.budget.unit == "bytes/token" else 1))

    def index_bytes(self) -> int:
        """Bytes of a layer that are held whatever is kept."""
        size = INDEX * (2 + self.rows + 1) + SINK_INDEX * self.exact.sinks
        g = self.plan.geometry
        if self.policy.compensates:
            size += g["kv_heads"] * (2 * g["head_dim"] + 1) * MEAN
        if self.policy.prunes_channels:
            size += INDEX * (self.rows + 1) + IS_FIRM
        if self.rest is not None:
            size += INDEX * (self.rows + 1)
        if self.policy.pools_chunks:
            policy: Any = self.policy
            size += INDEX * (self.rows + 1) + CHUNK_STATE * g["kv_heads"] * policy.state_width
        return size

    def pooled(self, layer: _Layer) -> int:
        """Bytes of a chunk's row, its position, count and score included; 0 for a policy without them."""
        return layer.exact + POSITION + CHUNK_COUNT + SCORE if self.policy.pools_chunks else 0

    def stays_dense(self) -> bool:
        """Whether all tokens stay where they are; see `EvictingLayer._scores_decide_nothing`."""
        if self.policy.budget is None or (max(self.layers[0].blocks) > 1 and self.budget.unit != "%"):
            return False
        if self.policy.stateful and not self.policy.needs_second_pass:
            return False
        return self.costs(0).fits(self.policy, self.tokens) if self.in_bytes else self.mean(0) >= self.tokens

    # -- channels

    def channels_lost(self) -> int:
        """How many key channels pruned tokens lose; 0 for a policy that prunes none."""
        if not self.policy.prunes_channels:
            return 0
        d = self.plan.geometry["head_dim"]
        return d - max(1, round(self.channel_share() * d))

    def channel_share(self) -> float:
        """The share of key channels that pruned tokens keep; see `PruningLayer.channel_share`."""
        policy: Any = self.policy
        if policy.budget is None or self.budget.unit != "%":
            return policy.channels
        return max(policy.channels, 2 * self.budget.amount / 100 - 1)

    def keeps_channels(self) -> bool:
        """Whether the prompt fits into the budget with all key channels."""
        if self.in_bytes:
            return self.costs(0).fits(self.policy, self.tokens)
        return self.mean(0) >= self.tokens

    def pruning_bytes(self, lost: int) -> int:
        """Bytes of one pruning's channels and end, in one layer."""
        return self.rows * (self.plan.geometry["head_dim"] - lost) * CHANNEL + PRUNED_UNTIL

    # -- tokens

    def costs(self, lost: int) -> EvictionCosts:
        """The costs of a budget of bytes, as `EvictingLayer` has them."""
        entries = tuple(
            max(layer.stored + self.beside - lost * self.itemsize, self.pooled(layer))
            for layer in self.layers
        )
        n, block = len(self.layers), max(self.layers[0].blocks)
        stored = sum(layer.stored for layer in self.layers)
        costs = EvictionCosts(
            heads=self.rows * n,
            sequences=1,
            entry_bytes=entries,
            fixed_bytes=n * self.index_bytes() + self.rows * (block - 1) * stored,
            protected=protected_tokens(self.policy, self.exact),
            exact=self.exact,
            exact_extra_bytes=self.layers[0].exact + self.score - sum(entries) / n,
            slot_bytes=self.layers[0].exact,
            copy_bytes=stored / n,
            rows_of_heads=rows_of_heads(self.plan),
        )
        if self.rest is not None:
            others = [layer.stored for layer in self.rest]
            block = max(self.rest[0].blocks)
            return replace(
                costs,
                entry_bytes=tuple(
                    max(LEAST_INCREMENT, entry - rest - POSITION)
                    for entry, rest in zip(entries, others, strict=True)
                ),
                fixed_bytes=costs.fixed_bytes + self.rows * (block - 1) * sum(others),
                rest_bytes=sum(others) / n + POSITION,
            )
        if not lost:
            return costs
        return replace(
            costs,
            fixed_bytes=costs.fixed_bytes + n * self.pruning_bytes(lost),
            whole_recent=max(self.policy.recent, self.exact.recent),
            exact_extra_bytes=lost * self.itemsize,
        )

    def mean(self, lost: int) -> float:
        """The budget in tokens per head, on average over heads. All tokens count as the prompt's."""
        if self.policy.protect_prompt:
            return self.tokens
        if self.in_bytes:
            return self.costs(lost).tokens_per_head(self.policy, self.tokens)
        if self.budget.unit == "tokens":
            return self.budget.amount
        # a percentage is one of bytes where tokens lose channels of their keys
        share = self.channel_share() if lost else 1.0
        return self.budget.amount / 100 * self.tokens * 2 / (1 + share)

    def kept_bytes(self, lost: int) -> float:
        """Bytes of exact tokens and of those in rows.

        Args:
            lost: channels that pruned keys lack.
        """
        n, window = self.tokens, min(self.tokens, self.exact.recent)
        protected = min(n, sum(protected_tokens(self.policy, self.exact)))
        known = KnownBefore(
            self.mean(lost), n, protected, len(self.layers), self.rows, rows_of_heads(self.plan)
        )
        # what a row keeps of these lies elsewhere: in the window, or in the slots of sinks
        elsewhere = window + min(self.exact.sinks, n - window)
        whole = min(n, max(self.policy.recent, self.exact.recent))
        never_pruned = whole + min(self.exact.sinks, n - whole)
        total, pruned = 0.0, 0
        if self.rest is not None:  # the positions of all that is not kept
            total += len(self.layers) * self.rows * (n - elsewhere) * POSITION
        for layer, (entries, stored) in zip(self.layers, self.entries(known, elsewhere), strict=True):
            total += stored + entries * (self.beside - (POSITION if self.rest is not None else 0))
            total += self.rows * ((self.exact.sinks + window) * layer.exact + window * self.score)
            pruned += entries - self.rows * (never_pruned - elsewhere)
        return total - pruned * lost * self.itemsize

    def entries(self, known: KnownBefore, elsewhere: int) -> list[tuple[int, float]]:
        """For each layer, the kept tokens in all its rows together, and the most bytes that all tokens of its
        rows are stored in.

        Args:
            known: the budget in tokens.
            elsewhere: tokens that every row keeps and that lie elsewhere.
        """
        allocator, rows, most = self.policy.resolved_allocator(), self.rows, self.tokens - elsewhere
        try:
            allocator = allocator.with_head_scores(self.plan.heads)
            counts = allocator.planned(known)
        except LowkeyError:
            counts = None  # it lacks head scores, and could split the budget in any way
        if counts is not None and allocator.scores_decide == "nothing":
            if self.policy.pools_chunks:
                return [
                    self.with_chunks(*pair, elsewhere)
                    for pair in zip(self.layers, counts.tolist(), strict=True)
                ]
            lengths = [[n - elsewhere for n in of_layer] for of_layer in counts.tolist()]
            found = [
                (sum(of_layer), sum(map(layer.row, of_layer)))
                for layer, of_layer in zip(self.layers, lengths, strict=True)
            ]
            if self.rest is None:
                return found
            others = [
                sum(layer.row(most - n) for n in of_layer)
                for layer, of_layer in zip(self.rest, lengths, strict=True)
            ]
            return [(n, size + more) for (n, size), more in zip(found, others, strict=True)]
        if counts is not None:
            sums = [int(n) - rows * elsewhere for n in counts.sum(1)]
            return [
                (n, min(self.most(layer, n), rows * layer.row(most)) + self.most_of_rest(i, rows * most - n))
                for i, (layer, n) in enumerate(zip(self.layers, sums, strict=True))
            ]
        alike = len({layer.stored for layer in self.layers}) == 1
        everything = [(rows * most, rows * layer.row(most)) for layer in self.layers]
        if not allocator.bounded or (self.in_bytes and not alike):
            return everything
        # the dearest layers keep all that the others can spare
        least = rows * (known.protected - elsewhere)
        sums = [least] * len(self.layers)
        whole = known.share(0, known.layers) - rows * known.layers * elsewhere
        left = min(whole, rows * most * known.layers) - sum(sums)
        for i in sorted(range(len(sums)), key=lambda i: -self.layers[i].stored):
            sums[i] += max(0, min(left, rows * most - least))
            left -= sums[i] - least
        return [
            (n, self.most(layer, n) + self.most_of_rest(i, rows * most - n))
            for i, (layer, n) in enumerate(zip(self.layers, sums, strict=True))
        ]

    def with_chunks(self, layer: _Layer, counts: list[int], elsewhere: int) -> tuple[int, float]:
        """As `entries` for one layer whose older tokens became rows of chunks.

        Args:
            layer: the layer.
            counts: what each of its rows keeps.
            elsewhere: as in `entries`.
        """
        policy: Any = self.policy
        protected = protected_tokens(policy, self.exact)
        kept = [policy.kept_of_prompt(self.tokens, n, *protected) for n in counts]
        tokens = [n - elsewhere for n, _ in kept]
        return sum(tokens), sum(map(layer.row, tokens)) + sum(n for _, n in kept) * self.pooled(layer)

    def most(self, layer: _Layer, entries: int) -> float:
        """The most bytes that so many tokens in the rows of a layer are stored in."""
        dearest = max(layer.stored, self.pooled(layer) - self.beside)
        return entries * dearest + self.rows * layer.filled

    def most_of_rest(self, layer: int, tokens: int) -> float:
        """The most bytes that so many tokens which are not kept are stored in, in the rows of a layer."""
        return 0.0 if self.rest is None or not tokens else self.most(self.rest[layer], tokens)
