"""The arguments of `calibrate`, checked and completed by recommendations before anything is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import REQUIRED_ATTRIBUTES, RankAllocator
from lowkey.allocation.profile import Profile, budget_too_small
from lowkey.allocation.rank_grid import RankRequest, grid, multiples
from lowkey.calibration import sensitivity
from lowkey.calibration.limits import BUDGET_LENGTH, JUDGES
from lowkey.calibration.recommended import recommended
from lowkey.core.options import nearest_name
from lowkey.core.types import LAYOUTS, Budget, Layout, LowkeyError
from lowkey.methods import Method
from lowkey.models import families
from lowkey.plan.window_bytes import CacheBytes
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_name, scheme_or_none


@dataclass(frozen=True)
class CalibrationRequest:
    """A complete and valid request for a plan.

    Args:
        limit: the budget in bytes, or the error budget.
        judge: what the error of a layer is, a key of JUDGES.
        method: the low-rank method.
        allocator: what chooses the ranks.
        layout: whether keys are stored before or after their rotation.
        bits: name of the packing of latents; None for the model's own numbers.
        budgeted_cache: the cache that a byte budget is counted for.
        latent_bytes: bytes of one stored token that the budget leaves to latents, in all layers together;
            None under an error budget.
        measured_ranks: the ranks at which errors are measured, in ascending order.
        choices: every rank that may be chosen, in ascending order.
    """

    limit: Budget | float
    judge: str
    method: Method
    allocator: RankAllocator
    layout: Layout
    bits: str | None
    budgeted_cache: CacheBytes
    latent_bytes: float | None
    measured_ranks: list[int]
    choices: tuple[int, ...]


def resolve_request(
    model: PreTrainedModel,
    limit: Budget | float,
    judge: str,
    window: Exact,
    at: int,
    bits: int | str | None,
    method: Method | None,
    allocator: str | RankAllocator | None,
    layout: Layout | None,
    ranks: RankRequest | None,
    multiple: int,
) -> CalibrationRequest:
    """Check a request, and fill in what is left to recommendations and to the method's own defaults.

    Args:
        model: the model to calibrate.
        limit: the budget in bytes, or the error budget.
        window: the tokens that are stored exactly.
        judge: as `calibrate` takes it.
        at: as `calibrate` takes it.
        bits: as `calibrate` takes it.
        method: as `calibrate` takes it.
        allocator: as `calibrate` takes it.
        layout: as `calibrate` takes it.
        ranks: as `calibrate` takes it.
        multiple: every rank per KV head is a multiple of it, or the head dim.

    Raises:
        LowkeyError: for anything that is out of range, unknown or impossible with this model.
    """
    if at < 1:
        raise LowkeyError(
            f"at {at}: a budget is counted for a cache of at least 1 token; give the length that matters, "
            f"like {BUDGET_LENGTH}"
        )
    shape, itemsize, longest = families.geometry(model), model.dtype.itemsize, families.max_positions(model)
    # No cache is longer than the model's positions.
    at = at if longest is None else min(at, longest)
    if method is None:
        full = shape.full_bytes_per_token(itemsize)
        best = recommended(model, limit.share(full, at) if isinstance(limit, Budget) else None)
        method, layout, allocator = best.method, layout or best.layout, allocator or best.allocator
        bits = best.bits if bits is None else bits
    layout, rule = layout or method.layout, _allocator(allocator or method.allocator)
    _check(model, layout, judge, rule)
    measured, choices = _ranks(method, shape, ranks, multiple)
    packing = scheme_or_none(bits)
    cache = CacheBytes(len(shape.compressible), shape.kv_heads, shape.head_dim, itemsize, window, packing, at)
    latent_bytes = cache.latent_bytes(limit) if isinstance(limit, Budget) else None
    # The bytes of packed latents depend on how heads are merged, which only a fit tells.
    if latent_bytes is not None and packing is None:
        smallest = (measured if rule.uses_measured_errors else choices)[0]
        _check_smallest(cache, latent_bytes, method, shape, smallest, ranks, multiple)
    name = None if bits is None or packing is None else scheme_name(bits)
    return CalibrationRequest(
        limit, judge, method, rule, layout, name, cache, latent_bytes, measured, choices
    )


def _check(model: PreTrainedModel, layout: Layout, judge: str, allocator: RankAllocator) -> None:
    """Raise LowkeyError if the model is training, or a name is unknown or impossible with this model."""
    if model.training:
        raise LowkeyError(
            "model: is in training mode, where dropout would be measured too; call model.eval() first"
        )
    if layout not in list(LAYOUTS):
        raise LowkeyError(f"layout {layout!r} is unknown; {nearest_name(layout, LAYOUTS)}")
    families.check_layout(model, layout)
    if judge not in JUDGES:
        raise LowkeyError(f"judge {judge!r} is unknown; {nearest_name(judge, JUDGES)}")
    sensitivity.check_signals(model, allocator.required_signals)


def _ranks(
    method: Method, shape: families.Geometry, request: RankRequest | None, multiple: int
) -> tuple[list[int], tuple[int, ...]]:
    """Return the ranks at which errors are measured, and every rank that may be chosen."""
    served = method.candidates(shape.kv_heads, shape.head_dim, multiples(shape.head_dim, multiple))
    measured = grid(method.grid if request is None else request, served)
    return measured, tuple(served if request is None and method.serves_any_rank else measured)


def _check_smallest(
    cache: CacheBytes,
    latent_bytes: float,
    method: Method,
    shape: families.Geometry,
    smallest: int,
    request: RankRequest | None,
    multiple: int,
) -> None:
    """Raise LowkeyError if the smallest rank everywhere takes more than `latent_bytes`."""
    heads, d = shape.kv_heads, shape.head_dim
    bytes_by_rank = cache.bytes_by_rank((heads, heads), lambda rank: method.numbers_per_token(rank, heads, d))
    profile = Profile(
        (smallest, d),
        [[]] * cache.layers,
        heads,
        cache.itemsize,
        [],
        bytes_by_rank=bytes_by_rank,
        cache_share=cache.cache_share,
    )
    needed = profile.bytes_per_token([(smallest, smallest)] * cache.layers)
    if latent_bytes >= needed:
        return
    # A remedy is named only if it would help.
    served, served_without_multiple = (method.candidates(heads, d, multiples(d, m))[0] for m in (multiple, 1))
    otherwise = ""
    if served < smallest:
        otherwise = f", or give smaller --ranks, down to {served}"
    elif served_without_multiple < smallest:
        otherwise = ", or lower --rank-multiple"
    raise budget_too_small(profile, latent_bytes, needed, otherwise)


def _allocator(allocator: str | RankAllocator) -> RankAllocator:
    """Return an allocator by its name, or the given one if it has everything that an allocator needs."""
    if not isinstance(allocator, str):
        if missing := [part for part in REQUIRED_ATTRIBUTES if not hasattr(allocator, part)]:
            raise LowkeyError(
                f"allocator {type(allocator).__name__}: lacks {', '.join(missing)}; derive it from "
                "lowkey.allocation.base.RankAllocator"
            )
        return allocator
    if allocator not in RANK_ALLOCATORS:
        raise LowkeyError(f"allocator {allocator!r} is unknown; {nearest_name(allocator, RANK_ALLOCATORS)}")
    return RANK_ALLOCATORS[allocator]()
