"""`calibrate`: text in, Plan out. One pass for statistics, then layer by layer: fit, profile; then allocate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import families, files, text
from lowkey.allocate import ALLOCATORS, Allocator, Profile, Ranks, too_small
from lowkey.fingerprint import data_fingerprint, model_fingerprint
from lowkey.methods import METHODS, Method
from lowkey.plan import Plan, versions
from lowkey.policies.allocators import HeadImportance
from lowkey.probe import Probe
from lowkey.progress import Progress, silent
from lowkey.seam import attach, attached
from lowkey.statistics import gather
from lowkey.types import LAYOUTS, Basis, Budget, LayerBases, Layout, LowkeyError, device_of

HELD = 0.25  # share of the calibration windows that only judge: the error surface and early stopping
STEPS = 8  # candidate ranks, evenly spaced up to the head dim


@dataclass(frozen=True)
class Sample:
    """What to calibrate on: at most `windows` windows of `length` tokens, drawn with `seed`."""

    windows: int = 32
    length: int = 512
    seed: int = 0
    batch: int = 4


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    method: Method | None = None,
    budget: str | Budget | None = None,
    error_budget: float | None = None,
    allocator: str | Allocator | None = None,
    layout: Layout = "post_rope",
    sample: Sample = Sample(),
    rank_multiple: int = 1,
    sinks: int = 0,
    recent: int = 0,
    heads: HeadImportance | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fit `method` on `texts` (the embedded text when None) and choose ranks.

    budget: bytes kept, `50%` when neither budget is given. error_budget: the largest layer-output error instead, from 0 to 1.
    allocator: a name of ALLOCATORS or an object; the method's own when None. rank_multiple: every rank a multiple of it.
    sinks, recent: tokens kept exact by caches made from the plan. heads: importance of KV heads by kind,
    for policies on top of it. work: a folder to resume from and save progress into.
    Errors: LowkeyError for an unsupported model, too short a text, or a budget out of reach.
    """
    _check(sample, sinks, recent, layout)
    chosen = method or METHODS["stiefattention"]()
    split = _allocator(allocator or chosen.allocator)
    shape = families.geometry(model)
    families.check_layout(model, layout)
    limit = _limit(budget, error_budget, shape, model)
    ranks = candidates(shape.head_dim, rank_multiple)
    _reachable(limit, shape, ranks, model)
    if not attached(model):
        attach(model)
    joined = texts if isinstance(texts, str) else "\n".join(texts) if texts else text.embedded("calibration")
    rows = _windows(model, tokenizer, joined, sample)
    provenance = _provenance(model, rows, sample)
    job = _job(work, {"provenance": provenance, "method": describe(chosen), "layout": layout, "ranks": ranks})
    bases, profile = fit_layers(model, rows, chosen, layout, ranks, sample, job, progress)
    allocated = _allocate(split, profile, limit)
    pairs = dict(zip(shape.compressible, allocated, strict=True))
    return Plan(
        factors={i: bases[i].at(*pair) for i, pair in pairs.items()},
        layout=layout,
        method=describe(chosen),
        allocator=describe(split),
        budget=str(limit) if isinstance(limit, Budget) else f"error {limit:g}",
        geometry=asdict(shape),
        provenance=provenance,
        profile=_described(profile, allocated, bases),
        orthonormal=all(b.keys.rows is None and b.values.rows is None for b in bases.values()),
        sinks=sinks,
        recent=recent,
        heads={kind: [list(row) for row in rows] for kind, rows in (heads or {}).items()},
    )


def _check(sample: Sample, sinks: int, recent: int, layout: str) -> None:
    least = {
        "windows": (sample.windows, 4),
        "length": (sample.length, 8),
        "batch": (sample.batch, 1),
        "sinks": (sinks, 0),
        "recent": (recent, 0),
    }
    for name, (value, low) in least.items():
        if value < low:
            raise LowkeyError(f"{name} {value}: must be at least {low}; leave it out for the default")
    if layout not in LAYOUTS:
        raise LowkeyError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")


def candidates(head_dim: int, multiple: int) -> list[int]:
    """About eight evenly spaced ranks, multiples of `multiple`, and always the head dim itself."""
    if not 1 <= multiple <= head_dim:
        raise LowkeyError(f"rank multiple {multiple}: must lie between 1 and the head dim {head_dim}")
    step = max(multiple, -(-head_dim // STEPS) // multiple * multiple)
    return sorted({*range(step, head_dim, step), head_dim})


def fit_layers(
    model: PreTrainedModel,
    rows: Tensor,
    method: Method,
    layout: Layout,
    ranks: list[int],
    sample: Sample,
    work: Path | None,
    progress: Progress,
) -> tuple[dict[int, LayerBases], Profile]:
    """Bases and error surface of every compressible layer. Only one layer's inputs are held at a time."""
    held = max(1, round(HELD * len(rows)))
    batches = rows[:-held].split(sample.batch)
    statistics = gather(model, progress(batches, "second moments"), work)
    bases: dict[int, LayerBases] = {}
    surface = []
    shape = families.geometry(model)
    for i, inputs in progress(layer_inputs(model, rows, sample.batch), f"fitting {name_of(method)}", shape.layers):
        if i not in statistics:
            continue
        found = _load_layer(work, i)
        if found is None:
            probe = Probe.of(model, i, layout, inputs, held, sample.batch)
            fitted = method.fit(statistics[i], probe, ranks, sample.seed)
            found = fitted, probe.surface(fitted, ranks, ranks)
            _save_layer(work, i, *found)
        bases[i] = found[0]
        surface.append(found[1])
    spectra = [(_spectrum(b.keys), _spectrum(b.values)) for b in bases.values()]
    return bases, Profile(tuple(ranks), surface, shape.kv_heads, model.dtype.itemsize, spectra)


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(layer, its inputs (n, t, D) in fp32 on the CPU) by the uncompressed model, one layer at a time."""
    device = device_of(model)
    first = [model(x.to(device), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[0] for x in rows.split(batch)]
    hidden = torch.cat([x.cpu() for x in first])
    for i, block in enumerate(families.decoder_layers(model)):
        yield i, hidden.float()
        where = device_of(block)
        hidden = torch.cat([families.run_layer(model, i, block, x.to(where), None).cpu() for x in hidden.split(batch)])


def _windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, joined: str, sample: Sample) -> Tensor:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", sample.length)
    ids = text.encode(tokenizer, joined)
    length = min(sample.length, longest)
    return text.sample_windows(ids, tokenizer, length, sample.windows, sample.seed, "calibration text")


def _limit(budget: str | Budget | None, error: float | None, shape: families.Geometry, model: PreTrainedModel) -> Budget | float:
    if budget is not None and error is not None:
        raise LowkeyError(f"budget {budget} and error budget {error}: give one of them")
    if error is not None:
        if not 0 < error <= 1:
            raise LowkeyError(f"error budget {error}: a relative layer-output error above 0 and up to 1; the paper uses 0.03")
        return error
    parsed = Budget.parse("50%" if budget is None else budget)
    parsed.bytes_per_token(shape.full_bytes_per_token(model.dtype.itemsize))
    return parsed


def _reachable(limit: Budget | float, shape: families.Geometry, ranks: list[int], model: PreTrainedModel) -> None:
    """Refuse a byte budget below the least ranks before anything is fitted."""
    if not isinstance(limit, Budget):
        return
    count = len(shape.compressible)
    empty = Profile(tuple(ranks), [[]] * count, shape.kv_heads, model.dtype.itemsize, [])
    least, most = (empty.bytes([(r, r)] * count) for r in (ranks[0], ranks[-1]))
    if limit.bytes_per_token(most) < least:
        raise too_small(empty, limit.bytes_per_token(most), least)


def _allocate(split: Allocator, profile: Profile, limit: Budget | float) -> Ranks:
    if isinstance(limit, Budget):
        full = profile.bytes([(profile.ranks[-1],) * 2] * profile.layers)
        return split.under_bytes(profile, limit.bytes_per_token(full))
    return split.under_error(profile, limit)


def _allocator(chosen: str | Allocator) -> Allocator:
    if not isinstance(chosen, str):
        return chosen
    if chosen not in ALLOCATORS:
        raise LowkeyError(f"allocator {chosen!r} is unknown; choose one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[chosen]()


def name_of(thing: object) -> str:
    """The short name of a method or allocator, or its class's path when it is not one of ours."""
    for table in (METHODS, ALLOCATORS):
        for name, kind in table.items():
            if type(thing) is kind:
                return name
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def describe(thing: object) -> dict:
    return {"name": name_of(thing), "parameters": asdict(thing)}  # type: ignore[call-overload]


def _provenance(model: PreTrainedModel, rows: Tensor, sample: Sample) -> dict:
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
    return {"ranks": list(profile.ranks), "surface": profile.surface, "chosen": chosen, "spectra": _mean_spectra(bases)}


def _spectrum(basis: Basis) -> list[list[float]]:
    return [[]] if basis.spectrum is None else basis.spectrum.tolist()


def _mean_spectra(bases: dict[int, LayerBases]) -> dict:
    """Energy per rank and layer, averaged over heads, for plots."""

    def means(side: str) -> list[list[float]]:
        found = (getattr(b, side).spectrum for b in bases.values())
        return [s.mean(0).tolist() for s in found if s is not None]

    return {side: means(side) for side in ("keys", "values")}


# -- resuming: a work folder belongs to one job; its layers are read back, never recomputed


def _job(work: Path | None, job: dict) -> Path | None:
    if work is None:
        return None
    text_now = json.dumps(job, sort_keys=True)
    marker = work / "job.json"
    if not (marker.exists() and marker.read_text(encoding="utf-8") == text_now):
        for stale in work.glob("*.safetensors"):
            stale.unlink()
        files.write_text(marker, text_now)
    return work


def _save_layer(work: Path | None, i: int, bases: LayerBases, surface: list[list[float]]) -> None:
    if work is None:
        return
    tensors = {"surface": torch.tensor(surface, dtype=torch.float64)}
    for side in ("keys", "values"):
        b: Basis = getattr(bases, side)
        parts = {"columns": b.columns, "rows": b.rows, "spectrum": b.spectrum} | {f"exact.{r}": t for r, t in b.exact}
        tensors |= {f"{side}.{name}": t for name, t in parts.items() if t is not None}
    files.write_tensors(work / f"layer-{i}.safetensors", tensors)


def _load_layer(work: Path | None, i: int) -> tuple[LayerBases, list[list[float]]] | None:
    path = work / f"layer-{i}.safetensors" if work is not None else None
    if path is None or not path.exists():
        return None
    tensors = files.read_tensors(path, "unfinished layer")

    def basis(side: str) -> Basis:
        exact = tuple((int(n.rsplit(".", 1)[1]), t) for n, t in sorted(tensors.items()) if n.startswith(f"{side}.exact."))
        return Basis(tensors[f"{side}.columns"], tensors.get(f"{side}.rows"), exact, tensors.get(f"{side}.spectrum"))

    return LayerBases(basis("keys"), basis("values")), tensors["surface"].tolist()
