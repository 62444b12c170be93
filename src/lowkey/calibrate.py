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

from lowkey import families, files, text
from lowkey.allocate import ALLOCATORS, Allocator
from lowkey.asked import AT, JUDGES, Asked, asked_for, limit_of
from lowkey.fingerprint import data_fingerprint, model_fingerprint
from lowkey.grid import Asked as Grid
from lowkey.layers.exact import WINDOW, Exact
from lowkey.merging import blocks
from lowkey.methods import METHODS, Course, Method
from lowkey.ops.bases import is_orthonormal
from lowkey.options import Checked, option
from lowkey.plan import Plan, versions
from lowkey.policies.allocators import HeadImportance
from lowkey.probe import Probe
from lowkey.profile import Pair, Profile, Ranks
from lowkey.progress import Progress, silent
from lowkey.seam import attach
from lowkey.sensitivity import SIGNALS
from lowkey.statistics import gather
from lowkey.stream import layer_inputs
from lowkey.through import losses_grown
from lowkey.types import Basis, Budget, Factors, LayerBases, Layout
from lowkey.unfinished import Surface, load_layer, save_layer

HELD = 0.25  # share of the calibration windows that only judge: the error surface and early stopping
Measuring = Literal["pairs", "sides", "none"]
T = TypeVar("T")


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
    allocator: str | Allocator | None = None,
    layout: Layout | None = None,
    sample: Sample = Sample(),
    ranks: Grid | None = None,
    rank_multiple: int = 1,
    judge: str = "layers",
    sinks: int = WINDOW.sinks,
    recent: int = WINDOW.recent,
    bits: int | str | None = None,
    at: int = AT,
    heads: HeadImportance | None = None,
    pairs: bool = False,
    work: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fit `method` on `texts` (the embedded text when None) and choose ranks. allocator, layout: the method's own when None.

    method: None for what does best on a real model at the budget: `recommended` says what that is.
    budget: bytes of the layers that are compressed (sliding ones are not), in the model's dtype: a share of the full cache's, a rate per
    token, or a total; `50%` when neither budget is given. A cache of one row of `at` tokens never exceeds it, exact tokens included: the
    first `sinks` of a row, which are held whole besides their latents, and the last `recent`, which are held whole in the place of latents.
    Nor does a longer one exceed a share or a rate, but for up to 31 tokens that wait whole where 32 are packed together. (At 100% the
    sinks come on top.)
    bits: the packing of latents, as `make_cache` takes it; None: the model's own numbers, or with no method what is recommended; `none`:
    the model's own numbers.
    error_budget: instead, the largest value of what the allocator's `bounds` names, for most the largest error of a layer, measured on
    held-out windows with that layer alone compressed; `plan.profile["bounded"]` says what was reached.
    judge: a layer's error is that of its output (`layers`, relative, in the mean over tokens) or the nats by which the cross-entropy
    grows (`loss`, arXiv:2601.19611, section 5.2: many times slower).
    ranks: candidates, as `lowkey.grid.grid` takes them: a count, ranks, shares of the head dim, or `all`. When None, errors are measured at
    the method's own grid, and a byte budget is met with any rank that the method serves, unless the allocator compares measured pairs.
    rank_multiple: every rank per KV head is a multiple of it, or the head dim. heads: importance of KV heads by kind, for policies on top.
    pairs: measure errors at all pairs of candidate ranks. Else they are measured for keys and values apart where a byte budget is split by
    them, and not at all where it is split by something else.
    work: a folder to resume from and save progress into.
    Errors: LowkeyError for an unsupported model, too short a text, or a budget out of reach.
    """
    limit, window = limit_of(budget, error_budget, judge), Exact(sinks, recent)
    asked = asked_for(model, limit, judge, window, at, bits, method, allocator, layout, ranks, rank_multiple)
    rows = windows_of(attach(model), tokenizer, texts, sample)
    known = provenance_of(model, rows, sample)
    surface: Measuring = "pairs" if pairs or asked.room is None else "sides" if asked.allocator.measured else "none"
    course = _course(asked, model, rows, sample, surface, known, work, progress)
    bases, profile = fit_layers(asked.method, course, course.work, judge, surface)
    factors, told = _chosen(asked, bases, profile, course)
    return _plan(asked, factors, told, known, asdict(families.geometry(model)), heads or {})


def _course(
    asked: Asked,
    model: PreTrainedModel,
    rows: Tensor,
    sample: Sample,
    surface: Measuring,
    known: dict,
    work: Path | None,
    progress: Progress,
) -> Course:
    """What the method works on, with a folder of its own for unfinished work."""
    seen = asked.holding.exact.visible(rows.shape[1])
    what: dict = {"method": describe(asked.method), "layout": asked.layout, "ranks": [asked.measured, asked.choices], "judge": asked.judge}
    what |= {"batch": sample.batch, "exact": [seen.sinks, seen.recent], "surface": surface}
    folder, held = files.job_folder(work, {"provenance": known, **what}), max(1, round(HELD * len(rows)))
    return Course(model, rows, held, asked.layout, asked.measured, sample.seed, sample.batch, progress, asked.choices, seen, folder)


def _plan(asked: Asked, factors: dict[int, Factors], told: dict, known: dict, geometry: dict, heads: HeadImportance) -> Plan:
    limit, window = asked.limit, asked.holding.exact
    return Plan(
        factors=factors,
        layout=asked.layout,
        method=describe(asked.method),
        allocator=describe(asked.allocator),
        budget=str(limit) if isinstance(limit, Budget) else f"error {limit:g}" + (" nats" if asked.judge == "loss" else ""),
        bits=asked.bits,
        geometry=geometry,
        provenance=known,
        profile=told | {"at": asked.holding.tokens},
        orthonormal=all(_transposed(f) for f in factors.values()),
        sinks=window.sinks,
        recent=window.recent,
        heads={kind: [list(row) for row in rows] for kind, rows in heads.items()},
    )


def _chosen(asked: Asked, bases: dict[int, LayerBases], profile: Profile, course: Course) -> tuple[dict[int, Factors], dict]:
    """Factors at the ranks that the allocator chose, and what the plan says of the choice."""
    method, split, limit = asked.method, asked.allocator, asked.limit
    shape, first = families.geometry(course.model), next(iter(bases.values()))
    merge = first.keys.merge, first.values.merge
    sizes = asked.holding.sizes(merge, lambda rank: method.numbers(rank, shape.kv_heads, shape.head_dim))
    signals = {name: SIGNALS[name](course.model, course.training, course.batch) for name in split.needs}
    profile = replace(profile, sizes=sizes, share=asked.holding.share, signals=signals)
    profile = _measured(profile, split.pairs(profile), bases, course, asked.judge)
    ranks = split.under_error(profile, limit) if asked.room is None else split.under_bytes(profile, asked.room)  # type: ignore[arg-type]
    factors = {i: found.at(*pair) for (i, found), pair in zip(bases.items(), ranks, strict=True)}
    told = _described(profile, ranks, bases)
    if not isinstance(limit, Budget):
        when = " (before the method's last stage)" if method.finishes else ""
        error, reached = JUDGES[asked.judge], split.bounded(profile, ranks)
        told["bounded"] = {"what": split.bounds + when, "error": error, "budget": limit, "reached": reached}
    return method.finish(factors, course) if method.finishes else factors, told


def _measured(profile: Profile, wanted: list[list[Pair]], bases: dict[int, LayerBases], course: Course, judge: str) -> Profile:
    """With the errors at the wanted pairs that are not on the surface."""
    pairs = {
        i: sorted({pair for pair in layer if not profile.is_measured(place, pair)})
        for place, (i, layer) in enumerate(zip(bases, wanted, strict=True))
    }
    if not any(pairs.values()):
        return profile
    found = _errors(bases, pairs, course, judge)
    return replace(profile, points=[dict(zip(pairs[i], found[i], strict=True)) for i in bases])


def _transposed(f: Factors) -> bool:
    """Whether the up maps are the orthonormal down maps turned over, so that a plan need not hold them."""
    sides = (f.k_down, f.k_up), (f.v_down, f.v_up)
    return all(torch.equal(blocks(down.mT, t), up) and is_orthonormal(down) for (down, up), t in zip(sides, f.merge, strict=True))


def fit_layers(
    method: Method, course: Course, work: Path | None = None, judge: str = "layers", measuring: Measuring = "pairs"
) -> tuple[dict[int, LayerBases], Profile]:
    """Bases and error surface of every compressible layer. Only one layer's inputs are held at a time."""
    model, ranks, pairs = course.model, course.ranks, _pairs(course.ranks, measuring)
    inside = judge == "layers" and not method.tunes  # the surface can be had while a layer's inputs are at hand
    found: dict[int, tuple[LayerBases, Surface]] = {}
    if method.fits:
        batches = course.training.split(course.batch)
        statistics = gather(model, course.progress(batches, "second moments"), work, course.exact.sinks)
        for i, probe in _probes(course, f"fitting {name_of(method)}", lambda i: load_layer(work, f"layer-{i}")):
            if not isinstance(probe, Probe):
                found[i] = probe
                continue
            fitted = method.fit(statistics[i], probe, course.served, course.seed)
            found[i] = fitted, _surface(ranks, pairs, probe.errors_at(fitted, pairs), judge) if inside and pairs else []
            save_layer(work, f"layer-{i}", *found[i])
    bases = {i: fitted for i, (fitted, _) in found.items()}
    if method.tunes:
        bases = _tuned(method, bases, course, work)
    surfaces = [found[i][1] if i in found else [] for i in bases]
    if pairs and not inside:
        errors = _errors(bases, dict.fromkeys(bases, pairs), course, judge)
        surfaces = [_surface(ranks, pairs, errors[i], judge) for i in bases]
    shape = families.geometry(model)
    spectra = [(_spectrum(b.keys), _spectrum(b.values)) for b in bases.values()]
    return bases, Profile(tuple(course.ranks), surfaces, shape.kv_heads, model.dtype.itemsize, spectra, choices=course.choices)


def _probes(course: Course, text: str, known: Callable[[int], T | None]) -> Iterator[tuple[int, Probe | T]]:
    """(layer, its probe, or what is known of it already) for every compressible layer."""
    model, shape = course.model, families.geometry(course.model)
    for i, inputs in course.progress(layer_inputs(model, course.rows, course.batch), text, shape.layers):
        if i in shape.compressible:
            yield i, known(i) or Probe.of(model, i, course.layout, inputs, course.held, course.batch, course.exact)


def _tuned(method: Method, bases: dict[int, LayerBases], course: Course, work: Path | None) -> dict[int, LayerBases]:
    saved = {i: load_layer(work, f"tuned-{i}") for i in families.geometry(course.model).compressible}
    if all(saved.values()):
        return {i: found[0] for i, found in saved.items() if found}
    tuned = method.tune(bases, course)
    for i, found in tuned.items():
        save_layer(work, f"tuned-{i}", found, [])
    return tuned


def _pairs(ranks: list[int], measuring: Measuring) -> list[Pair]:
    """What is measured of a layer: all pairs of ranks, or keys and values with the other side in full, or nothing."""
    if measuring == "none":
        return []
    full = ranks[-1]
    return [(k, v) for k in ranks for v in ranks if measuring == "pairs" or full in (k, v)]


def _surface(ranks: list[int], pairs: list[Pair], errors: list[float], judge: str) -> Surface:
    """The error at every pair. What was not measured is put together from its two sides: errors of keys and values are nearly
    independent, so that their squares add up, and nats do so themselves."""
    known, full = dict(zip(pairs, errors, strict=True)), ranks[-1]

    def both(k: int, v: int) -> float:
        if (k, v) in known:
            return known[k, v]
        one, other = known[k, full], known[full, v]
        return one + other if judge == "loss" else math.hypot(one, other)

    return [[both(k, v) for v in ranks] for k in ranks]


def _errors(bases: dict[int, LayerBases], pairs: dict[int, list[Pair]], course: Course, judge: str) -> dict[int, list[float]]:
    """Of every layer alone, at its pairs."""
    if judge == "loss":
        held = course.rows[-course.held :]
        return losses_grown(course.model, held, bases, pairs, course.layout, course.progress, course.exact)
    return {i: probe.errors_at(bases[i], pairs[i]) for i, probe in _probes(course, "measuring", lambda i: None)}


def windows_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str] | None, sample: Sample) -> Tensor:
    """Ids (n, t) of the sample, no longer than the model reads. Errors: LowkeyError for too short a text."""
    length = min(sample.length, getattr(model.config.get_text_config(), "max_position_embeddings", sample.length))
    ids = text.encode(tokenizer, text.joined(texts), model)
    return text.sample_windows(ids, tokenizer, length, sample.windows, sample.seed, "calibration text")


def name_of(thing: object) -> str:
    """The short name of a method or allocator, or its class's path when it is not one of ours."""
    for table in (METHODS, ALLOCATORS):
        for name, kind in table.items():
            if type(thing) is kind:
                return name
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def describe(thing: object) -> dict:
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
    return {"ranks": list(profile.ranks), "surface": surface, "chosen": chosen, "spectra": _mean_spectra(bases)}


def _spectrum(basis: Basis) -> list[list[float]]:
    return [[]] if basis.spectrum is None else basis.spectrum.tolist()


def _mean_spectra(bases: dict[int, LayerBases]) -> dict:
    """Energy per rank and layer, averaged over heads, for plots."""

    def means(side: str) -> list[list[float]]:
        found = (getattr(b, side).spectrum for b in bases.values())
        return [s.mean(0).tolist() for s in found if s is not None]

    return {side: means(side) for side in ("keys", "values")}
