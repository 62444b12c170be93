"""Reads a plan's folder. Nothing that its files say is used before it is checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowkey.core import files
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import LAYOUTS, Factors, LowkeyError
from lowkey.ops.bases import is_orthonormal
from lowkey.plan.token_ranks import (
    DYNAMIC_PLAN_FILE,
    DYNAMIC_PLAN_FORMAT,
    DYNAMIC_PLAN_JSON,
    DYNAMIC_PLAN_TENSORS,
    GATE_TENSORS,
    as_plan,
    read_token_ranks,
)
from lowkey.policies import policy_from_dict
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_or_none

PLAN_FORMAT = 4
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
    "policy",
    "token_ranks",
)
SINCE_LATER_FORMATS: dict[str, Any] = {  # what older plans lack
    "heads": {},
    "bits": None,
    "policy": None,
    "token_ranks": None,
}
Refusal = Callable[[str], LowkeyError]
"""Makes the error for a plan that breaks a rule."""
MAPS = ("k_down", "k_up", "v_down", "v_up")
PLAN_JSON, PLAN_TENSORS, PLAN_CARD, PLAN_FILE = "plan.json", "plan.safetensors", "README.md", "plan"
FACTOR_TENSORS = (*MAPS, "k_mean", "v_mean", "frequencies")  # of a layer
LARGEST_SIZE = 2**20  # of layers, heads and widths of a model
LONGEST_NAME = 1000  # characters of a name


def read_plan(folder: Path) -> tuple[dict[int, Factors], dict[str, Any]]:
    """Read a plan.

    Returns:
        The maps of each compressed layer, and the other fields of `lowkey.Plan`.

    Raises:
        LowkeyError: for a newer format, a damaged or hostile file, NaN, or shapes that do not fit together.
    """
    is_former = not os.path.exists(folder / PLAN_JSON) and os.path.exists(folder / DYNAMIC_PLAN_JSON)
    words, numbers, kind, newest = (
        (DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS, DYNAMIC_PLAN_FILE, DYNAMIC_PLAN_FORMAT)
        if is_former
        else (PLAN_JSON, PLAN_TENSORS, PLAN_FILE, PLAN_FORMAT)
    )
    meta = files.read_json(
        folder / words, "plan", kind, newest, source="give the folder that lowkey compress wrote"
    )

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(f"plan {str(folder)!r}: {rule}; it is damaged: make it again")

    try:
        meta = as_plan(meta) if is_former else meta
        fields = {n: meta[n] for n in PLAN_FIELDS if n not in SINCE_LATER_FORMATS}
        fields |= {n: meta.get(n, usual) for n, usual in SINCE_LATER_FORMATS.items()}
        ranks = {_index(i): pair for i, pair in meta["ranks"].items()}
        order = {_index(i): heads for i, heads in meta.get("order", {}).items()}
        heads, d = _cache_shape(fields["geometry"])
        layers = [_layer(i, fields["geometry"]) for i in fields["geometry"]["compressible"]]
        checksum = str(meta["tensors_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise refuse(f"{words} lacks or garbles a field ({error!s:.200})") from None
    # shapes of tensors are checked against these fields, so the fields come first
    if rule := _flaw(fields) or _flaw_of_ranks(ranks, order, fields["geometry"]):
        raise refuse(rule)
    if not layers or layers != sorted(set(layers)):
        raise refuse("geometry does not name its layers once each, in their order")
    if ranks and sorted(ranks) != layers:
        raise refuse("ranks are not those of the layers of its geometry")
    _check_heads(fields["heads"], len(layers), heads, refuse)
    tensors, factors = files.read_tensors(folder / numbers, "plan", kind, checksum), {}
    if other := [name for name, t in tensors.items() if t.dtype != torch.float32]:
        raise refuse(f"{min(other)!r:.60} of {numbers} is not in float32, as all that is saved")
    for i, (k, v) in ranks.items():
        try:
            factors[i] = _factors(tensors, i, fields["orthonormal"], d, order.get(i))
        except (KeyError, RuntimeError) as error:
            raise refuse(f"{numbers} lacks or garbles {error}") from None
        _check_factors(factors[i], (k, v), heads, d, fields["orthonormal"], refuse)
    known = {f"{i}.{name}" for i in ranks for name in FACTOR_TENSORS}
    if fields["token_ranks"] is not None:
        try:
            fields["token_ranks"] = read_token_ranks(fields, factors, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise refuse(f"ranks of tokens: {error!s:.200}") from None
        known |= {f"{i}.gate.{name}" for i in ranks for name in GATE_TENSORS}
    if extra := set(tensors) - known:
        raise refuse(f"{numbers} holds {min(extra)!r:.60}, which is of none of its layers")
    return factors, fields


def _index(written: str) -> int:
    """A layer's index from its name in a file. Raises: ValueError."""
    if not (written.isascii() and written.isdecimal() and str(int(written)) == written):
        raise ValueError(f"{written!r:.20} is no layer")
    return int(written)


def _layer(index: object, geometry: dict) -> int:
    """The index of a layer that geometry names. Raises: ValueError."""
    if type(index) is not int or not 0 <= index < geometry["layers"]:
        raise ValueError(f"{index!r:.20} of geometry is no layer")
    return index


def _cache_shape(geometry: dict) -> tuple[int, int]:
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
    if fields["policy"] is not None:
        try:
            policy_from_dict(fields["policy"])
        except LowkeyError as error:
            return f"its policy is none of ours ({error})"
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
    return (
        None
        if type(fields["sinks"]) is type(fields["recent"]) is int
        else "sinks and recent are counts of tokens"
    )


def _is_name(value: object) -> bool:
    """Whether this is text that can be shown."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _flaw_of_ranks(ranks: dict, order: dict, geometry: dict) -> str | None:
    """The first rule that ranks or orders of heads break, or None."""
    heads, d = geometry["kv_heads"], geometry["head_dim"]
    if ranks and max(ranks) >= geometry["layers"]:
        return "ranks are of a layer that the model does not have"
    for pair in ranks.values():
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(type(r) is int and 1 <= r <= d for r in pair)
        ):
            return f"ranks lie between 1 and the head dim {d}"
    for found in order.values():
        if not (
            isinstance(found, list)
            and all(type(i) is int for i in found)
            and sorted(found) == list(range(heads))
        ):
            return f"order of heads {found!s:.60} does not name each of {heads} heads once"
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
    found = {name: tensors[f"{i}.{name}"] for name in (("k_down", "v_down") if orthonormal else MAPS)}
    if not all(t.ndim == 3 for t in found.values()):
        raise KeyError(f"maps of three dimensions for layer {i}")
    if orthonormal:
        for x in "kv":
            down = found[f"{x}_down"]
            found[f"{x}_up"] = per_head_maps(down.mT, max(1, down.shape[1] // d)).contiguous()
    k_mean, v_mean, frequencies = (tensors.get(f"{i}.{name}") for name in ("k_mean", "v_mean", "frequencies"))
    return Factors(
        **found,
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
    if own is not None and not (own.shape == (rank[0] // 2,) and f.merge[0] == 1):
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
    if t == 1:
        return down[0] in (1, heads) and up[0] in (1, heads) and (down[1:], up[1:]) == ((d, r), (r, d))
    width = down[2]
    return (
        heads % t == 0
        and -(-width // t) == r
        and (down, up) == ((heads // t, t * d, width), (heads, width, d))
    )
