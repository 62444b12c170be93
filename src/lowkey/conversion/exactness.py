"""Whether a conversion computes what its source does, and with which fields it would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.attention import GROUPED, LowkeyConfig
from lowkey.conversion import source
from lowkey.models import families


@dataclass(frozen=True)
class Exactness:
    """Whether a conversion is exact, up to rounding.

    Args:
        exact: whether it is.
        why: what is lost, or None.
        instead: an attention kind and fields that lose nothing, of the same kind where it has an exact form;
            or None.
    """

    exact: bool
    why: str | None = None
    instead: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.exact or self.instead is None:
            return "exact, to rounding"
        fields = " ".join(f"{name}={_written(value)}" for name, value in self.instead.items())
        return f"not exact: {self.why}; exact with {fields}"


def exactness(model: PreTrainedModel, config: LowkeyConfig) -> Exactness:
    """Whether converting `model` into `config` is exact.

    This is judged by shapes and not by luck: a rank that happens to suffice for these weights counts as too
    low.

    Args:
        model: the source.
        config: the configuration, as `checked_configuration` makes it.
    """
    stored = families.stored_heads(model.config)
    why, exact = _lost(model, config, stored)
    changed = {} if config.head_norm == _head_norm(model.config) else {"head_norm": _head_norm(model.config)}
    if changed:
        why = f"head_norm {config.head_norm!r} norms what the source does not" + (
            f", and {why}" if why else ""
        )
    return Exactness(False, why, exact | changed) if why else Exactness(True)


def _lost(model: PreTrainedModel, config: LowkeyConfig, stored: int) -> tuple[str | None, dict[str, Any]]:
    """What the fields of the kind lose, or None, and fields that lose nothing."""
    kind, groups, d = config.attention, config.num_key_value_heads, config.head_dim
    grouped: dict[str, Any] = {"attention": "gqa", "num_key_value_heads": stored}
    if kind in GROUPED:
        lost = f"{groups} stored heads stand for the source's {stored}" if groups % stored else None
        same = {"attention": kind} | ({"num_key_value_heads": groups} if kind == "gqa" else {})
        return lost, grouped if groups % stored else same
    if kind == "mea":
        count = config.mea_num_component_heads or stored
        lost = f"{count} component heads stand for the source's {stored}" if count < stored else None
        return lost, {"attention": kind, "mea_num_component_heads": stored}
    return _lost_mla(config, stored, grouped) if kind == "mla" else _lost_lrkv(model, config, stored, d)


def _lost_lrkv(
    model: PreTrainedModel, config: LowkeyConfig, stored: int, d: int
) -> tuple[str | None, dict[str, Any]]:
    """The same for lrkv."""
    groups, rank, mode = config.num_key_value_heads, config.lrkv_rank, config.lrkv_rope_mode
    # With a multiple of the source's heads, shared heads are the source's and nothing is left for latents.
    shared = groups % stored == 0
    exact = {"attention": "lrkv", "lrkv_rank": rank, "lrkv_rope_mode": "full" if mode == "partial" else mode}
    exact["num_key_value_heads"] = groups if shared else stored
    if mode == "partial":
        return f"mode 'partial' rotates {config.rope_width} of {d} channels", exact
    if shared:
        return None, exact
    heads = f"{groups} shared head{'s' if groups > 1 else ''} for the source's {stored}"
    # In mode `latent` the latent holds channels of keys, d of them; in mode `full` a rank of the weights
    # suffices.
    if rank < (min(d, config.hidden_size) if mode == "full" else d):
        return f"rank {rank} of {d} is left to {heads}", exact
    return (
        (f"keys have biases, of which {heads} hold the mean", exact)
        if source.key_biases(model)
        else (None, exact)
    )


def _lost_mla(
    config: LowkeyConfig, stored: int, grouped: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The same for mla."""
    d, e, c = config.head_dim or 0, config.rope_width, config.kv_lora_rank or 0
    if stored > 1:
        return f"one rotated slice stands for the rotated keys of {stored} heads", grouped
    faults = [
        (e < d, f"the rotated slice has {e} of {d} channels"),
        (not config.mla_rotate, "the slice is not rotated"),
        (c < min(d, config.hidden_size), f"a latent of {c} holds values of {d}"),
        (config.mla_kv_norm, "the latent is normed"),
    ]
    exact = {"kv_lora_rank": max(c, d), "qk_rope_head_dim": d, "mla_rotate": True, "mla_kv_norm": False}
    return "; ".join(text for fault, text in faults if fault) or None, {"attention": "mla", **exact}


def _head_norm(config: PreTrainedConfig) -> str:
    """The head norm of the source."""
    return config.head_norm if families.is_own(config) else "none"


def _written(value: object) -> str:
    """A value as it is written in a configuration."""
    return str(value).lower() if isinstance(value, bool) else str(value)
