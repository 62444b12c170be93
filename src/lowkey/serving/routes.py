"""How each layer of a plan lies in the pages of an engine, and what a token takes there.

A *page* holds one layer's keys and values of a block of tokens. There are two ways to hold a plan's latents:

- *projected*: the engine's own attention kernel runs over latents as if they were heads. That needs keys
  that are stored rotated, and keys and values of one width that the kernel knows; narrower ones are padded.
- *latent*: a token's latents lie side by side, at any widths and in any packing, and our own attention reads
  them.

Each layer takes the way whose page is smaller; on a tie, the engine's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowkey.core.types import Factors
from lowkey.plan.plan import Plan
from lowkey.storage.packing import Scheme, scheme_or_none

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of vLLM's kernel for CPUs
GPU_HEAD_SIZES = tuple(range(32, 257, 8))  # of its kernels for GPUs


@dataclass(frozen=True)
class Route:
    """How one layer is stored.

    Args:
        name: `projected` or `latent`; `full` for keys and values as the model makes them.
        token_bytes: bytes of one token of this layer in a page.
        heads: KV heads that the engine's kernel sees.
        width: of each of them; of keys and values alike.
    """

    name: Literal["full", "projected", "latent"]
    token_bytes: int
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


def latent_bytes(plan: Plan, packed: Scheme | None, itemsize: int) -> list[tuple[int, int]]:
    """For each compressed layer, the bytes of one token's stored keys and of its stored values.

    Args:
        plan: the plan.
        packed: how latents are packed, one token at a time; None for the model's dtype.
        itemsize: bytes of a number in the model's dtype.
    """
    heads, found = plan.geometry["kv_heads"], []
    for shapes in plan.stored_shapes():
        key_bytes, value_bytes = (
            heads // merge * (width * itemsize if packing is None else packing.nbytes(1, width, itemsize))
            for (merge, width), packing in zip(
                shapes, (packed.keys, packed.values) if packed else (None, None), strict=True
            )
        )
        found.append((key_bytes, value_bytes))
    return found


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
    found: dict[int, Route] = {}
    for i, (key_bytes, value_bytes) in zip(layers, latent_bytes(plan, packed, itemsize), strict=True):
        found[i] = Route("latent", key_bytes + value_bytes, 1, 0)
        factors = plan.factors.get(i)
        if own_kernel or packed or factors is None or factors.frequencies is not None:
            continue
        fitting = projected_shape(factors, kv_heads, sizes) if plan.layout == "post_rope" else None
        if fitting is not None and (taken := 2 * math.prod(fitting) * itemsize) <= found[i].token_bytes:
            found[i] = Route("projected", taken, *fitting)
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


def capacity(memory: float, token_bytes: int, block: int, context: int) -> Capacity:
    """Count what fits.

    Args:
        memory: bytes for pages.
        token_bytes: of one token in all layers together.
        block: tokens of a page; a user's last one may be partly empty.
        context: tokens of a user.
    """
    blocks = int(memory // (token_bytes * block))
    # the engine keeps one block for itself
    return Capacity(blocks * block, max(0, blocks - 1) // -(-context // block))
