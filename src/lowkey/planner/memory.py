"""What the caches of several sequences may take in a given memory, beside the weights of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from transformers import PreTrainedModel

from lowkey.allocation.rank_grid import multiples
from lowkey.calibration.recommended import recommended
from lowkey.core.budget import UNITS
from lowkey.core.types import Budget, LowkeyError
from lowkey.models import families
from lowkey.plan.held_bytes import held_bytes
from lowkey.plan.plan import Plan
from lowkey.plan.window_bytes import CacheBytes
from lowkey.planner.candidates import Composer, policy_keeping
from lowkey.storage.exact import DEFAULT_WINDOW
from lowkey.storage.packing import NO_BITS, SCHEMES, scheme_or_none
from lowkey.storage.rollback import storage_bytes


def weights_bytes(model: PreTrainedModel) -> int:
    """The bytes of a model's parameters and buffers. Tensors that share a storage count once."""
    tensors = [*model.parameters(), *model.buffers()]
    # weights that accelerate keeps elsewhere have no storage here, so their shapes are counted
    elsewhere = [t for t in tensors if t.is_meta]
    return storage_bytes(t for t in tensors if not t.is_meta) + sum(t.nbytes for t in elsewhere)


def sliding_bytes(model: PreTrainedModel, context: int) -> int:
    """The bytes that the sliding layers of one sequence of `context` tokens take. They stay uncompressed."""
    itemsize = model.dtype.itemsize
    layers = families.sliding_layers(model)
    return sum(min(most, context) * numbers * itemsize for most, numbers in layers)


@dataclass(frozen=True)
class Memory:
    """What a model and the caches of several sequences take.

    Args:
        model: the model.
        weights: bytes of its weights.
        context: tokens of a sequence.
        sequences: number of sequences.
    """

    model: PreTrainedModel
    weights: int
    context: int
    sequences: int

    @classmethod
    def of(cls, model: PreTrainedModel, context: int, sequences: int) -> Memory:
        """The memory of a model and so many sequences of `context` tokens."""
        return cls(model, weights_bytes(model), context, sequences)

    @property
    def full(self) -> int:
        """Bytes of one sequence whose cache is not compressed."""
        rate = families.geometry(self.model).full_bytes_per_token(self.model.dtype.itemsize)
        return rate * self.context + sliding_bytes(self.model, self.context)

    def held(self, plan: Plan) -> int:
        """Bytes of one sequence under a plan, in all layers."""
        held = held_bytes(plan, self.context, self.model.dtype.itemsize)
        return held + sliding_bytes(self.model, self.context)

    def for_a_sequence(self, total: int, axes: Sequence[str], policy: str, bits: Sequence[str]) -> Budget:
        """The budget of one sequence, in the layers that can be compressed.

        Args:
            total: bytes that weights and caches may take together.
            axes: as `plan_for` takes them.
            policy: as `plan_for` takes it.
            bits: packings that latents are tried in.

        Raises:
            LowkeyError: if the least cache does not fit. The message says what would: more memory, fewer
                sequences, or a shorter context.
        """
        said, left = f"memory {in_words(total)}", total - self.weights
        if left <= 0:
            raise LowkeyError(
                f"{said}: the weights of the model alone take {in_words(self.weights, up=True)}; give more "
                "memory, or a smaller --dtype"
            )

        def least(context: int) -> int:
            compressed = least_bytes(self.model, context, axes, policy, bits)
            return compressed + sliding_bytes(self.model, context)

        needed, each = least(self.context), left // self.sequences
        if needed <= each:
            return Budget(each - sliding_bytes(self.model, self.context), "bytes")
        remedies = [f"at least {in_words(self.weights + self.sequences * needed, up=True)}"]
        if fitting := left // needed:
            remedies.append(f"{fitting} sequence{'s' if fitting > 1 else ''}")
        if shorter := _longest(lambda context: least(context) <= each, self.context):
            remedies.append(f"a context of {shorter}")
        raise LowkeyError(
            f"{said}: beside {in_words(self.weights)} of weights it does not hold {self.sequences} x "
            f"{self.context} tokens, which take at least {in_words(needed, up=True)} each on the axes "
            f"{', '.join(axes)}; give {', or '.join(remedies)}"
        )


def _longest(fits: Callable[[int], bool], context: int) -> int:
    """The longest context below `context` that fits; 0 if none does."""
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least_bytes(
    model: PreTrainedModel, tokens: int, axes: Sequence[str], policy: str, bits: Sequence[str]
) -> int:
    """The least that one sequence can be compressed to, in the layers that can be compressed.

    That is the smallest of the choices on a single axis, and of the smallest rank in every packing of `bits`.

    Args:
        model: the model.
        tokens: length of the sequence.
        axes: which of rank, bits and tokens may be made smaller.
        policy: name of the policy that chooses tokens.
        bits: packings that latents are tried in, if bits may be made smaller.
    """
    composer = Composer(model, _no_fit, policy_keeping(policy), tokens)
    found = [composer.full_bytes]
    if "tokens" in axes:
        made = policy_keeping(policy)(0.5)
        share = min(1.0, (made.sinks + made.recent) / tokens)
        found.append(composer.held(composer.without_ranks(NO_BITS, share)))
    if "bits" in axes:
        found += [composer.held(composer.without_ranks(name, 1.0)) for name in SCHEMES]
    if "rank" in axes:
        found += [_least_rank(composer, name) for name in (bits if "bits" in axes else (NO_BITS,))]
    return min(found)


def _least_rank(composer: Composer, bits: str) -> int:
    """The bytes of the smallest rank in a packing, with all tokens kept."""
    shape = families.geometry(composer.model)
    h, d = shape.kv_heads, shape.head_dim
    method = recommended(composer.model, 0.1).method  # the same method at every share
    smallest = method.candidates(h, d, multiples(d, 1))[0]
    cache = CacheBytes(
        len(shape.compressible),
        h,
        d,
        composer.itemsize,
        DEFAULT_WINDOW,
        scheme_or_none(bits),
        composer.tokens,
    )
    width = method.numbers_per_token(smallest, h, d)  # all KV heads of a layer share one latent
    latents = cache.latent_token_bytes(0, h, width) + cache.latent_token_bytes(1, h, width)
    return math.ceil(cache.bytes_beside_latents + cache.stored_tokens * cache.layers * latents)


def _no_fit(budget: Budget, bits: str, recent: int) -> NoReturn:
    raise AssertionError("the least bytes are counted without a fit")


def in_words(size: float, up: bool = False) -> str:
    """Bytes in the largest unit that they fill, like `1.5 GiB`, to two places.

    Args:
        size: bytes.
        up: whether to round up, so that the text names enough.
    """
    unit = next((u for u in ("GiB", "MiB", "KiB") if size >= UNITS[u]), "B")
    amount = 100 * size / UNITS[unit]
    return f"{(math.ceil if up else round)(amount) / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"
