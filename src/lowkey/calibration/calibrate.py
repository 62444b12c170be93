"""`calibrate`: text in, Plan out. One pass for statistics, then layer by layer: fit, profile; then allocate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import RankAllocator
from lowkey.allocation.profile import Pair, Profile, Ranks
from lowkey.allocation.rank_grid import RankRequest
from lowkey.calibration.layer_checkpoint import Surface, load_layer, save_layer
from lowkey.calibration.request import (
    BUDGET_LENGTH,
    JUDGES,
    CalibrationRequest,
    resolve_budget,
    resolve_request,
)
from lowkey.calibration.sensitivity import SIGNALS
from lowkey.calibration.statistics import gather_statistics
from lowkey.core import files, text
from lowkey.core.head_groups import per_head_maps
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Basis, Budget, Factors, LayerBases, Layout
from lowkey.methods import METHODS, CalibrationContext, Method
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.plan import Plan, versions
from lowkey.policies.allocators import HeadImportance
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe
from lowkey.probes.model_probe import loss_increases
from lowkey.storage.exact import DEFAULT_WINDOW, Exact

HELD_OUT_SHARE = (
    0.25  # share of the calibration windows that only judge: the error surface and early stopping
)
Measuring = Literal["pairs", "sides", "none"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sample(Checked):
    """What to calibrate on: at most `windows` windows of `length` tokens, drawn with `seed`."""

    windows: int = option(32, at_least=4, at_most=2**20)
    length: int = option(512, at_least=8, at_most=2**24)
    seed: int = option(0, at_least=0)
    batch: int = option(4, at_least=1, at_most=4096)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    method: Method | None = None,
    budget: str | Budget | None = None,
    error_budget: float | None = None,
    allocator: str | RankAllocator | None = None,
    layout: Layout | None = None,
    sample: Sample = Sample(),
    ranks: RankRequest | None = None,
    rank_multiple: int = 1,
    judge: str = "layers",
    sinks: int = DEFAULT_WINDOW.sinks,
    recent: int = DEFAULT_WINDOW.recent,
    bits: int | str | None = None,
    at: int = BUDGET_LENGTH,
    heads: HeadImportance | None = None,
    pairs: bool = False,
    work: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fit `method` on `texts` (the embedded text when None) and choose ranks. allocator, layout: the method's
    own when None.

    method: None for what does best on a real model at the budget: `recommended` says what that is.
    budget: bytes of the layers that are compressed (sliding ones are not), in the model's dtype, as a share
    of the full cache's or per token; `50%` when neither budget is given. A cache of `at` tokens or more never
    exceeds it, with its exact tokens: the first `sinks` of a row, which are held whole besides, and the last
    `recent`, which are held whole instead. (Where 32 tokens are packed together, up to 31 more wait whole in
    a cache of more than `at` tokens.)
    bits: the packing of latents, as `make_cache` takes it; None: the model's own numbers, or with no method
    what is recommended; `none`: the model's own numbers.
    error_budget: instead, the largest value of what the allocator's `bounds` names, for most the largest
    error of a layer, measured on held-out windows with that layer alone compressed; `plan.profile["bounded"]`
    says what was reached.
    judge: a layer's error is that of its output (`layers`, relative) or the nats by which the cross-entropy
    grows (`loss`, arXiv:2601.19611, section 5.2: many times slower).
    ranks: candidates, as `rank_grid.grid` takes them: a count, ranks, shares of the head dim, or `all`. When
    None, errors are measured at the method's own grid, and a byte budget is met with any rank that the method
    serves, unless the allocator compares measured pairs.
    rank_multiple: every rank per KV head is a multiple of it, or the head dim. heads: importance of KV heads
    by kind, for policies on top.
    pairs: measure errors at all pairs of candidate ranks. Else they are measured for keys and values apart
    where a byte budget is split by them, and not at all where it is split by something else.
    work: a folder to resume from and save progress into.
    Errors: LowkeyError for an unsupported model, too short a text, or a budget out of reach.
    """
    limit, window = resolve_budget(budget, error_budget, judge), Exact(sinks, recent)
    asked = resolve_request(
        model, limit, judge, window, at, bits, method, allocator, layout, ranks, rank_multiple
    )
    rows = calibration_windows(attach(model), tokenizer, texts, sample)
    known = provenance_of(model, rows, sample)
    surface: Measuring = (
        "pairs"
        if pairs or asked.room is None
        else "sides"
        if asked.allocator.uses_measured_errors
        else "none"
    )
    context = _course(asked, model, rows, sample, surface, known, work, progress)
    bases, profile = fit_layers(asked.method, context, context.work, judge, surface)
    factors, told = _chosen(asked, bases, profile, context)
    return _plan(asked, factors, told, known, asdict(families.geometry(model)), heads or {})


def _course(
    asked: CalibrationRequest,
    model: PreTrainedModel,
    rows: Tensor,
    sample: Sample,
    surface: Measuring,
    known: dict,
    work: Path | None,
    progress: Progress,
) -> CalibrationContext:
    """What the method works on, with a folder of its own for unfinished work."""
    seen = asked.holding.exact.for_length(rows.shape[1])
    what: dict = {
        "method": name_and_parameters(asked.method),
        "layout": asked.layout,
        "ranks": [asked.measured, asked.choices],
        "judge": asked.judge,
    }
    what |= {"batch": sample.batch, "exact": [seen.sinks, seen.recent], "surface": surface}
    folder, held = (
        files.job_folder(work, {"provenance": known, **what}),
        max(1, round(HELD_OUT_SHARE * len(rows))),
    )
    return CalibrationContext(
        model,
        rows,
        held,
        asked.layout,
        asked.measured,
        sample.seed,
        sample.batch,
        progress,
        asked.choices,
        seen,
        folder,
    )


def _plan(
    asked: CalibrationRequest,
    factors: dict[int, Factors],
    told: dict,
    known: dict,
    geometry: dict,
    heads: HeadImportance,
) -> Plan:
    limit, window = asked.limit, asked.holding.exact
    return Plan(
        factors=factors,
        layout=asked.layout,
        method=name_and_parameters(asked.method),
        allocator=name_and_parameters(asked.allocator),
        budget=str(limit)
        if isinstance(limit, Budget)
        else f"error {limit:g}" + (" nats" if asked.judge == "loss" else ""),
        bits=asked.bits,
        geometry=geometry,
        provenance=known,
        profile=told | {"at": asked.holding.tokens},
        orthonormal=all(_transposed(f) for f in factors.values()),
        sinks=window.sinks,
        recent=window.recent,
        heads={kind: [list(row) for row in rows] for kind, rows in heads.items()},
    )


def _chosen(
    asked: CalibrationRequest, bases: dict[int, LayerBases], profile: Profile, context: CalibrationContext
) -> tuple[dict[int, Factors], dict]:
    """Factors at the ranks that the allocator chose, and what the plan says of the choice."""
    method, split, limit = asked.method, asked.allocator, asked.limit
    shape, first = families.geometry(context.model), next(iter(bases.values()))
    merge = first.keys.merge, first.values.merge
    sizes = asked.holding.sizes(
        merge, lambda rank: method.numbers_per_token(rank, shape.kv_heads, shape.head_dim)
    )
    signals = {
        name: SIGNALS[name](context.model, context.training_windows, context.batch)
        for name in split.required_signals
    }
    profile = replace(profile, bytes_by_rank=sizes, signals=signals)
    profile = _measured(profile, split.extra_pairs(profile), bases, context, asked.judge)
    if asked.room is None:
        ranks = split.under_error(profile, limit)  # type: ignore[arg-type]
    else:
        ranks = split.under_bytes(profile, asked.room)
    factors = {i: found.at(*pair) for (i, found), pair in zip(bases.items(), ranks, strict=True)}
    told = _described(profile, ranks, bases)
    if not isinstance(limit, Budget):
        when = " (before the method's last stage)" if method.has_finish else ""
        error, reached = JUDGES[asked.judge], split.bounded_value(profile, ranks)
        told["bounded"] = {"what": split.bounds + when, "error": error, "budget": limit, "reached": reached}
    return method.finish(factors, context) if method.has_finish else factors, told


def _measured(
    profile: Profile,
    wanted: list[list[Pair]],
    bases: dict[int, LayerBases],
    context: CalibrationContext,
    judge: str,
) -> Profile:
    """With the errors at the wanted pairs that are not on the surface."""
    pairs = {
        i: sorted({pair for pair in layer if not profile.is_measured(place, pair)})
        for place, (i, layer) in enumerate(zip(bases, wanted, strict=True))
    }
    if not any(pairs.values()):
        return profile
    found = _errors(bases, pairs, context, judge)
    return replace(profile, extra_points=[dict(zip(pairs[i], found[i], strict=True)) for i in bases])


def _transposed(f: Factors) -> bool:
    """Whether the up maps are the orthonormal down maps turned over, so that a plan need not hold them."""
    sides = (f.k_down, f.k_up), (f.v_down, f.v_up)
    return all(
        torch.equal(per_head_maps(down.mT, t), up) and is_orthonormal(down)
        for (down, up), t in zip(sides, f.merge, strict=True)
    )


def fit_layers(
    method: Method,
    context: CalibrationContext,
    work: Path | None = None,
    judge: str = "layers",
    measuring: Measuring = "pairs",
) -> tuple[dict[int, LayerBases], Profile]:
    """Bases and error surface of every compressible layer. Only one layer's inputs are held at a time."""
    model, ranks, pairs = context.model, context.measured_ranks, _pairs(context.measured_ranks, measuring)
    # the surface can be had while a layer's inputs are at hand
    inside = judge == "layers" and not method.has_tune
    found: dict[int, tuple[LayerBases, Surface]] = {}
    if method.has_fit:
        batches = context.training_windows.split(context.batch)
        statistics = gather_statistics(
            model, context.progress(batches, "second moments"), work, context.exact.sinks
        )
        for i, probe in _probes(
            context, f"fitting {name_of(method)}", lambda i: load_layer(work, f"layer-{i}")
        ):
            if not isinstance(probe, LayerProbe):
                found[i] = probe
                continue
            fitted = method.fit(statistics[i], probe, context.selectable_ranks, context.seed)
            found[i] = (
                fitted,
                _surface(ranks, pairs, probe.errors_at(fitted, pairs), judge) if inside and pairs else [],
            )
            save_layer(work, f"layer-{i}", *found[i])
    bases = {i: fitted for i, (fitted, _) in found.items()}
    if method.has_tune:
        bases = _tuned(method, bases, context, work)
    surfaces = [found[i][1] if i in found else [] for i in bases]
    if pairs and not inside:
        errors = _errors(bases, dict.fromkeys(bases, pairs), context, judge)
        surfaces = [_surface(ranks, pairs, errors[i], judge) for i in bases]
    shape = families.geometry(model)
    spectra = [(_spectrum(b.keys), _spectrum(b.values)) for b in bases.values()]
    return bases, Profile(
        tuple(context.measured_ranks),
        surfaces,
        shape.kv_heads,
        model.dtype.itemsize,
        spectra,
        choices=context.choices,
    )


def _probes(
    context: CalibrationContext, text: str, known: Callable[[int], _T | None]
) -> Iterator[tuple[int, LayerProbe | _T]]:
    """(layer, its probe, or what is known of it already) for every compressible layer."""
    model, shape = context.model, families.geometry(context.model)
    for i, inputs in context.progress(
        layer_inputs(model, context.windows, context.batch), text, shape.layers
    ):
        if i in shape.compressible:
            yield (
                i,
                known(i)
                or LayerProbe.of(
                    model, i, context.layout, inputs, context.held_out, context.batch, context.exact
                ),
            )


def _tuned(
    method: Method, bases: dict[int, LayerBases], context: CalibrationContext, work: Path | None
) -> dict[int, LayerBases]:
    saved = {i: load_layer(work, f"tuned-{i}") for i in families.geometry(context.model).compressible}
    if all(saved.values()):
        return {i: found[0] for i, found in saved.items() if found}
    tuned = method.tune(bases, context)
    for i, found in tuned.items():
        save_layer(work, f"tuned-{i}", found, [])
    return tuned


def _pairs(ranks: list[int], measuring: Measuring) -> list[Pair]:
    """What is measured of a layer: all pairs of ranks, or keys and values with the other side in full, or
    nothing.
    """
    if measuring == "none":
        return []
    full = ranks[-1]
    return [(k, v) for k in ranks for v in ranks if measuring == "pairs" or full in (k, v)]


def _surface(ranks: list[int], pairs: list[Pair], errors: list[float], judge: str) -> Surface:
    """The error at every pair. What was not measured is put together from its two sides: errors of keys and
    values are nearly independent, so that their squares add up, and nats do so themselves."""
    known, full = dict(zip(pairs, errors, strict=True)), ranks[-1]

    def both(k: int, v: int) -> float:
        if (k, v) in known:
            return known[k, v]
        one, other = known[k, full], known[full, v]
        return one + other if judge == "loss" else math.hypot(one, other)

    return [[both(k, v) for v in ranks] for k in ranks]


def _errors(
    bases: dict[int, LayerBases], pairs: dict[int, list[Pair]], context: CalibrationContext, judge: str
) -> dict[int, list[float]]:
    """Of every layer alone, at its pairs."""
    if judge == "loss":
        held = context.held_out_windows
        return loss_increases(
            context.model, held, bases, pairs, context.layout, context.progress, context.exact
        )
    return {
        i: probe.errors_at(bases[i], pairs[i]) for i, probe in _probes(context, "measuring", lambda i: None)
    }


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None,
    sample: Sample,
) -> Tensor:
    """Ids (n, t) of the sample, no longer than the model reads. Errors: LowkeyError for too short a text."""
    length = families.readable_length(model, sample.length)
    ids = text.encode(tokenizer, text.joined_texts(texts), model)
    return text.sample_windows(ids, tokenizer, length, sample.windows, sample.seed, "calibration text")


def name_of(thing: object) -> str:
    """The short name of a method or allocator, or its class's path when it is not one of ours."""
    for table in (METHODS, RANK_ALLOCATORS):
        for name, kind in table.items():
            if type(thing) is kind:
                return name
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def name_and_parameters(thing: object) -> dict:
    return {"name": name_of(thing), "parameters": asdict(thing)}  # type: ignore[call-overload]


def provenance_of(model: PreTrainedModel, rows: Tensor, sample: Sample) -> dict:
    """What a plan says of the model and the windows it was made from."""
    return {
        "model": model.config._name_or_path,
        "model_sha256": model_fingerprint(model),
        "data_sha256": data_fingerprint(rows),
        "tokens": rows.numel(),
        "seed": sample.seed,
        "versions": versions(),
    }


def _described(profile: Profile, allocated: Ranks, bases: dict[int, LayerBases]) -> dict:
    chosen = [list(p) for p in allocated]
    surface = profile.surface if any(profile.surface) else None
    return {
        "ranks": list(profile.ranks),
        "surface": surface,
        "chosen": chosen,
        "spectra": _mean_spectra(bases),
    }


def _spectrum(basis: Basis) -> list[list[float]]:
    return [[]] if basis.spectrum is None else basis.spectrum.tolist()


def _mean_spectra(bases: dict[int, LayerBases]) -> dict:
    """Energy per rank and layer, averaged over heads, for plots."""

    def means(side: str) -> list[list[float]]:
        found = (getattr(b, side).spectrum for b in bases.values())
        return [s.mean(0).tolist() for s in found if s is not None]

    return {side: means(side) for side in ("keys", "values")}
