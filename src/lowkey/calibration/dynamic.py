"""Caches in which every token has a rank of its own: gates from `methods.dynakv` (arXiv:2603.04411, of which
only the abstract is known), kept in a file of their own, for an ordinary plan says one rank for all tokens.

plan = dynamic.dyna_plan(model, tokenizer, training=GateTraining(target=0.4)) cache =
dynamic.dyna_cache(model, plan)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache, cache_of
from lowkey.calibration.calibrate import HELD_OUT_SHARE, Sample, calibration_windows, provenance_of
from lowkey.calibration.statistics import gather_statistics
from lowkey.core import files
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LAYOUTS, Budget, Factors, Heads, Layout, LowkeyError
from lowkey.methods import dynakv
from lowkey.methods.dynakv import GateTraining
from lowkey.models import families
from lowkey.models.attention_interface import attach, attached
from lowkey.models.fingerprint import check_model
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.plan import cache_shape
from lowkey.storage.bucketed import BucketedLayer, Gate, truncate_factors
from lowkey.storage.codec import LowRank

DYNAMIC_PLAN_FORMAT = 1
METHOD = "dynakv"
DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS, DYNAMIC_PLAN_FILE = (
    "dynaplan.json",
    "dynaplan.safetensors",
    "dynamic-plan",
)
DYNAMIC_PLAN_FIELDS = ("layout", "levels", "share", "divergence", "training", "geometry", "provenance")


@dataclass(frozen=True)
class DynamicPlan:
    """Orthonormal bases of full rank and a gate for every compressed layer.

    levels: ranks that a token may keep, the widest first. share, divergence: the mean share of coordinates
    that held-out tokens kept, and KL(original || compressed) per token there. training: the options of the
    gates' training; provenance: model and data fingerprints.
    """

    factors: dict[int, Factors]
    gates: dict[int, Gate]
    levels: tuple[int, ...]
    layout: Layout
    share: float
    divergence: float
    training: dict
    geometry: dict
    provenance: dict

    @property
    def budget(self) -> str:
        """What was asked for: the mean share of coordinates to keep, like `50%`."""
        return str(Budget(100 * self.training["target"], "%"))

    def bytes_per_token(self, itemsize: int) -> float:
        """What one more token takes in the compressed layers, if it is like the held-out ones; positions of
        unrotated keys included.
        """
        g = self.geometry
        placed = 4 if self.layout == "pre_rope" else 0
        return len(self.factors) * (self.share * 2 * g["kv_heads"] * g["head_dim"] * itemsize + placed)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model, by fingerprint and by shape. Errors: LowkeyError."""
        known = self.provenance
        check_model("dynamic plan", known.get("model", "?"), known.get("model_sha256"), model, "make it anew")
        shape = families.geometry(model)
        named = self.geometry["kv_heads"], self.geometry["head_dim"]
        if sorted(self.factors) != list(shape.compressible) or named != (shape.kv_heads, shape.head_dim):
            raise LowkeyError(
                "dynamic plan does not cover the layers and heads of this model; it is damaged: make it again"
            )
        families.check_layout(model, self.layout)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the folder `path` in one step, as `Plan.save` does. Errors: LowkeyError when it holds other
        files or cannot be written.
        """
        folder = Path(path)
        files.check_folder(folder, force, again=DYNAMIC_PLAN_JSON)
        with files.replacing_folder(folder) as temporary:
            checksum = files.write_tensors(
                temporary / DYNAMIC_PLAN_TENSORS, self._tensors(), DYNAMIC_PLAN_FILE
            )
            files.write_json(
                temporary / DYNAMIC_PLAN_JSON,
                {**self.describe(), "tensors_sha256": checksum},
                DYNAMIC_PLAN_FILE,
            )

    def describe(self) -> dict:
        """Everything but the factors and gates, as dynaplan.json holds it."""
        known = {name: getattr(self, name) for name in DYNAMIC_PLAN_FIELDS} | {"layers": sorted(self.factors)}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {
            "format": DYNAMIC_PLAN_FORMAT,
            "method": METHOD,
            "budget": self.budget,
            **known,
            "bytes_per_token": sizes,
        }

    def digest(self) -> str:
        """A checksum of the maps and gates."""
        return files.digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The down maps, whose transposes are the up maps, and the gates."""
        maps = {
            f"{i}.{name}": getattr(f, name) for i, f in self.factors.items() for name in ("k_down", "v_down")
        }
        gates = {f"{i}.gate.{name}": t for i, gate in self.gates.items() for name, t in vars(gate).items()}
        return {name: t.detach().float().cpu().contiguous() for name, t in (maps | gates).items()}

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> DynamicPlan:
        """Read what `save` wrote; with `model`, refuse it unless it was made for that model.

        Errors: LowkeyError for a newer format, a damaged file, NaNs, wrong shapes, another model.
        """
        folder = Path(path)
        plan = files.steady(folder, lambda: _read(folder))
        if model is not None:
            plan.check(model)
        return plan


def _read(folder: Path) -> DynamicPlan:
    about = files.read_json(
        folder / DYNAMIC_PLAN_JSON, "dynamic plan", DYNAMIC_PLAN_FILE, DYNAMIC_PLAN_FORMAT
    )
    tensors = files.read_tensors(
        folder / DYNAMIC_PLAN_TENSORS, "dynamic plan", DYNAMIC_PLAN_FILE, str(about.get("tensors_sha256"))
    )
    try:
        return _build(about, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise LowkeyError(
            f"dynamic plan {str(folder)!r}: {error!s:.200}; it is damaged: make it again"
        ) from None


def _build(about: dict, tensors: dict[str, Tensor]) -> DynamicPlan:
    """Errors: KeyError, TypeError or ValueError for what is missing or does not fit."""
    known = {name: about[name] for name in DYNAMIC_PLAN_FIELDS} | {"levels": tuple(about["levels"])}
    heads, d = cache_shape(about["geometry"])
    if known["layout"] not in LAYOUTS:
        raise ValueError(f"layout {known['layout']!r:.40} is none of {', '.join(LAYOUTS)}")
    levels = about["levels"]
    if not (
        all(type(r) is int and r > 0 for r in levels)
        and levels
        and levels[0] == d
        and sorted(set(levels), reverse=True) == levels
    ):
        raise ValueError(f"levels {levels} are not ranks that fall from the head dim {d}")
    if not all(t.dtype == torch.float32 for t in tensors.values()):
        raise ValueError("its tensors are not of fp32")
    share, divergence, target = (
        about[name] if name in about else about["training"][name]
        for name in ("share", "divergence", "target")
    )
    if not all(type(n) in (int, float) for n in (share, divergence, target)) or not (
        0 < target <= 1 and 0 <= share <= 1
    ):
        raise ValueError("share, divergence or target is not a number that it can be")
    layers, count = about["layers"], about["geometry"]["layers"]
    if not (
        isinstance(layers, list)
        and layers
        and all(type(i) is int and 0 <= i < count for i in layers)
        and sorted(set(layers)) == layers
    ):
        raise ValueError("layers are not indices that rise")
    if not isinstance(about["provenance"]["model_sha256"], str):
        raise ValueError("provenance names no model")
    factors = {i: _factors(tensors[f"{i}.k_down"], tensors[f"{i}.v_down"], heads, d) for i in layers}
    gates = {
        i: _gate({f.name: tensors[f"{i}.gate.{f.name}"] for f in fields(Gate)}, heads, d, len(levels))
        for i in layers
    }
    if len(tensors) != len(layers) * (2 + len(fields(Gate))):
        raise ValueError("its tensors are more than those of its layers")
    return DynamicPlan(factors, gates, **known)


def _factors(k: Tensor, v: Tensor, heads: int, d: int) -> Factors:
    for name, down in (("key", k), ("value", v)):
        if tuple(down.shape) not in ((1, d, d), (heads, d, d)) or not is_orthonormal(down):
            raise ValueError(
                f"{name} map of shape {tuple(down.shape)} is no orthonormal one for {heads} heads of {d}"
            )
    return Factors(k, k.mT, v, v.mT)


def _gate(parts: dict[str, Tensor], heads: int, d: int, levels: int) -> Gate:
    hidden = parts["hidden"].shape[-1] if parts["hidden"].ndim else 0
    shapes = {
        "scale": (2 * heads, d),
        "hidden": (2 * heads * d, hidden),
        "hidden_bias": (hidden,),
        "out": (hidden, levels),
        "out_bias": (levels,),
    }
    for name, shape in shapes.items():
        if tuple(parts[name].shape) != shape:
            raise ValueError(f"gate's {name} of shape {tuple(parts[name].shape)} is not {shape}")
    return Gate(**parts)


def make_dynamic_cache(model: PreTrainedModel, plan: DynamicPlan) -> LowkeyCache:
    """A fresh cache for one batch of sequences. It cannot be saved.

    Errors: LowkeyError when the model is not attached or the plan is another model's.
    """
    if not attached(model):
        raise LowkeyError("model is not attached: call lowkey.attach(model) before make_dynamic_cache")
    plan.check(model)
    return fresh(model, plan)


def fresh(model: PreTrainedModel, plan: DynamicPlan) -> LowkeyCache:
    """As `make_dynamic_cache`, for a plan that was checked before: the model's weights are not looked at again."""
    return cache_of(model, lambda i: _layer(model, plan, i))


def _layer(model: PreTrainedModel, plan: DynamicPlan, i: int) -> BucketedLayer:
    rope = families.rope(model, i)
    return BucketedLayer(
        [LowRank(truncate_factors(plan.factors[i], r), plan.layout, rope) for r in plan.levels], plan.gates[i]
    )


def make_dynamic_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    layout: Layout = "post_rope",
    key_bases: Heads = "shared",
    sample: Sample | None = None,
    training: GateTraining | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> DynamicPlan:
    """PCA bases and gates from windows of `texts` (the embedded calibration text when None), of which a
    quarter only judges.

    training.target: the share of coordinates to keep, a half unless said otherwise. sample, training: their
    defaults when None.
    work: a folder to resume from and save progress into.
    Errors: LowkeyError for an unsupported model or layout, too short a text, or a target out of reach.
    """
    shape, sample, training = families.geometry(model), sample or Sample(), training or GateTraining()
    if layout not in LAYOUTS:
        raise LowkeyError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    families.check_layout(model, layout)
    dynakv.check_target(training.target, shape.head_dim)
    attach(model)
    rows = calibration_windows(model, tokenizer, texts, sample)
    held, provenance = max(1, round(HELD_OUT_SHARE * len(rows))), provenance_of(model, rows, sample)
    what = {"layout": layout, "key_bases": key_bases, "training": asdict(training), "batch": sample.batch}
    work = files.job_folder(work, {"provenance": provenance, **what})
    statistics = gather_statistics(model, progress(rows[:-held].split(sample.batch), "second moments"), work)
    found = {i: dynakv.pca_bases(s, layout, key_bases) for i, s in statistics.items()}
    gates = dynakv.train_gates(model, found, rows, held, layout, training, progress, work)
    d = shape.head_dim
    return DynamicPlan(
        factors={i: b.at(d, d) for i, b in found.items()},
        gates={i: gate.to(torch.device("cpu")) for i, gate in gates.gates.items()},
        levels=dynakv.levels_of(d),
        layout=layout,
        share=gates.share,
        divergence=gates.divergence,
        training=asdict(training),
        geometry=asdict(shape),
        provenance=provenance,
    )
