"""The configuration of the new model: the source's decoder with another attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.attention import SUBSETS, LowkeyConfig
from lowkey.conversion import source
from lowkey.core.types import LowkeyError
from lowkey.models import families

# Fields that the new model has from its source: everything but the attention.
# fmt: off
SKELETON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)
# fmt: on
# Fields that stay if the source is a model of ours.
KEPT_OF_OUR_OWN = ("q_lora_rank", "attn_output_gate", "head_norm", "mla_latent_scale", "decode")
COMMON: dict[str, type] = {"attention_layers": list, "head_norm": str, "decode": str}
CONVERSION_FIELDS: dict[str, dict[str, type]] = {  # what may be said of each kind; the rest is the source's
    "mha": COMMON,
    "gqa": {"num_key_value_heads": int, **COMMON},
    "mqa": COMMON,
    "lrkv": {
        "lrkv_rank": int,
        "num_key_value_heads": int,
        "lrkv_rope_mode": str,
        "qk_rope_head_dim": int,
        **COMMON,
    },
    "mea": {"mea_num_component_heads": int, **COMMON},
    "mla": {
        "kv_lora_rank": int,
        "qk_rope_head_dim": int,
        "qk_nope_head_dim": int,
        "mla_rotate": bool,
        "mla_kv_norm": bool,
        **COMMON,
    },
}
NEEDED_FIELDS = {
    "gqa": "num_key_value_heads",
    "lrkv": "lrkv_rank",
    "mea": "mea_num_component_heads",
    "mla": "kv_lora_rank",
}


def configuration(
    model: PreTrainedModel, kind: str, frequencies: str, fields: Mapping[str, Any]
) -> LowkeyConfig:
    """The configuration of the new model.

    Args:
        model: the source.
        kind: attention kind.
        frequencies: `ConversionOptions.frequencies`.
        fields: fields of `LowkeyConfig` that were given.

    Raises:
        LowkeyError: a field that is not one of this kind, one that is missing, or what `LowkeyConfig`
            refuses.
    """
    _check_fields(model.config, kind, fields)
    config = model.config
    given = {name: getattr(config, name) for name in SKELETON} | {"head_dim": families.head_dim(config)}
    given |= {name: getattr(config, name) for name in KEPT_OF_OUR_OWN if families.is_own(config)}
    given |= {
        "attention": kind,
        "attention_bias": source.has_biases(model),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "qk_norm": families.family(config).normed and kind != "mla",
        "rope_parameters": _rope(config),
    }
    if kind == "mea":
        given |= {"num_key_value_heads": families.stored_heads(config)}
        # The source has no norm after attention: with one the start would not be exact.
        given["head_norm"] = given.get("head_norm") or "none"
    if kind == "mla":
        given |= {"mla_kv_norm": False, "qk_rope_head_dim": given["head_dim"]}
    if "attention_layers" in fields:  # the others stay what they are
        given["other_attention"] = {
            "attention": "gqa",
            "num_key_value_heads": families.stored_heads(config),
            "qk_norm": given["qk_norm"],
            "head_norm": given.get("head_norm", "none") if families.is_own(config) else "none",
            "rope_parameters": given["rope_parameters"],
        }
    config = _made(given | dict(fields))
    _check_widths(model, config)
    if frequencies == "high" and config.rope_width not in (0, config.head_dim):
        rope = _highest(given["rope_parameters"], config)
        config = _made(given | dict(fields) | {"rope_parameters": rope})
    return config


def _made(given: dict[str, Any]) -> LowkeyConfig:
    """The configuration of these fields.

    Raises:
        LowkeyError: `LowkeyConfig` refuses them.
    """
    try:
        return LowkeyConfig(**copy.deepcopy(given))
    except Exception as error:  # strict dataclasses raise kinds of their own
        message = " ".join(str(error.__cause__ or error).split()).rstrip(". ")
        raise LowkeyError(f"attention {given['attention']!r}: {message}") from error


def _check_fields(config: PreTrainedConfig, kind: str, fields: Mapping[str, Any]) -> None:
    """Check the fields that were given for a kind.

    Raises:
        LowkeyError: an unknown kind, or fields that it does not have, needs or allows.
    """
    if kind not in CONVERSION_FIELDS:
        raise LowkeyError(
            f"attention {kind!r}: there is no conversion into it; choose one of "
            f"{', '.join(CONVERSION_FIELDS)}"
        )
    for name, value in fields.items():
        if name not in CONVERSION_FIELDS[kind]:
            near = get_close_matches(name, CONVERSION_FIELDS[kind], 1)
            raise LowkeyError(
                f"field {name!r} is not one of attention {kind!r}: "
                f"{f'did you mean {near[0]!r}?' if near else _list(kind)}"
            )
        if type(value) is not CONVERSION_FIELDS[kind][name] and not (
            name == "attention_layers" and value in SUBSETS
        ):
            raise LowkeyError(
                f"field {name} {value!r}: must be of type {CONVERSION_FIELDS[kind][name].__name__}"
            )
    if kind in NEEDED_FIELDS and NEEDED_FIELDS[kind] not in fields:
        needed = NEEDED_FIELDS[kind]
        raise LowkeyError(f"attention {kind!r} needs {needed}; give it, like {needed}={_like(config, kind)}")
    if kind == "lrkv" and "qk_rope_head_dim" in fields and fields.get("lrkv_rope_mode") != "partial":
        raise LowkeyError(
            f"qk_rope_head_dim {fields['qk_rope_head_dim']}: is for lrkv_rope_mode='partial'; leave it out"
        )
    if "head_norm" in fields and source.gated(config) and fields["head_norm"] != config.head_norm:
        raise LowkeyError(
            f"head_norm {fields['head_norm']!r}: the source has {config.head_norm!r}, which stays; leave it "
            "out"
        )


def _like(config: PreTrainedConfig, kind: str) -> int:
    """A size that could be given: fewer heads than the source has, if there is such a number that divides
    them; or half a head.
    """
    stored = families.stored_heads(config)
    if kind == "mea":
        return max(1, stored - 1)
    fewer = [n for n in range(1, stored) if stored % n == 0]
    return (fewer[-1] if fewer else 1) if kind == "gqa" else families.head_dim(config) // 2


def _list(kind: str) -> str:
    """The remedy that lists the fields of a kind."""
    return f"give one of {', '.join(CONVERSION_FIELDS[kind])}"


def _check_widths(model: PreTrainedModel, config: LowkeyConfig) -> None:
    """Check what the configuration allows and a conversion does not.

    Raises:
        LowkeyError: a width or rank beyond the source's, or a narrow slice under frequencies that change with
            the length.
    """
    kind, d, e = config.attention, config.head_dim, config.rope_width
    if kind == "lrkv" and config.lrkv_rank > d:
        raise LowkeyError(
            f"lrkv_rank {config.lrkv_rank}: must be at most the head dim {d}, at which nothing is lost"
        )
    if kind == "mea" and config.mea_num_component_heads > config.num_key_value_heads:
        raise LowkeyError(
            f"mea_num_component_heads {config.mea_num_component_heads}: must be at most the source's "
            f"{config.num_key_value_heads} KV heads"
        )
    if kind == "mla" and config.kv_lora_rank > (most := 2 * d * (families.stored_heads(model.config))):
        raise LowkeyError(
            f"kv_lora_rank {config.kv_lora_rank}: must be at most {most}, the source's own cache, at which "
            "nothing is lost"
        )
    if e > d or (e == 0 and kind == "lrkv"):
        raise LowkeyError(f"qk_rope_head_dim {e}: must be at least 2 and at most the source's head dim {d}")
    if kind == "lrkv" and config.lrkv_rope_mode == "partial" and e == d:
        raise LowkeyError(
            f"qk_rope_head_dim {e}: the low-rank part would reach none of {d} channels; give less, or "
            "lrkv_rope_mode='full'"
        )
    if kind == "mla" and config.qk_nope_head_dim not in (d, d - e):
        raise LowkeyError(
            f"qk_nope_head_dim {config.qk_nope_head_dim}: give {d} or {d - e}, the channels that are not "
            "rotated"
        )
    narrow = e < d or (
        config.attention == "lrkv" and config.lrkv_rope_mode == "latent" and config.lrkv_rank < d
    )
    # Such frequencies are computed for the whole width of a head; a narrow slice would get others.
    changing = config.rope_parameters.get("rope_type") in families.LENGTH_DEPENDENT_ROPE
    if narrow and e and changing:
        raise LowkeyError(
            f"rope_type {config.rope_parameters['rope_type']!r}: has frequencies for heads of width {d} "
            "alone; use a kind that rotates whole heads, like 'gqa', 'mea' or 'lrkv' with "
            "lrkv_rope_mode='full'"
        )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters of the source, without the one that says that all channels are rotated."""
    parameters = copy.deepcopy(dict(config.rope_parameters))
    return {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}


def _highest(rope: dict[str, Any], config: LowkeyConfig) -> dict[str, Any]:
    """Rotary parameters whose base gives a narrow slice the source's highest frequencies, one after another,
    rather than evenly spaced ones.
    """
    return rope | {"rope_theta": rope["rope_theta"] ** (config.rope_width / config.head_dim)}
