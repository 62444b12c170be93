"""A rank for every token as a part of a plan: the gates that choose it, and how files say so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lowkey.core.types import Factors
from lowkey.storage.bucketed import Gate

TOKEN_RANK_FIELDS = ("levels", "share", "divergence", "training")
GATE_TENSORS = tuple(part.name for part in fields(Gate))
NEED_FIXED_RANKS = ("bits", "policy", "sinks", "recent", "heads")  # fields of a plan
# The folder that `lowkey dynamic` wrote before plans held ranks of tokens. It is read, and never written.
DYNAMIC_PLAN_JSON, DYNAMIC_PLAN_TENSORS = "dynaplan.json", "dynaplan.safetensors"
DYNAMIC_PLAN_FILE, DYNAMIC_PLAN_FORMAT = "dynamic-plan", 1


@dataclass(frozen=True)
class TokenRanks:
    """Gates that choose a rank for every token.

    A token keeps the first coordinates in the plan's maps, which are orthonormal and of full rank.

    Args:
        gates: by layer.
        levels: ranks that a token may keep, the widest first.
        share: the mean share of coordinates that held-out tokens kept.
        divergence: KL(original || compressed) per held-out token, in nats.
        training: the options of the gates' training, of which `target` is the share that was asked for.
    """

    gates: dict[int, Gate]
    levels: tuple[int, ...]
    share: float
    divergence: float
    training: dict

    def describe(self) -> dict:
        """All but the gates, as plan.json holds it."""
        return {name: getattr(self, name) for name in TOKEN_RANK_FIELDS} | {"levels": list(self.levels)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the gates, by their names in plan.safetensors."""
        return {f"{i}.gate.{name}": t for i, gate in self.gates.items() for name, t in vars(gate).items()}


def read_token_ranks(
    stated: dict[str, Any], factors: dict[int, Factors], tensors: dict[str, Tensor]
) -> TokenRanks:
    """The ranks of tokens that the files of a plan describe.

    Args:
        stated: the fields of the plan. All but `token_ranks` are checked.
        factors: the maps of each layer, checked.
        tensors: of the file.

    Raises:
        KeyError, TypeError or ValueError: if something is missing, or does not fit the plan.
    """
    known = {name: stated["token_ranks"][name] for name in TOKEN_RANK_FIELDS}
    heads, d = stated["geometry"]["kv_heads"], stated["geometry"]["head_dim"]
    levels, share, target = known["levels"], known["share"], known["training"]["target"]
    # the first level is full rank; the others are smaller and each is named once
    descend = levels and levels[0] == d and sorted(set(levels), reverse=True) == levels
    if not (all(type(r) is int and r > 0 for r in levels) and descend):
        raise ValueError(f"levels {levels!s:.60} are not descending ranks from the head dim {d} on")
    if not all(type(n) in (int, float) for n in (share, known["divergence"], target)) or not (
        0 < target <= 1 and 0 <= share <= 1
    ):
        raise ValueError("share, divergence or target is not a number, or out of range")
    whole = stated["orthonormal"] and all(f.per_head and f.ranks == (d, d) for f in factors.values())
    if not (factors and whole):
        raise ValueError("its maps are not orthonormal, of full rank and for single heads")
    if extra := [name for name in NEED_FIXED_RANKS if stated[name]]:
        raise ValueError(f"it has {extra[0]}, which need ranks that all tokens share")
    gates = {
        i: _gate({name: tensors[f"{i}.gate.{name}"] for name in GATE_TENSORS}, heads, d, len(levels))
        for i in factors
    }
    return TokenRanks(gates, **known | {"levels": tuple(levels)})


def _gate(parts: dict[str, Tensor], heads: int, d: int, levels: int) -> Gate:
    """The gate of one layer from its tensors, whose shapes are checked. Raises: ValueError."""
    # the width of the hidden layer is free; all other sizes follow from the model
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


def as_plan(about: dict[str, Any]) -> dict[str, Any]:
    """What plan.json would say of the plan that a dynaplan.json describes.

    Raises:
        KeyError, TypeError or ValueError: if something is missing, or does not fit.
    """
    layers, d = about["layers"], about["geometry"]["head_dim"]
    if layers != about["geometry"]["compressible"]:
        raise ValueError("layers are not those of its geometry")
    return {
        **about,
        "method": {"name": about["method"], "parameters": {}},
        "allocator": {"name": "none", "parameters": {}},
        "profile": {},
        "orthonormal": True,
        "sinks": 0,
        "recent": 0,
        "ranks": {str(i): [d, d] for i in layers},
        "token_ranks": {name: about[name] for name in TOKEN_RANK_FIELDS},
    }
