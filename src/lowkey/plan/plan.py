"""The plan: what calibration decided, as a folder that loads anywhere and refuses other models."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core import files
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import LAYOUTS, Factors, Layout, LowkeyError
from lowkey.models.families import check_layout, geometry
from lowkey.models.fingerprint import check_model
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.window_bytes import CacheBytes
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_or_none
from lowkey.version import __version__

PLAN_FORMAT = 3
PLAN_FIELDS = (  # of plan.json, beside ranks, order of heads and checksums
    "layout",
    "method",
    "allocator",
    "budget",
    "geometry",
    "provenance",
    "profile",
    "orthonormal",
    "sinks",
    "recent",
    "heads",
    "bits",
)
Refusal = Callable[[str], LowkeyError]
"""Makes the error for a plan that breaks a rule."""
MAPS = ("k_down", "k_up", "v_down", "v_up")
PLAN_JSON, PLAN_TENSORS, PLAN_CARD, PLAN_FILE = "plan.json", "plan.safetensors", "README.md", "plan"
FACTOR_TENSORS = (*MAPS, "k_mean", "v_mean", "frequencies")  # of a layer
LARGEST_SIZE = 2**20  # of layers, heads and widths of a model
LONGEST_NAME = 1000  # characters of a name


@dataclass(frozen=True)
class Plan:
    """The low-rank maps of every compressed layer, and where they come from.

    Args:
        factors: the maps of each compressed layer, by layer index.
        layout: whether keys are stored rotated.
        method: that fitted the maps, {"name": ..., "parameters": {...}}.
        allocator: that chose the ranks, in the same form.
        budget: that was asked for, as text.
        geometry: the shapes of the model, as `models.families.Geometry` has them.
        provenance: fingerprints of model and data, seed and versions.
        profile: candidate ranks, the error at each, and the chosen ranks, for every layer.
        orthonormal: whether the maps back are the transposes of the maps into the latents.
        sinks: number of sinks that caches keep exactly.
        recent: number of recent tokens that caches keep exactly.
        heads: for each kind of head score (`r2`, ...), the scores of the KV heads of every compressed layer,
            which HeadKV policies read.
        bits: the packing of latents, as `make_cache` takes it; None for the model's dtype.
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
    bits: str | None = None

    @property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """(r_K, r_V) per compressed layer."""
        return {i: f.ranks for i, f in self.factors.items()}

    def bytes_per_token(self, itemsize: int) -> float:
        """The predicted bytes that one more token adds to the compressed layers."""
        whole = self.cache_bytes(itemsize, 1)
        total = sum(
            whole.latent_token_bytes(0, f.merge[0], f.k_down.shape[-1])
            + whole.latent_token_bytes(1, f.merge[1], f.v_down.shape[-1])
            for f in self.factors.values()
        )
        return int(total) if total == int(total) else total  # packed latents may take a part of a byte

    def cache_bytes(self, itemsize: int, tokens: int) -> CacheBytes:
        """The bytes of a cache of so many tokens in the compressed layers, given the bytes of a number."""
        g, exact = self.geometry, Exact(self.sinks, self.recent)
        return CacheBytes(
            len(self.factors),
            g["kv_heads"],
            g["head_dim"],
            itemsize,
            exact,
            scheme_or_none(self.bits),
            tokens,
        )

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the plan was not made for, by fingerprint and by shape.

        Raises:
            LowkeyError: for such a model.
        """
        # by fingerprint first: its message says which model the plan is for
        known = self.provenance
        check_model(
            "plan", known.get("model", "?"), known.get("model_sha256"), model, "compress this model anew"
        )
        shape = geometry(model)
        if (sorted(self.factors), self.geometry["kv_heads"], self.geometry["head_dim"]) != (
            list(shape.compressible),
            shape.kv_heads,
            shape.head_dim,
        ):
            raise LowkeyError(
                "plan does not cover the layers and heads of this model; it is damaged: make it again"
            )
        check_layout(model, self.layout)

    def save(self, path: str | Path, force: bool = False) -> str:
        """Write the plan as a folder, in one step.

        The folder holds plan.json, plan.safetensors and a card. Another plan of lowkey's is replaced.

        Args:
            path: the folder.
            force: whether to replace another folder that lowkey wrote, too.

        Returns:
            The checksum of everything but the card.

        Raises:
            LowkeyError: if the folder holds anything else, or cannot be written.
        """
        folder = Path(path)
        files.check_folder(folder, force, again=PLAN_JSON)
        with files.replacing_folder(folder) as temporary:
            checksum = files.write_tensors(temporary / PLAN_TENSORS, self._tensors(), PLAN_FILE)
            files.write_text(temporary / PLAN_CARD, plan_card(self))
            return files.write_json(
                temporary / PLAN_JSON, {**self.describe(), "tensors_sha256": checksum}, PLAN_FILE
            )

    def describe(self) -> dict:
        """The plan without its maps, as plan.json holds it."""
        ranks = {str(i): list(r) for i, r in self.ranks.items()}
        order = {str(i): f.order.tolist() for i, f in self.factors.items() if f.order is not None}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {
            "format": PLAN_FORMAT,
            **{n: getattr(self, n) for n in PLAN_FIELDS},
            "ranks": ranks,
            "order": order,
            "bytes_per_token": sizes,
        }

    def digest(self) -> str:
        """A checksum of the maps."""
        return files.digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of plan.safetensors, by name.

        Orthonormal plans store the maps into the latents only; the maps back are their transposes.
        """
        names = (*(("k_down", "v_down") if self.orthonormal else MAPS), "k_mean", "v_mean", "frequencies")
        tensors = {f"{i}.{n}": getattr(f, n) for i, f in self.factors.items() for n in names}
        # clones, since layers may share maps, and a safetensors file refuses shared memory
        return {name: t.float().contiguous().clone() for name, t in tensors.items() if t is not None}

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Plan:
        """Load a plan and check all that it says.

        Args:
            path: the folder.
            model: the model that the plan must have been made for, or None.

        Raises:
            LowkeyError: for a newer format, a damaged or hostile file, NaN, wrong shapes, or another model.
        """
        folder = Path(path)
        plan = files.read_consistently(folder, lambda: _read(folder))
        if model is not None:
            plan.check(model)
        return plan


def _read(folder: Path) -> Plan:
    """Read a plan. Nothing that its files say is used before it is checked."""
    meta = files.read_json(
        folder / PLAN_JSON,
        "plan",
        PLAN_FILE,
        PLAN_FORMAT,
        source="give the folder that lowkey compress wrote",
    )

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(f"plan {str(folder)!r}: {rule}; it is damaged: make it again")

    # types first: whatever the file says, it must not end in a traceback
    try:
        fields = {n: meta[n] for n in PLAN_FIELDS if n not in ("heads", "bits")}
        fields |= {"heads": meta.get("heads", {}), "bits": meta.get("bits")}  # older plans had none
        ranks = {_index(i): pair for i, pair in meta["ranks"].items()}
        order = {_index(i): heads for i, heads in meta.get("order", {}).items()}
        heads, d = cache_shape(fields["geometry"])
        checksum = meta["tensors_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise refuse(f"plan.json lacks or garbles a field ({error})") from None
    # shapes of tensors are checked against these fields, so the fields come first
    if rule := _flaw(fields) or _flaw_of_ranks(ranks, order, fields["geometry"]):
        raise refuse(rule)
    _check_heads(fields["heads"], len(ranks), heads, refuse)
    tensors, factors = files.read_tensors(folder / PLAN_TENSORS, "plan", PLAN_FILE, checksum), {}
    for i, (k, v) in ranks.items():
        try:
            factors[i] = _factors(tensors, i, fields["orthonormal"], d, order.get(i))
        except (KeyError, RuntimeError) as error:
            raise refuse(f"plan.safetensors lacks or garbles {error}") from None
        _check_factors(factors[i], (k, v), heads, d, fields["orthonormal"], refuse)
    known = {f"{i}.{name}" for i in ranks for name in FACTOR_TENSORS}
    if extra := set(tensors) - known:
        raise refuse(f"plan.safetensors holds {min(extra)!r:.60}, which is of none of its layers")
    return Plan(factors, **fields)


def _index(written: str) -> int:
    """A layer's index from its name in a file. Raises: ValueError."""
    if not (written.isascii() and written.isdecimal() and str(int(written)) == written):
        raise ValueError(f"{written!r:.20} is no layer")
    return int(written)


def cache_shape(geometry: dict) -> tuple[int, int]:
    """The KV heads and the head dim of a model, as a file describes it.

    Raises:
        KeyError, TypeError or ValueError: for what no model can be.
    """
    for name in ("layers", "heads", "kv_heads", "head_dim", "hidden"):
        if type(geometry[name]) is not int or not 1 <= geometry[name] <= LARGEST_SIZE:
            raise ValueError(f"{name} {geometry[name]!r:.40} of geometry is no count")
    if geometry["heads"] % geometry["kv_heads"]:
        raise ValueError("heads of geometry are no multiple of kv_heads")
    return geometry["kv_heads"], geometry["head_dim"]


def _flaw(fields: dict) -> str | None:
    """The first field of plan.json that does not hold what its name says; None if all do."""
    if fields["layout"] not in list(LAYOUTS):
        return f"layout {fields['layout']!r:.40} is none of {', '.join(LAYOUTS)}"
    if type(fields["orthonormal"]) is not bool:
        return "orthonormal is neither true nor false"
    for name in ("method", "allocator"):
        if not (
            isinstance(fields[name], dict)
            and _is_name(fields[name].get("name"))
            and isinstance(fields[name].get("parameters"), dict)
        ):
            return f"{name} has no name or no parameters"
    try:
        scheme_or_none(None if fields["bits"] is None else str(fields["bits"])[:60])
    except LowkeyError as error:
        return f"bits are none of ours ({error})"
    if not (fields["bits"] is None or isinstance(fields["bits"], str)):
        return "bits are no text"
    if not _is_name(fields["budget"]):
        return "budget is no text"
    for name in ("provenance", "profile"):
        if not isinstance(fields[name], dict):
            return f"{name} is no object"
    known = fields["provenance"]
    if not all(
        isinstance(known.get(name, kind()), kind) for name, kind in (("model", str), ("versions", dict))
    ):
        return "provenance garbles a field"
    if not isinstance(known.get("model_sha256"), str):
        return "provenance names no model"
    try:
        Exact(fields["sinks"], fields["recent"])
    except (LowkeyError, TypeError) as error:
        return f"sinks and recent are counts of tokens ({error})"
    if not type(fields["sinks"]) is type(fields["recent"]) is int:  # `Exact` takes a bool for an int
        return "sinks and recent are counts of tokens"
    return None


def _is_name(value: object) -> bool:
    """Whether this is text that can be shown."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _flaw_of_ranks(ranks: dict, order: dict, geometry: dict) -> str | None:
    """The first rule that ranks or orders of heads break, or None."""
    heads, d = geometry["kv_heads"], geometry["head_dim"]
    if not ranks or max(ranks) >= geometry["layers"]:
        return "ranks are empty, or of a layer that the model does not have"
    for pair in ranks.values():
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(type(r) is int and 1 <= r <= d for r in pair)
        ):
            return f"ranks lie between 1 and the head dim {d}"
    for own in order.values():
        if not (
            isinstance(own, list) and all(type(i) is int for i in own) and sorted(own) == list(range(heads))
        ):
            return f"order of heads {own!s:.60} does not name each of {heads} heads once"
    return None


def _check_heads(scores: Any, layers: int, heads: int, refuse: Refusal) -> None:
    """Check head scores: one finite number of at least 0 for each KV head. Raises: LowkeyError."""
    try:
        tables = [torch.tensor(rows, dtype=torch.float64) for rows in scores.values()]
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        raise refuse("head importance is no table of numbers") from None
    if not all(t.shape == (layers, heads) and bool((t >= 0).all() & t.isfinite().all()) for t in tables):
        raise refuse(
            f"head importance is one number of at least 0 for each of {layers} layers and {heads} heads"
        )


def _factors(
    tensors: dict[str, Tensor], i: int, orthonormal: bool, d: int, order: list[int] | None
) -> Factors:
    """The maps of layer `i` from the tensors of a file. Raises: KeyError if one is missing."""
    maps = {name: tensors[f"{i}.{name}"] for name in (("k_down", "v_down") if orthonormal else MAPS)}
    if not all(t.ndim == 3 and t.dtype == torch.float32 for t in maps.values()):
        raise KeyError(f"fp32 maps of three dimensions for layer {i}")
    if orthonormal:
        # the maps back are transposes, one for each head where heads share a latent
        for x in "kv":
            down = maps[f"{x}_down"]
            maps[f"{x}_up"] = per_head_maps(down.mT, max(1, down.shape[1] // d)).contiguous()
    k_mean, v_mean, frequencies = (tensors.get(f"{i}.{name}") for name in ("k_mean", "v_mean", "frequencies"))
    return Factors(
        **maps,
        order=None if order is None else torch.tensor(order),
        k_mean=k_mean,
        v_mean=v_mean,
        frequencies=frequencies,
    )


def _check_factors(
    f: Factors, rank: tuple[int, int], heads: int, d: int, orthonormal: bool, refuse: Refusal
) -> None:
    """Check the maps of a layer against its ranks and the model's heads. Raises: LowkeyError."""
    own = f.frequencies
    if own is not None and not (
        own.shape == (rank[0] // 2,) and f.merge[0] == 1 and bool(own.isfinite().all())
    ):
        raise refuse(f"frequencies of shape {tuple(own.shape)} do not fit rank {rank[0]} of single heads")
    for name, r, down, up, mean in (
        ("key", rank[0], f.k_down, f.k_up, f.k_mean),
        ("value", rank[1], f.v_down, f.v_up, f.v_mean),
    ):
        if not _fit(tuple(down.shape), tuple(up.shape), heads, d, r):
            raise refuse(
                f"{name} factors of shape {tuple(down.shape)} do not fit rank {r} and {heads} heads of {d}"
            )
        if mean is not None and tuple(mean.shape) != (heads, d):
            raise refuse(f"{name} means of shape {tuple(mean.shape)} do not fit {heads} heads of {d}")
        if orthonormal and not is_orthonormal(down):
            raise refuse(f"{name} factors are not orthonormal as promised")


def _fit(down: tuple[int, ...], up: tuple[int, ...], heads: int, d: int, r: int) -> bool:
    """Whether maps of these shapes fit the heads of a model.

    Either each head has a latent, with maps of its own or shared by all; or every t heads share one, where t
    divides the heads and r is the width of the latent divided by t, rounded up.
    """
    t = max(1, down[1] // d)
    if t == 1:  # shapes (1 or heads, d, r) and (1 or heads, r, d)
        return down[0] in (1, heads) and up[0] in (1, heads) and (down[1:], up[1:]) == ((d, r), (r, d))
    width = down[2]  # of a shared latent; shapes (heads / t, t d, width) and (heads, width, d)
    return (
        heads % t == 0
        and -(-width // t) == r
        and (down, up) == ((heads // t, t * d, width), (heads, width, d))
    )


def versions() -> dict[str, str]:
    """The versions of lowkey, torch, transformers and Python."""
    return {
        "lowkey": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def bytes_kept(plan: Plan) -> str:
    """Say in words what the latents keep, and what the whole cache holds, in bfloat16.

    The cache has the length that the budget was counted for.
    """
    g, latents, at = plan.geometry, plan.bytes_per_token(2), plan.profile.get("at")
    full = 4 * g["kv_heads"] * g["head_dim"] * len(plan.factors)
    kept = f"latents keep {latents:.12g} of {full} bytes per token in bfloat16 ({100 * latents / full:.1f} %)"
    if type(at) is not int or at < 1 or (whole := plan.cache_bytes(2, at)).is_uniform:
        return kept
    return (
        f"{kept}; a cache of {at} tokens, with {plan.sinks} sinks and {whole.recent_tokens} recent tokens "
        f"exact, holds {100 * whole.cache_share(latents):.1f} % of the full cache"
    )


def plan_card(plan: Plan) -> str:
    """The card of a plan, in Markdown."""
    g, known = plan.geometry, plan.provenance
    rows = "\n".join(f"| {i} | {k} | {v} |" for i, (k, v) in plan.ranks.items())
    version = known.get("versions", {}).get("lowkey")
    return f"""# KV-cache plan for {known.get("model")}

Made by lowkey {version}: method `{plan.method["name"]}`, allocator `{plan.allocator["name"]}`,
layout `{plan.layout}`, latents in {plan.bits or "the model's own numbers"}, budget {plan.budget}.
In {len(plan.factors)} layers of {g["kv_heads"]} KV heads x {g["head_dim"]} its {bytes_kept(plan)}.

```python
lowkey.attach(model)
plan = lowkey.Plan.load("THIS FOLDER", model)
model.generate(**inputs, past_key_values=lowkey.make_cache(model, plan=plan))
```

| layer | key rank | value rank |
|---|---|---|
{rows}

Calibrated on {known.get("tokens")} tokens
(sha256 `{str(known.get("data_sha256"))[:16]}`, seed {known.get("seed")}).
"""
