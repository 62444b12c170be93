"""`calibrate`, from a model and a text to a plan: gather statistics, fit, measure, allocate ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.allocation.base import RankAllocator
from lowkey.allocation.profile import Pair, Profile, Ranks
from lowkey.allocation.rank_grid import RankRequest
from lowkey.calibration.layer_checkpoint import Surface, load_layer, save_layer
from lowkey.calibration.limits import BUDGET_LENGTH, JUDGES, resolve_budget
from lowkey.calibration.request import CalibrationRequest, resolve_request
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
from lowkey.policies.sharing import HeadImportance
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe
from lowkey.probes.model_probe import loss_increases
from lowkey.storage.exact import DEFAULT_WINDOW, Exact

HELD_OUT_SHARE = 0.25  # of the calibration windows, which only judge: error surface and early stopping
# Where a layer's error is measured: at all pairs of ranks, or at keys and at values compressed alone, or
# nowhere.
Measuring = Literal["pairs", "sides", "none"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sample(Checked):
    """What part of the text to calibrate on.

    Args:
        windows: number of windows, at most (default 32).
        length: tokens per window (default 512).
        seed: of the choice of windows, and of everything random in the methods (default 0).
        batch: windows per forward pass (default 4).
    """

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
    """Fit a low-rank method on a text and choose ranks within a budget.

    Args:
        model: a model in eval mode; it becomes attached.
        tokenizer: the model's tokenizer.
        texts: what to calibrate on. None: the embedded text.
        method: the low-rank method. None: what does best on a real model at the budget
            (`calibration.recommended`).
        budget: bytes of the compressed layers (sliding ones are not), in the model's dtype: a share of the
            full cache's like `50%`, a rate like `64 KiB/token`, or a total like `1.5 GiB`. None, with no
            error budget: `50%`. A cache of one row of `at` tokens never exceeds it, exact tokens included.
            Nor does a longer one exceed a share or a rate, except for up to 31 tokens that wait unpacked if
            32 tokens are packed together. (At 100% the sinks come on top.)
        error_budget: instead of a budget, the largest value of what the allocator's `bounds` names. For most
            allocators it is the largest error of a layer, measured on held-out windows with that layer alone
            compressed. `plan.profile["bounded"]` says what was reached.
        allocator: the rank allocator or its name. None: the method's own.
        layout: whether keys are stored before (`pre_rope`) or after (`post_rope`) their rotation. None: the
            method's own.
        sample: which windows of the text to use.
        ranks: the ranks to choose from, as `rank_grid.grid` takes them: a count, ranks, shares of the head
            dim, or `all`. None: errors are measured at the method's own grid, and a byte budget is met with
            any rank that the method serves, unless the allocator compares measured pairs.
        rank_multiple: every rank per KV head is a multiple of it, or the head dim.
        judge: what the error of a layer is. `layers`: the relative error of its output, averaged over tokens.
            `loss`: the nats by which the cross-entropy increases (arXiv:2601.19611, section 5.2); many times
            slower.
        sinks: the first tokens of a sequence, which are stored exactly in addition to their latents.
        recent: the last tokens, which are stored exactly in the place of latents.
        bits: packing of the latents, as `make_cache` takes it. `none`: the model's own numbers. None: the
            same, or with no method what is recommended.
        at: length in tokens of the cache that a byte budget is counted for.
        heads: importance of KV heads by kind, for policies on top of the plan.
        pairs: measure errors at all pairs of ranks. Otherwise they are measured for keys and for values alone
            if the allocator splits a byte budget by them, and not at all if it splits by something else.
        work: a folder to save progress into and to resume from.
        progress: shows how far the calibration is.

    Raises:
        LowkeyError: for an unsupported model, too short a text, or a budget out of reach.
    """
    limit, window = resolve_budget(budget, error_budget, judge), Exact(sinks, recent)
    request = resolve_request(
        model, limit, judge, window, at, bits, method, allocator, layout, ranks, rank_multiple
    )
    windows = calibration_windows(attach(model), tokenizer, texts, sample)
    provenance = provenance_of(model, windows, sample)
    # An error budget is compared with errors of pairs, so these must be measured.
    measuring: Measuring = "none"
    if pairs or request.latent_bytes is None:
        measuring = "pairs"
    elif request.allocator.uses_measured_errors:
        measuring = "sides"
    context = _context(request, model, windows, sample, measuring, provenance, work, progress)
    bases, profile = fit_layers(request.method, context, context.work, judge, measuring)
    factors, choice = _choose_ranks(request, bases, profile, context)
    return _plan(request, factors, choice, provenance, asdict(families.geometry(model)), heads or {})


def _context(
    request: CalibrationRequest,
    model: PreTrainedModel,
    windows: Tensor,
    sample: Sample,
    measuring: Measuring,
    provenance: dict,
    work: Path | None,
    progress: Progress,
) -> CalibrationContext:
    """Return what the method works with, with a work folder that is this very job's own."""
    exact = request.budgeted_cache.exact.for_length(windows.shape[1])
    # Whatever changes a finished layer or its errors; other settings must not reuse it.
    job = {
        "provenance": provenance,
        "method": name_and_parameters(request.method),
        "layout": request.layout,
        "ranks": [request.measured_ranks, request.choices],
        "judge": request.judge,
        "batch": sample.batch,
        "exact": [exact.sinks, exact.recent],
        "surface": measuring,
    }
    return CalibrationContext(
        model=model,
        windows=windows,
        held_out=max(1, round(HELD_OUT_SHARE * len(windows))),
        layout=request.layout,
        measured_ranks=request.measured_ranks,
        seed=sample.seed,
        batch=sample.batch,
        progress=progress,
        choices=request.choices,
        exact=exact,
        work=files.job_folder(work, job),
    )


def _plan(
    request: CalibrationRequest,
    factors: dict[int, Factors],
    choice: dict,
    provenance: dict,
    geometry: dict,
    heads: HeadImportance,
) -> Plan:
    limit, window = request.limit, request.budgeted_cache.exact
    if isinstance(limit, Budget):
        budget = str(limit)
    else:
        budget = f"error {limit:g}" + (" nats" if request.judge == "loss" else "")
    return Plan(
        factors=factors,
        layout=request.layout,
        method=name_and_parameters(request.method),
        allocator=name_and_parameters(request.allocator),
        budget=budget,
        bits=request.bits,
        geometry=geometry,
        provenance=provenance,
        profile=choice | {"at": request.budgeted_cache.tokens},
        orthonormal=all(_has_transposed_maps(f) for f in factors.values()),
        sinks=window.sinks,
        recent=window.recent,
        heads={kind: [list(row) for row in rows] for kind, rows in heads.items()},
    )


def _choose_ranks(
    request: CalibrationRequest, bases: dict[int, LayerBases], profile: Profile, context: CalibrationContext
) -> tuple[dict[int, Factors], dict]:
    """Return factors at the ranks that the allocator chose, and what the plan records of the choice."""
    method, allocator, limit = request.method, request.allocator, request.limit
    # Heads are merged alike in all layers, so the first one says how.
    shape, first = families.geometry(context.model), next(iter(bases.values()))
    bytes_by_rank = request.budgeted_cache.bytes_by_rank(
        (first.keys.merge, first.values.merge),
        lambda rank: method.numbers_per_token(rank, shape.kv_heads, shape.head_dim),
    )
    # Signals cost a pass through the model, so only those that the allocator reads are measured.
    signals = {
        name: SIGNALS[name](context.model, context.training_windows, context.batch)
        for name in allocator.required_signals
    }
    profile = replace(
        profile,
        bytes_by_rank=bytes_by_rank,
        cache_share=request.budgeted_cache.cache_share,
        signals=signals,
    )
    # Some allocators, like `threshold`, name the few pairs whose errors they compare.
    profile = _with_errors_at(allocator.extra_pairs(profile), profile, bases, context, request.judge)
    if isinstance(limit, Budget):
        assert request.latent_bytes is not None  # what a byte budget leaves for latents
        ranks = allocator.under_bytes(profile, request.latent_bytes)
    else:
        ranks = allocator.under_error(profile, limit)
    factors = {i: b.at(*pair) for (i, b), pair in zip(bases.items(), ranks, strict=True)}
    choice = _choice_record(profile, ranks, bases)
    if not isinstance(limit, Budget):
        stage = " (before the method's last stage)" if method.has_finish else ""
        choice["bounded"] = {
            "what": allocator.bounds + stage,
            "error": JUDGES[request.judge],
            "budget": limit,
            "reached": allocator.bounded_value(profile, ranks),
        }
    return method.finish(factors, context) if method.has_finish else factors, choice


def _with_errors_at(
    wanted: list[list[Pair]],
    profile: Profile,
    bases: dict[int, LayerBases],
    context: CalibrationContext,
    judge: str,
) -> Profile:
    """Return the profile with measured errors at the wanted pairs of every layer that have none yet."""
    pairs = {
        i: sorted({pair for pair in layer if not profile.is_measured(place, pair)})
        for place, (i, layer) in enumerate(zip(bases, wanted, strict=True))
    }
    if not any(pairs.values()):
        return profile
    errors = _errors(bases, pairs, context, judge)
    return replace(profile, extra_points=[dict(zip(pairs[i], errors[i], strict=True)) for i in bases])


def _has_transposed_maps(f: Factors) -> bool:
    """Return whether the up maps are the transposed orthonormal down maps, so a plan need not hold them."""
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
    """Fit the bases of every compressible layer and measure their errors.

    The inputs of one layer are in memory at a time.

    Args:
        method: the low-rank method.
        context: the model, the windows and the ranks.
        work: a folder of this very job, to save finished layers into and to resume from.
        judge: what the error of a layer is.
        measuring: at which pairs of ranks errors are measured.

    Returns:
        Bases by layer, and the profile that an allocator reads.
    """
    model, ranks, pairs = context.model, context.measured_ranks, _pairs(context.measured_ranks, measuring)
    # A layer's error can be measured right after its fit, while its inputs are at hand, if that is the error
    # that judges and no later stage changes the bases.
    measured_at_once = judge == "layers" and not method.has_tune
    fitted: dict[int, tuple[LayerBases, Surface]] = {}
    if method.has_fit:
        batches = context.progress(context.training_windows.split(context.batch), "second moments")
        statistics = gather_statistics(model, batches, work, context.exact.sinks)
        label = f"fitting {name_of(method)}"
        for i, probe in _probes(context, label, lambda i: load_layer(work, f"layer-{i}")):
            if not isinstance(probe, LayerProbe):  # a layer that was finished before
                fitted[i] = probe
                continue
            layer_bases = method.fit(statistics[i], probe, context.selectable_ranks, context.seed)
            surface: Surface = []
            if measured_at_once and pairs:
                surface = _surface(ranks, pairs, probe.errors_at(layer_bases, pairs), judge)
            fitted[i] = layer_bases, surface
            save_layer(work, f"layer-{i}", layer_bases, surface)
    bases = {i: layer_bases for i, (layer_bases, _) in fitted.items()}
    if method.has_tune:
        bases = _tuned(method, bases, context, work)
    # A method without `fit` has bases from `tune` alone.
    surfaces = [fitted[i][1] if i in fitted else [] for i in bases]
    # Once more through all layers, now that the bases are final.
    if pairs and not measured_at_once:
        errors = _errors(bases, dict.fromkeys(bases, pairs), context, judge)
        surfaces = [_surface(ranks, pairs, errors[i], judge) for i in bases]
    heads, itemsize = families.geometry(model).kv_heads, model.dtype.itemsize
    spectra = [(_spectrum(b.keys), _spectrum(b.values)) for b in bases.values()]
    return bases, Profile(tuple(ranks), surfaces, heads, itemsize, spectra, choices=context.choices)


def _probes(
    context: CalibrationContext, label: str, finished: Callable[[int], _T | None]
) -> Iterator[tuple[int, LayerProbe | _T]]:
    """Yield (layer, its probe) for every compressible layer, or (layer, its result) for a finished one.

    Args:
        context: the model and the windows.
        label: what the progress bar says.
        finished: returns a layer's result if it is known already, else None.
    """
    model, shape = context.model, families.geometry(context.model)
    layers = layer_inputs(model, context.windows, context.batch)
    for i, inputs in context.progress(layers, label, shape.layers):
        if i not in shape.compressible:
            continue
        result = finished(i)
        if result is not None:
            yield i, result
        else:
            yield (
                i,
                LayerProbe.of(
                    model, i, context.layout, inputs, context.held_out, context.batch, context.exact
                ),
            )


def _tuned(
    method: Method, bases: dict[int, LayerBases], context: CalibrationContext, work: Path | None
) -> dict[int, LayerBases]:
    """Return the tuned bases of all layers, read back if all of them were saved before."""
    saved = {i: load_layer(work, f"tuned-{i}") for i in families.geometry(context.model).compressible}
    # Tuning changes all layers together, so it is finished for all of them or for none.
    if all(saved.values()):
        return {i: layer[0] for i, layer in saved.items() if layer}
    tuned = method.tune(bases, context)
    for i, layer_bases in tuned.items():
        save_layer(work, f"tuned-{i}", layer_bases, [])
    return tuned


def _pairs(ranks: list[int], measuring: Measuring) -> list[Pair]:
    """Return the pairs at which a layer's error is measured."""
    if measuring == "none":
        return []
    # With one side at full rank, the error is that of the other side alone.
    full = ranks[-1]
    return [(k, v) for k in ranks for v in ranks if measuring == "pairs" or full in (k, v)]


def _surface(ranks: list[int], pairs: list[Pair], errors: list[float], judge: str) -> Surface:
    """Return the error at every pair of ranks.

    A pair that was not measured is put together from keys and values compressed alone. Errors of the two are
    nearly independent, so their squares add up; nats add up themselves.
    """
    known, full = dict(zip(pairs, errors, strict=True)), ranks[-1]

    def error(k: int, v: int) -> float:
        if (k, v) in known:
            return known[k, v]
        keys_alone, values_alone = known[k, full], known[full, v]
        return keys_alone + values_alone if judge == "loss" else math.hypot(keys_alone, values_alone)

    return [[error(k, v) for v in ranks] for k in ranks]


def _errors(
    bases: dict[int, LayerBases], pairs: dict[int, list[Pair]], context: CalibrationContext, judge: str
) -> dict[int, list[float]]:
    """Measure the error of every layer, compressed alone, at its pairs."""
    if judge == "loss":
        windows = context.held_out_windows
        return loss_increases(
            context.model, windows, bases, pairs, context.layout, context.progress, context.exact
        )
    probes = _probes(context, "measuring", lambda i: None)
    return {i: probe.errors_at(bases[i], pairs[i]) for i, probe in probes}


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None,
    sample: Sample,
) -> Tensor:
    """Return the token ids (n, t) of a sample of windows, no longer than the model can read.

    Args:
        model: the model that will read them.
        tokenizer: its tokenizer.
        texts: the text or texts; None for the embedded text.
        sample: how many windows of which length.

    Raises:
        LowkeyError: if the text is too short.
    """
    # A model with fewer positions gets shorter windows.
    length = families.readable_length(model, sample.length)
    ids = text.encode(tokenizer, text.joined_texts(texts), model)
    return text.sample_windows(ids, tokenizer, length, sample.windows, sample.seed, "calibration text")


def name_of(component: object) -> str:
    """Return the name of a method or rank allocator, or `module:Class` if it is not one of ours."""
    for table in (METHODS, RANK_ALLOCATORS):
        for name, kind in table.items():
            if type(component) is kind:
                return name
    return f"{type(component).__module__}:{type(component).__qualname__}"


def name_and_parameters(component: Any) -> dict:
    """Return the name of a method or rank allocator and its options, as a plan records them."""
    return {"name": name_of(component), "parameters": asdict(component)}


def provenance_of(model: PreTrainedModel, windows: Tensor, sample: Sample) -> dict:
    """Return what a plan records of the model and of the windows (n, t) that it was made from."""
    return {
        "model": model.config._name_or_path,
        "model_sha256": model_fingerprint(model),
        "data_sha256": data_fingerprint(windows),
        "tokens": windows.numel(),
        "seed": sample.seed,
        "versions": versions(),
    }


def _choice_record(profile: Profile, ranks: Ranks, bases: dict[int, LayerBases]) -> dict:
    """Return what a plan records of the profile and of the chosen ranks."""
    return {
        "ranks": list(profile.ranks),
        "surface": profile.surface if any(profile.surface) else None,
        "chosen": [list(pair) for pair in ranks],
        "spectra": {side: _mean_spectra(bases, side) for side in ("keys", "values")},
    }


def _spectrum(basis: Basis) -> list[list[float]]:
    return [[]] if basis.spectrum is None else basis.spectrum.tolist()


def _mean_spectra(bases: dict[int, LayerBases], side: str) -> list[list[float]]:
    """Return, per layer, the energy of each rank averaged over heads, for plots."""
    spectra = (getattr(b, side).spectrum for b in bases.values())
    return [s.mean(0).tolist() for s in spectra if s is not None]
