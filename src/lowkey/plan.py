"""The Plan: what calibration decided, as a file that reloads anywhere and refuses what it was not made for."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowkey import files
from lowkey.families import Geometry, check_layout, geometry
from lowkey.fingerprint import model_fingerprint
from lowkey.ops.bases import is_orthonormal
from lowkey.types import LAYOUTS, Factors, Layout, LowkeyError
from lowkey.version import __version__

FORMAT = 1
JSON, TENSORS, CARD = "plan.json", "plan.safetensors", "README.md"


@dataclass(frozen=True)
class Plan:
    """Factors per compressed layer and everything needed to judge them.

    method and allocator: {"name": ..., "parameters": {...}}, verbatim; budget: what was asked for; profile: candidate
    ranks, the error surface and the chosen pairs per layer; provenance: model and data fingerprints, seed, versions.
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

    @property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """(r_K, r_V) per compressed layer."""
        return {i: f.ranks for i, f in self.factors.items()}

    def bytes_per_token(self, itemsize: int) -> int:
        """Predicted bytes that one more token takes in the compressed layers."""
        return sum(k + v for k, v in self.ranks.values()) * self.geometry["kv_heads"] * itemsize

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model, by fingerprint. Errors: LowkeyError."""
        wanted, found = self.provenance.get("model_sha256"), model_fingerprint(model)
        if wanted != found:
            name = self.provenance.get("model", "?")
            raise LowkeyError(f"plan was made for model {name!r} ({str(wanted)[:12]}), this one is {found[:12]}; compress this model anew")
        check_layout(model, self.layout)

    def save(self, path: str | Path) -> None:
        """Write plan.json, plan.safetensors and a model card into the folder `path`, each atomically, the JSON last."""
        folder = Path(path)
        files.write_tensors(folder / TENSORS, self._tensors())
        files.write_text(folder / CARD, card(self))
        files.write_json(folder / JSON, self.describe())

    def describe(self) -> dict:
        """Everything but the factors, as plan.json holds it."""
        names = ("layout", "method", "allocator", "budget", "geometry", "provenance", "profile", "orthonormal", "sinks", "recent")
        ranks = {str(i): list(r) for i, r in self.ranks.items()}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {"format": FORMAT, **{n: getattr(self, n) for n in names}, "ranks": ranks, "bytes_per_token": sizes}

    def _tensors(self) -> dict[str, Tensor]:
        """Orthonormal plans store the down maps only: the up maps are their transposes."""
        names = ("k_down", "v_down") if self.orthonormal else ("k_down", "k_up", "v_down", "v_up")
        return {f"{i}.{n}": getattr(f, n).float() for i, f in self.factors.items() for n in names}

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Plan:
        """Read a plan and hold it to its promises; with `model`, refuse it unless it was made for that model.

        Errors: LowkeyError for a newer format, a damaged or hostile file, NaNs, wrong shapes, another model.
        """
        folder = Path(path)
        meta = files.read_json(folder / JSON, "plan")
        _check_format(meta, folder)
        plan = _build(meta, files.read_tensors(folder / TENSORS, "plan"), folder)
        if model is not None:
            plan.check(model)
            _check_geometry(plan, geometry(model), folder)
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
        names = ("layout", "method", "allocator", "budget", "geometry", "provenance", "profile", "orthonormal", "sinks", "recent")
        fields = {n: meta[n] for n in names}
        ranks = {int(i): (int(k), int(v)) for i, (k, v) in meta["ranks"].items()}
        heads, d = int(fields["geometry"]["kv_heads"]), int(fields["geometry"]["head_dim"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(f"plan.json lacks or garbles a field ({error})") from None
    if fields["layout"] not in LAYOUTS:
        raise refuse(f"layout {fields['layout']!r} is none of {', '.join(LAYOUTS)}")
    if not all(isinstance(fields[n], int) and fields[n] >= 0 for n in ("sinks", "recent")):
        raise refuse("sinks and recent are counts of tokens")
    factors = {}
    for i, rank in ranks.items():
        try:
            factors[i] = _factors(tensors, i, fields["orthonormal"])
        except KeyError as error:
            raise refuse(f"plan.safetensors lacks {error}") from None
        _check_factors(factors[i], rank, heads, d, fields["orthonormal"], refuse)
    return Plan(factors, **fields)


def _factors(tensors: dict[str, Tensor], i: int, orthonormal: bool) -> Factors:
    k_down, v_down = tensors[f"{i}.k_down"], tensors[f"{i}.v_down"]
    if orthonormal:
        return Factors(k_down, k_down.mT.contiguous(), v_down, v_down.mT.contiguous())
    return Factors(k_down, tensors[f"{i}.k_up"], v_down, tensors[f"{i}.v_up"])


def _check_factors(f: Factors, rank: tuple[int, int], heads: int, d: int, orthonormal: bool, refuse) -> None:
    for name, r, down, up in (("key", rank[0], f.k_down, f.k_up), ("value", rank[1], f.v_down, f.v_up)):
        shapes = {(h, d, r) for h in (1, heads)}
        if tuple(down.shape) not in shapes or tuple(up.mT.shape) not in shapes:
            raise refuse(f"{name} factors of shape {tuple(down.shape)} do not fit rank {r} and {heads} heads of {d}")
        if not math.isfinite(float(down.double().sum() + up.double().sum())):
            raise refuse(f"{name} factors hold NaN or infinite numbers")
        if orthonormal and not is_orthonormal(down):
            raise refuse(f"{name} factors are not orthonormal as promised")


def _check_geometry(plan: Plan, found: Geometry, folder: Path) -> None:
    if sorted(plan.factors) != list(found.compressible):
        raise LowkeyError(
            f"plan {str(folder)!r} covers layers {sorted(plan.factors)}, the model compresses {list(found.compressible)}; make it again"
        )


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
