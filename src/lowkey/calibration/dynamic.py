"""Plans and caches in which a gate gives every token a rank of its own (arXiv:2603.04411).

    plan = dynamic.make_dynamic_plan(model, tokenizer, training=GateTraining(target=0.4))
    cache = dynamic.make_dynamic_cache(model, plan)

An ordinary plan has one rank for all tokens, so these plans have a class and a file format of their own. Only
the paper's abstract is known to us; the design is ours.
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
from lowkey.core.options import nearest_name
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LAYOUTS, Budget, Factors, Heads, Layout, LowkeyError
from lowkey.methods import DYNAMIC_METHODS, dynakv
from lowkey.methods.dynakv import GateTraining
from lowkey.models import families
from lowkey.models.attention_interface import attach, attached
from lowkey.models.fingerprint import check_model
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.reading import cache_shape
from lowkey.storage.bucketed import BucketedLayer, Gate, truncate_factors
from lowkey.storage.codec import LowRank

DYNAMIC_PLAN_FORMAT = 1
(DYNAMIC_METHOD,) = DYNAMIC_METHODS  # a dynamic plan is of the only one
DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS, DYNAMIC_PLAN_FILE = (
    "dynaplan.json",
    "dynaplan.safetensors",
    "dynamic-plan",
)
DYNAMIC_PLAN_FIELDS = ("layout", "levels", "share", "divergence", "training", "geometry", "provenance")


@dataclass(frozen=True)
class DynamicPlan:
    """Orthonormal bases of full rank and a gate for every compressed layer.

    Args:
        factors: the maps of full rank, by layer.
        gates: by layer.
        levels: ranks that a token may keep, the widest first.
        layout: whether keys are stored before or after their rotation.
        share: the mean share of coordinates that held-out tokens kept.
        divergence: KL(original || compressed) per held-out token, in nats.
        training: the options of the gates' training.
        geometry: the model's layers, heads and head dim.
        provenance: fingerprints of the model and the data.
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
        """The mean share of coordinates that was asked for, like `50%`."""
        return str(Budget(100 * self.training["target"], "%"))

    def bytes_per_token(self, itemsize: int) -> float:
        """Return the bytes that one more token takes in the compressed layers, on average.

        Positions, which unrotated keys need, are included.

        Args:
            itemsize: bytes of one stored number.
        """
        g = self.geometry
        # Buckets do not keep tokens in order, so unrotated keys need their positions: int32.
        position_bytes = 4 if self.layout == "pre_rope" else 0
        numbers = self.share * 2 * g["kv_heads"] * g["head_dim"]
        return len(self.factors) * (numbers * itemsize + position_bytes)

    def check(self, model: PreTrainedModel) -> None:
        """Check that the plan was made for this model.

        Raises:
            LowkeyError: if the model has another fingerprint or shape.
        """
        known = self.provenance
        check_model("dynamic plan", known.get("model", "?"), known.get("model_sha256"), model, "make it anew")
        shape = families.geometry(model)
        heads = self.geometry["kv_heads"], self.geometry["head_dim"]
        if sorted(self.factors) != list(shape.compressible) or heads != (shape.kv_heads, shape.head_dim):
            raise LowkeyError(
                "dynamic plan does not cover the layers and heads of this model; it is damaged: make it again"
            )
        families.check_layout(model, self.layout)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the folder `path` in one step, as `Plan.save` does.

        Raises:
            LowkeyError: if the folder holds other files or cannot be written.
        """
        folder = Path(path)
        files.check_folder(folder, force, again=DYNAMIC_PLAN_JSON)
        with files.replacing_folder(folder) as temporary:
            checksum = files.write_tensors(
                temporary / DYNAMIC_PLAN_TENSORS, self._tensors(), DYNAMIC_PLAN_FILE
            )
            about = {**self.describe(), "tensors_sha256": checksum}
            files.write_json(temporary / DYNAMIC_PLAN_JSON, about, DYNAMIC_PLAN_FILE)

    def describe(self) -> dict:
        """Return everything but factors and gates, as dynaplan.json holds it."""
        known = {name: getattr(self, name) for name in DYNAMIC_PLAN_FIELDS} | {"layers": sorted(self.factors)}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {
            "format": DYNAMIC_PLAN_FORMAT,
            "method": DYNAMIC_METHOD,
            "budget": self.budget,
            **known,
            "bytes_per_token": sizes,
        }

    def digest(self) -> str:
        """Return a checksum of the maps and gates."""
        return files.digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """Return the down maps, whose transposes are the up maps, and the gates, by name."""
        maps = {
            f"{i}.{name}": getattr(f, name) for i, f in self.factors.items() for name in ("k_down", "v_down")
        }
        gates = {f"{i}.gate.{name}": t for i, gate in self.gates.items() for name, t in vars(gate).items()}
        return {name: t.detach().float().cpu().contiguous() for name, t in (maps | gates).items()}

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> DynamicPlan:
        """Read what `save` wrote.

        Args:
            path: the folder.
            model: if given, the model that the plan must have been made for.

        Raises:
            LowkeyError: for a newer format, a damaged file, NaNs, wrong shapes, or another model.
        """
        folder = Path(path)
        plan = files.read_consistently(folder, lambda: _read(folder))
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
    """Return the plan that a file describes.

    Raises:
        KeyError, TypeError or ValueError: if something is missing or does not fit.
    """
    known = {name: about[name] for name in DYNAMIC_PLAN_FIELDS} | {"levels": tuple(about["levels"])}
    heads, d = cache_shape(about["geometry"])
    if known["layout"] not in list(LAYOUTS):
        raise ValueError(f"layout {known['layout']!r:.40} is not one of {', '.join(LAYOUTS)}")
    levels = about["levels"]
    # The first level is full rank; the others are smaller and each is named once.
    descend = levels and levels[0] == d and sorted(set(levels), reverse=True) == levels
    if not (all(type(r) is int and r > 0 for r in levels) and descend):
        raise ValueError(f"levels {levels} are not descending ranks from the head dim {d} on")
    if not all(t.dtype == torch.float32 for t in tensors.values()):
        raise ValueError("its tensors are not in fp32")
    share, divergence, target = about["share"], about["divergence"], about["training"]["target"]
    if not all(type(n) in (int, float) for n in (share, divergence, target)) or not (
        0 < target <= 1 and 0 <= share <= 1
    ):
        raise ValueError("share, divergence or target is not a number, or out of range")
    layers, count = about["layers"], about["geometry"]["layers"]
    are_indices = (
        isinstance(layers, list) and layers and all(type(i) is int and 0 <= i < count for i in layers)
    )
    if not are_indices or sorted(set(layers)) != layers:
        raise ValueError("layers are not ascending indices")
    if not isinstance(about["provenance"]["model_sha256"], str):
        raise ValueError("provenance names no model")
    factors = {i: _factors(tensors[f"{i}.k_down"], tensors[f"{i}.v_down"], heads, d) for i in layers}
    gates = {
        i: _gate({f.name: tensors[f"{i}.gate.{f.name}"] for f in fields(Gate)}, heads, d, len(levels))
        for i in layers
    }
    if len(tensors) != len(layers) * (2 + len(fields(Gate))):
        raise ValueError("it has tensors that belong to none of its layers")
    return DynamicPlan(factors, gates, **known)


def _factors(k: Tensor, v: Tensor, heads: int, d: int) -> Factors:
    """Return the maps of one layer from its down maps (1|heads, d, d)."""
    for name, down in (("key", k), ("value", v)):
        # One map for all heads, or one for each.
        if tuple(down.shape) not in ((1, d, d), (heads, d, d)) or not is_orthonormal(down):
            raise ValueError(
                f"{name} map of shape {tuple(down.shape)} is not orthonormal, or not for {heads} heads of {d}"
            )
    return Factors(k, k.mT, v, v.mT)


def _gate(parts: dict[str, Tensor], heads: int, d: int, levels: int) -> Gate:
    """Return the gate of one layer from its tensors, whose shapes are checked."""
    # The width of the hidden layer is free; all other sizes follow from the model.
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
    """Return a new cache for one batch of sequences. It cannot be saved.

    Args:
        model: an attached model.
        plan: made for this model.

    Raises:
        LowkeyError: if the model is not attached or the plan is another model's.
    """
    # Without it the model would run on stock attention and ignore the cache's latents.
    if not attached(model):
        raise LowkeyError("model is not attached: call lowkey.attach(model) before make_dynamic_cache")
    plan.check(model)
    return unchecked_dynamic_cache(model, plan)


def unchecked_dynamic_cache(model: PreTrainedModel, plan: DynamicPlan) -> LowkeyCache:
    """Return a new cache for a plan that was checked before: the model's weights are not read again."""

    def layer(i: int) -> BucketedLayer:
        rope = families.rope(model, i)
        codecs = [LowRank(truncate_factors(plan.factors[i], r), plan.layout, rope) for r in plan.levels]
        return BucketedLayer(codecs, plan.gates[i])

    return cache_of(model, layer)


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
    """Fit PCA bases and train gates on a text.

    Args:
        model: a model; it becomes attached.
        tokenizer: the model's tokenizer.
        texts: what to calibrate on. None: the embedded text.
        layout: whether keys are stored before or after their rotation.
        key_bases: one basis of keys for all KV heads of a layer (`shared`), or one for each (`per_head`).
        sample: which windows of the text to use; a quarter of them only judges. None: the defaults.
        training: how to train; `training.target` is the share of coordinates to keep. None: the defaults.
        work: a folder to save progress into and to resume from.
        progress: shows how far it is.

    Raises:
        LowkeyError: for an unsupported model or layout, too short a text, or a target out of reach.
    """
    shape, sample, training = families.geometry(model), sample or Sample(), training or GateTraining()
    if layout not in list(LAYOUTS):
        raise LowkeyError(f"layout {layout!r} is unknown; {nearest_name(layout, LAYOUTS)}")
    families.check_layout(model, layout)
    dynakv.check_target(training.target, shape.head_dim)
    attach(model)
    windows = calibration_windows(model, tokenizer, texts, sample)
    held_out = max(1, round(HELD_OUT_SHARE * len(windows)))
    provenance = provenance_of(model, windows, sample)
    job = {
        "provenance": provenance,
        "layout": layout,
        "key_bases": key_bases,
        "training": asdict(training),
        "batch": sample.batch,
    }
    # Whatever changes the bases or the gates, so that only the same job is resumed.
    work = files.job_folder(work, job)
    # Bases are fitted on the training windows; the held-out ones only judge the gates.
    batches = progress(windows[:-held_out].split(sample.batch), "second moments")
    statistics = gather_statistics(model, batches, work)
    bases = {i: dynakv.pca_bases(s, layout, key_bases) for i, s in statistics.items()}
    trained = dynakv.train_gates(model, bases, windows, held_out, layout, training, progress, work)
    d = shape.head_dim
    return DynamicPlan(
        factors={i: b.at(d, d) for i, b in bases.items()},
        gates={i: gate.to(torch.device("cpu")) for i, gate in trained.gates.items()},
        levels=dynakv.levels_of(d),
        layout=layout,
        share=trained.share,
        divergence=trained.divergence,
        training=asdict(training),
        geometry=asdict(shape),
        provenance=provenance,
    )
