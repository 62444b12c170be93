"""The arguments of `calibrate`, checked, and completed by what is recommended, before anything is read or
fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import REQUIRED_ATTRIBUTES, RankAllocator
from lowkey.allocation.profile import Profile, budget_too_small
from lowkey.allocation.rank_grid import RankRequest, grid, multiples
from lowkey.calibration import sensitivity
from lowkey.calibration.recommended import recommended
from lowkey.core.types import LAYOUTS, Budget, Layout, LowkeyError
from lowkey.methods import Method
from lowkey.models import families
from lowkey.plan.window_bytes import Holding
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_name, scheme_or_none

JUDGES = {  # what a layer's error is
    "layers": "the relative error of the layer's output, in the mean over tokens",
    "loss": "nats by which the cross-entropy grows when that layer alone is compressed",
}
BUDGET_LENGTH = 1024  # tokens of the cache that a budget is counted for


@dataclass(frozen=True)
class CalibrationRequest:
    """limit: bytes, or an error. holding: the cache that a byte budget is counted for; room: bytes per stored
    token that it leaves to latents, None under an error budget. bits: the name of their packing. measured:
    ranks to measure errors at; choices: all that may be chosen."""

    limit: Budget | float
    judge: str
    method: Method
    allocator: RankAllocator
    layout: Layout
    bits: str | None
    holding: Holding
    room: float | None
    measured: list[int]
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
    """As `calibrate` takes them. Errors: LowkeyError for what cannot be."""
    if at < 1:
        raise LowkeyError(
            f"at {at}: a budget is counted for a cache of at least 1 token; give the length that matters, "
            f"like {BUDGET_LENGTH}"
        )
    shape, itemsize, longest = families.geometry(model), model.dtype.itemsize, families.positions(model)
    at = at if longest is None else min(at, longest)
    if method is None:
        best = recommended(
            model,
            limit.share(shape.full_bytes_per_token(itemsize), at) if isinstance(limit, Budget) else None,
        )
        layout, allocator, bits = (
            layout or best.layout,
            allocator or best.allocator,
            best.bits if bits is None else bits,
        )
    chosen = best.method if method is None else method
    form, split = layout or chosen.layout, _allocator(allocator or chosen.allocator)
    _check(model, form, judge, split)
    measured, choices = _candidates(chosen, shape, ranks, multiple)
    packed = scheme_or_none(bits)
    holding = Holding(len(shape.compressible), shape.kv_heads, shape.head_dim, itemsize, window, packed, at)
    room = holding.latents(limit) if isinstance(limit, Budget) else None
    if room is not None and packed is None:
        least = (measured if split.uses_measured_errors else choices)[0]
        _check_room(
            holding, room, chosen, shape, least, lambda: _smaller(chosen, shape, least, ranks, multiple)
        )
    name = None if bits is None or packed is None else scheme_name(bits)
    return CalibrationRequest(limit, judge, chosen, split, form, name, holding, room, measured, choices)


def resolve_budget(budget: str | Budget | None, error: float | None, judge: str) -> Budget | float:
    """The budget that is given, 50% when none is."""
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


def _check(model: PreTrainedModel, layout: Layout, judge: str, split: RankAllocator) -> None:
    if model.training:
        raise LowkeyError(
            "model: is in training mode, where dropout would be measured too; call model.eval() first"
        )
    if layout not in LAYOUTS:
        raise LowkeyError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    families.check_layout(model, layout)
    if judge not in JUDGES:
        raise LowkeyError(f"judge {judge!r} is unknown; choose one of {', '.join(JUDGES)}")
    sensitivity.check_signals(model, split.required_signals)


def _candidates(
    method: Method, shape: families.Geometry, asked: RankRequest | None, multiple: int
) -> tuple[list[int], tuple[int, ...]]:
    """The ranks to measure errors at, and all that may be chosen."""
    served = method.candidates(shape.kv_heads, shape.head_dim, multiples(shape.head_dim, multiple))
    measured = grid(method.grid if asked is None else asked, served)
    return measured, tuple(served if asked is None and method.serves_any_rank else measured)


def _smaller(
    method: Method, shape: families.Geometry, least: int, asked: RankRequest | None, multiple: int
) -> str:
    """What else than a larger budget there is to say where the rank `least` is too large: nothing, where no
    smaller one is served.
    """
    served, any_multiple = (
        method.candidates(shape.kv_heads, shape.head_dim, multiples(shape.head_dim, m))[0]
        for m in (multiple, 1)
    )
    if served < least:
        return f", or give smaller --ranks, down to {served}"
    return ", or lower --rank-multiple" if any_multiple < least else ""


def _check_room(
    holding: Holding,
    room: float,
    method: Method,
    shape: families.Geometry,
    least: int,
    otherwise: Callable[[], str],
) -> None:
    """Before anything is fitted. Errors: LowkeyError when the rank `least` everywhere takes more than `room`
    bytes per token; otherwise: what else can be done."""
    heads, d = shape.kv_heads, shape.head_dim
    sizes = holding.sizes((heads, heads), lambda rank: method.numbers_per_token(rank, heads, d))
    empty = Profile(
        (least, d),
        [[]] * holding.layers,
        heads,
        holding.itemsize,
        [],
        bytes_by_rank=sizes,
        cache_share=holding.cache_share,
    )
    if room < (reached := empty.bytes_per_token([(least, least)] * holding.layers)):
        raise budget_too_small(empty, room, reached, otherwise())


def _allocator(chosen: str | RankAllocator) -> RankAllocator:
    if not isinstance(chosen, str):
        if missing := [part for part in REQUIRED_ATTRIBUTES if not hasattr(chosen, part)]:
            raise LowkeyError(
                f"allocator {type(chosen).__name__}: lacks {', '.join(missing)}; derive it from "
                "lowkey.allocation.base.RankAllocator"
            )
        return chosen
    if chosen not in RANK_ALLOCATORS:
        raise LowkeyError(f"allocator {chosen!r} is unknown; choose one of {', '.join(RANK_ALLOCATORS)}")
    return RANK_ALLOCATORS[chosen]()
