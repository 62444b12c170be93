"""How each layer of a plan lies in the pages of an engine, and what a token takes there.

A *page* holds one layer's keys and values of a block of tokens. There are two ways to hold a plan's latents:

- *projected*: the engine's own attention kernel runs over latents as if they were heads. That needs keys
  that are stored rotated, and keys and values of one width that the kernel knows; narrower ones are padded.
- *latent*: a token's latents lie side by side, at any widths and in any packing of single tokens, and our own
  attention reads them.

Each layer takes the way whose page is smaller; on a tie, the engine's own kernel. A plan that keeps some
tokens exact, or packs blocks of tokens, takes a third way in all layers:

- *windowed*: latents lie as on the latent way, and pages of a second kind hold exact tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowkey.core.types import Factors
from lowkey.plan.plan import Plan
from lowkey.storage.packing import Scheme, Unpacked, scheme_or_none

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of vLLM's kernel for CPUs
GPU_HEAD_SIZES = tuple(range(32, 257, 8))  # of its kernels for GPUs


@dataclass(frozen=True)
class Route:
    """How one layer is stored.

    Args:
        name: `projected`, `latent` or `windowed`; `full` for keys and values as the model makes them.
        token_bytes: bytes of one token of this layer in a page, exact tokens left aside; a fraction where a
            block of tokens shares scales.
        heads: KV heads that the engine's kernel sees.
        width: of each of them; of keys and values alike.
    """

    name: Literal["full", "projected", "latent", "windowed"]
    token_bytes: float
    heads: int
    width: int


def projected_shape(factors: Factors, kv_heads: int, sizes: Sequence[int]) -> tuple[int, int] | None:
    """The smallest shape in which a kernel of such head sizes can hold a layer's latents.

    Several latents may lie side by side in one head of the kernel; queries are zero where the others lie.

    Args:
        factors: of the layer.
        kv_heads: of the model.
        sizes: head sizes that the kernel knows, ascending.

    Returns:
        (KV heads, width of each), of equally small shapes the one with most heads, which takes the fewest
        products; None if no head is wide enough.
    """
    found: list[tuple[int, int]] = []
    counts = [kv_heads // merge for merge in factors.merge]
    widths = factors.k_down.shape[-1], factors.v_down.shape[-1]
    for heads in range(math.gcd(*counts), 0, -1):
        if all(count % heads == 0 for count in counts):
            needed = max(count // heads * width for count, width in zip(counts, widths, strict=True))
            found += [(heads, size) for size in sizes if size >= needed][:1]
    return min(found, key=lambda shape: shape[0] * shape[1], default=None)


def unit_of(plan: Plan) -> int:
    """How many tokens of a plan are packed together."""
    packed = scheme_or_none(plan.bits)
    return 1 if packed is None else max(packed.keys.block, packed.values.block)


def latent_bytes(plan: Plan, packed: Scheme | None, itemsize: int) -> list[float]:
    """For each compressed layer, the bytes of one token's stored keys and values.

    Args:
        plan: the plan.
        packed: how latents are packed; None for the model's dtype.
        itemsize: bytes of a number in the model's dtype.
    """
    heads, unit = plan.geometry["kv_heads"], unit_of(plan)
    packings = (packed.keys, packed.values) if packed else (Unpacked(), Unpacked())
    found: list[float] = []
    for shapes in plan.stored_shapes():
        taken = sum(
            heads // merge * packing.nbytes(unit, width, itemsize)
            for (merge, width), packing in zip(shapes, packings, strict=True)
        )
        found.append(taken / unit if taken % unit else taken // unit)
    return found


@dataclass(frozen=True)
class ExactShape:
    """The pages of exact tokens.

    Args:
        tokens: of a page.
        window: newest tokens that are kept; a block of tokens stays until all of it may be packed.
        blocks: that each sequence holds for them, in all layers together.
        block_bytes: of a block, which holds latents of all layers or exact tokens of some.
    """

    tokens: int
    window: int
    blocks: int
    block_bytes: float


def exact_shape(plan: Plan, kv_bytes: int, layers: int, block: int, block_bytes: float) -> ExactShape | None:
    """How the exact tokens of a plan lie in blocks of the size that latents have.

    The engine cuts the layers into groups such that the pages of each fit into one block. The size of a page
    is the one at which a sequence takes the fewest blocks.

    Args:
        plan: the plan.
        kv_bytes: of one token's exact keys and values in a layer.
        layers: how many store exact tokens.
        block: tokens of a page of latents.
        block_bytes: of the pages of latents of all layers.

    Returns:
        The shape; None for a plan that needs no exact tokens.
    """
    unit = unit_of(plan)
    if not (plan.sinks or plan.recent or unit > 1):
        return None
    window = max(plan.recent + unit - 1, unit)
    found: list[ExactShape] = []
    for tokens in (8, 16, 32, 64, 128):
        page = tokens * kv_bytes
        if block % tokens == 0 and (page <= block_bytes or not found):
            groups = math.ceil(layers / max(1, block_bytes // page))
            each = math.ceil((window - 1) / tokens) + 1 + math.ceil(plan.sinks / tokens)
            found.append(ExactShape(tokens, window, groups * each, max(block_bytes, page)))
    return min(found, key=lambda shape: (shape.blocks, -shape.tokens))


def routes(
    plan: Plan | None,
    layers: Sequence[int],
    shape: tuple[int, int],
    itemsize: int,
    sizes: Sequence[int],
    own_kernel: bool = False,
) -> dict[int, Route]:
    """How every layer is stored.

    Args:
        plan: the plan; None for full keys and values.
        layers: indices of the layers that a plan covers.
        shape: (KV heads of the model, width of a head).
        itemsize: bytes of a number in the model's dtype.
        sizes: head sizes that the engine's kernel knows, ascending.
        own_kernel: whether all layers take our own attention.
    """
    kv_heads, head_dim = shape
    full = Route("full", 2 * kv_heads * head_dim * itemsize, kv_heads, head_dim)
    if plan is None:
        return dict.fromkeys(layers, full)
    packed = scheme_or_none(plan.bits)
    windowed = bool(plan.sinks or plan.recent or unit_of(plan) > 1)
    found: dict[int, Route] = {}
    for i, taken in zip(layers, latent_bytes(plan, packed, itemsize), strict=True):
        found[i] = Route("windowed" if windowed else "latent", taken, 1, 0)
        factors = plan.factors.get(i)
        if own_kernel or windowed or packed or factors is None or factors.frequencies is not None:
            continue
        fitting = projected_shape(factors, kv_heads, sizes) if plan.layout == "post_rope" else None
        if fitting is not None and (padded := 2 * math.prod(fitting) * itemsize) <= taken:
            found[i] = Route("projected", padded, *fitting)
    return _uneven(found) if windowed else found


def _uneven(found: dict[int, Route]) -> dict[int, Route]:
    """Make the bytes of pages such that the engine packs the pages of all layers side by side.

    Where every size of page occurs as often as every other, and there are several, it takes them for a
    pattern that repeats, and gives every few layers blocks of their own. One page that is a little larger
    breaks the pattern.
    """
    counts = Counter(route.token_bytes for route in found.values())
    if len(counts) > 1 and len(set(counts.values())) == 1:
        smallest, larger, *_ = sorted(counts)
        layer = next(i for i, route in found.items() if route.token_bytes == smallest)
        found[layer] = replace(found[layer], token_bytes=larger)
    return found


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory for pages.

    Args:
        tokens: of all users together.
        users: who have a given number of tokens each.
    """

    tokens: int
    users: int


def capacity(
    memory: float, token_bytes: float, block: int, context: int, exact: ExactShape | None = None
) -> Capacity:
    """Count what fits.

    Args:
        memory: bytes for pages.
        token_bytes: of one token in all layers together.
        block: tokens of a page; a user's last one may be partly empty.
        context: tokens of a user.
        exact: the pages of exact tokens; None for none.

    Returns:
        The tokens as if one user had them all, and the users.
    """
    blocks = int(memory // (exact.block_bytes if exact else token_bytes * block))
    beside = exact.blocks if exact else 0
    # the engine keeps one block for itself
    users = max(0, blocks - 1) // (-(-context // block) + beside)
    return Capacity(max(0, blocks - beside) * block, users)
