"""The Plan: what calibration decided, as a file that reloads anywhere and refuses what it was not made for."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowkey import files
from lowkey.families import check_layout, geometry
from lowkey.fingerprint import check_model
from lowkey.merging import blocks
from lowkey.ops.bases import is_orthonormal
from lowkey.types import LAYOUTS, Factors, Layout, LowkeyError
from lowkey.version import __version__

FORMAT = 2
FIELDS = ("layout", "method", "allocator", "budget", "geometry", "provenance", "profile", "orthonormal", "sinks", "recent", "heads")
Refusal = Callable[[str], LowkeyError]
MAPS = ("k_down", "k_up", "v_down", "v_up")
JSON, TENSORS, CARD = "plan.json", "plan.safetensors", "README.md"


@dataclass(frozen=True)
class Plan:
    """Factors per compressed layer and everything needed to judge them.

    method and allocator: {"name": ..., "parameters": {...}}, verbatim; budget: what was asked for; profile: candidate
    ranks, the error surface and the chosen pairs per layer; heads: importance of KV heads by kind (`r2`, ...), which HeadKV policies read,
    for every compressed layer; provenance: model and data fingerprints, seed, versions.
    """

    factors: dict[int, Factors]
    layout: Layout
    method: dict
    allocator: dict
    budget: str
    geometry: dict
    provenance: dict
    profile: dict = field(default_factory=dict)
    orthonormal: bool = True
    sinks: int = 0
    recent: int = 0
    heads: dict = field(default_factory=dict)

    @property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """(r_K, r_V) per compressed layer."""
        return {i: f.ranks for i, f in self.factors.items()}

    def bytes_per_token(self, itemsize: int) -> int:
        """Predicted bytes that one more token takes in the compressed layers."""
        return sum(k + v for k, v in self.ranks.values()) * self.geometry["kv_heads"] * itemsize

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model, by fingerprint and by shape. Errors: LowkeyError."""
        known = self.provenance
        check_model("plan", known.get("model", "?"), known.get("model_sha256"), model, "compress this model anew")
        shape = geometry(model)
        if (sorted(self.factors), self.geometry["kv_heads"], self.geometry["head_dim"]) != (
            list(shape.compressible),
            shape.kv_heads,
            shape.head_dim,
        ):
            raise LowkeyError("plan does not cover the layers and heads of this model; it is damaged: make it again")
        check_layout(model, self.layout)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write plan.json, plan.safetensors and a model card as the folder `path`, in one step: all of it or nothing.

        Errors: LowkeyError when `path` holds files that are no plan's (unless `force`), or cannot be written.
        """
        folder = Path(path)
        if not force:
            files.check_ours(folder, {JSON, TENSORS, CARD})
        with files.replacing_folder(folder) as temporary:
            files.write_tensors(temporary / TENSORS, self._tensors())
            files.write_text(temporary / CARD, card(self))
            files.write_json(temporary / JSON, {**self.describe(), "tensors_sha256": files.sha256(temporary / TENSORS)})

    def describe(self) -> dict:
        """Everything but the factors, as plan.json holds it."""
        ranks = {str(i): list(r) for i, r in self.ranks.items()}
        order = {str(i): f.order.tolist() for i, f in self.factors.items() if f.order is not None}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {"format": FORMAT, **{n: getattr(self, n) for n in FIELDS}, "ranks": ranks, "order": order, "bytes_per_token": sizes}

    def _tensors(self) -> dict[str, Tensor]:
        """Orthonormal plans store the down maps only: the up maps are their transposes."""
        names = (*(("k_down", "v_down") if self.orthonormal else MAPS), "k_mean", "v_mean", "frequencies")
        found = {f"{i}.{n}": getattr(f, n) for i, f in self.factors.items() for n in names}
        return {name: t.float().contiguous().clone() for name, t in found.items() if t is not None}  # layers may share maps

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Plan:
        """Read a plan and hold it to its promises; with `model`, refuse it unless it was made for that model.

        Errors: LowkeyError for a newer format, a damaged or hostile file, NaNs, wrong shapes, another model.
        """
        folder = Path(path)
        meta = files.read_json(folder / JSON, "plan")
        _check_format(meta, folder)
        tensors = files.read_tensors(folder / TENSORS, "plan")
        if meta.get("tensors_sha256") != files.sha256(folder / TENSORS):
            raise LowkeyError(
                f"plan {str(folder)!r}: plan.safetensors is not the file that plan.json describes; it is damaged: make it again"
            )
        plan = _build(meta, tensors, folder)
        if model is not None:
            plan.check(model)
        return plan


def _check_format(meta: dict, folder: Path) -> None:
    version = meta.get("format")
    if not isinstance(version, int) or version < 1:
        raise LowkeyError(f"plan {str(folder)!r}: format {version!r} is not a number; it is damaged or not one of ours")
    if version > FORMAT:
        raise LowkeyError(f"plan {str(folder)!r}: format {version} is newer than {FORMAT}, the newest known here; upgrade lowkey")


def _build(meta: dict, tensors: dict[str, Tensor], folder: Path) -> Plan:
    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(f"plan {str(folder)!r}: {rule}; it is damaged: make it again")

    try:
        fields = {n: meta[n] for n in FIELDS if n != "heads"} | {"heads": meta.get("heads", {})}  # the first plans had none
        ranks = {int(i): (int(k), int(v)) for i, (k, v) in meta["ranks"].items()}
        order = {int(i): [int(x) for x in heads] for i, heads in meta.get("order", {}).items()}
        heads, d = fields["geometry"]["kv_heads"], fields["geometry"]["head_dim"]
        str(fields["method"]["name"] + fields["allocator"]["name"]), fields["provenance"]["model_sha256"], fields["profile"].keys()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise refuse(f"plan.json lacks or garbles a field ({error})") from None
    if not ranks or not all(isinstance(n, int) and n > 0 for n in (heads, d)):
        raise refuse("ranks are empty, or kv_heads and head_dim are not counts")
    if fields["layout"] not in LAYOUTS:
        raise refuse(f"layout {fields['layout']!r} is none of {', '.join(LAYOUTS)}")
    if not all(isinstance(fields[n], int) and fields[n] >= 0 for n in ("sinks", "recent")):
        raise refuse("sinks and recent are counts of tokens")
    if not all(1 <= r <= d for pair in ranks.values() for r in pair):
        raise refuse(f"ranks lie between 1 and the head dim {d}")
    _check_heads(fields["heads"], len(ranks), heads, refuse)
    factors = {}
    for i, rank in ranks.items():
        try:
            factors[i] = _factors(tensors, i, fields["orthonormal"], d, order.get(i))
        except KeyError as error:
            raise refuse(f"plan.safetensors lacks {error}") from None
        _check_factors(factors[i], rank, heads, d, fields["orthonormal"], refuse)
    return Plan(factors, **fields)


def _check_heads(found: object, layers: int, heads: int, refuse: Refusal) -> None:
    try:
        tables = [torch.tensor(rows, dtype=torch.float64) for rows in found.values()]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        raise refuse("head importance is no table of numbers") from None
    if not all(t.shape == (layers, heads) and bool((t >= 0).all() & t.isfinite().all()) for t in tables):
        raise refuse(f"head importance is one number of at least 0 for each of {layers} layers and {heads} heads")


def _factors(tensors: dict[str, Tensor], i: int, orthonormal: bool, d: int, order: list[int] | None) -> Factors:
    found = {name: tensors[f"{i}.{name}"] for name in (("k_down", "v_down") if orthonormal else MAPS)}
    if not all(t.ndim == 3 and t.is_floating_point() for t in found.values()):
        raise KeyError(f"floating-point maps of three dimensions for layer {i}")
    if orthonormal:
        found |= {f"{x}_up": blocks(found[f"{x}_down"].mT, max(1, found[f"{x}_down"].shape[1] // d)).contiguous() for x in "kv"}
    k_mean, v_mean, frequencies = (tensors.get(f"{i}.{name}") for name in ("k_mean", "v_mean", "frequencies"))
    return Factors(**found, order=None if order is None else torch.tensor(order), k_mean=k_mean, v_mean=v_mean, frequencies=frequencies)


def _check_factors(f: Factors, rank: tuple[int, int], heads: int, d: int, orthonormal: bool, refuse: Refusal) -> None:
    if f.order is not None and sorted(f.order.tolist()) != list(range(heads)):
        raise refuse(f"order of heads {f.order.tolist()} does not name each of {heads} heads once")
    own = f.frequencies
    if own is not None and not (own.shape == (rank[0] // 2,) and f.merge[0] == 1 and bool(own.isfinite().all())):
        raise refuse(f"frequencies of shape {tuple(own.shape)} do not fit rank {rank[0]} of single heads")
    for name, r, down, up, mean in (("key", rank[0], f.k_down, f.k_up, f.k_mean), ("value", rank[1], f.v_down, f.v_up, f.v_mean)):
        if (tuple(down.shape), tuple(up.shape)) not in _shapes(heads, d, r):
            raise refuse(f"{name} factors of shape {tuple(down.shape)} do not fit rank {r} and {heads} heads of {d}")
        if mean is not None and tuple(mean.shape) != (heads, d):
            raise refuse(f"{name} means of shape {tuple(mean.shape)} do not fit {heads} heads of {d}")
        numbers = down.double().sum() + up.double().sum() + (0 if mean is None else mean.double().sum())
        if not math.isfinite(float(numbers)):
            raise refuse(f"{name} factors hold NaN or infinite numbers")
        if orthonormal and not is_orthonormal(down):
            raise refuse(f"{name} factors are not orthonormal as promised")


def _shapes(heads: int, d: int, r: int) -> Sequence[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of (down, up) that fit: heads by themselves, each map shared or not, or so many side by side as divide them all."""
    single = [((i, d, r), (j, r, d)) for i in (1, heads) for j in (1, heads)]
    return single + [((heads // t, t * d, t * r), (heads, t * r, d)) for t in range(2, heads + 1) if heads % t == 0]


def versions() -> dict[str, str]:
    return {
        "lowkey": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def card(plan: Plan) -> str:
    """A model card in Markdown."""
    g, known = plan.geometry, plan.provenance
    full, held = 4 * g["kv_heads"] * g["head_dim"] * len(plan.factors), plan.bytes_per_token(2)
    rows = "\n".join(f"| {i} | {k} | {v} |" for i, (k, v) in plan.ranks.items())
    return f"""# KV-cache plan for {known.get("model")}

Made by lowkey {known.get("versions", {}).get("lowkey")}: method `{plan.method["name"]}`, allocator `{plan.allocator["name"]}`,
layout `{plan.layout}`, budget {plan.budget}. In bfloat16 it keeps {held} of {full} bytes per token ({100 * held / full:.1f} %)
in {len(plan.factors)} layers of {g["kv_heads"]} KV heads x {g["head_dim"]}; {plan.sinks} sink and {plan.recent} recent tokens stay exact.

```python
lowkey.attach(model)
plan = lowkey.Plan.load("THIS FOLDER", model)
model.generate(**inputs, past_key_values=lowkey.make_cache(model, plan=plan))
```

| layer | key rank | value rank |
|---|---|---|
{rows}

Calibrated on {known.get("tokens")} tokens (sha256 `{str(known.get("data_sha256"))[:16]}`, seed {known.get("seed")}).
"""
