"""The model of a recipe's [model] table, new or from a folder. The loop does not know which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowkey.core.errors import on_one_line
from lowkey.core.options import nearest_name, shown
from lowkey.core.text import vocabulary
from lowkey.core.types import LowkeyError
from lowkey.models import families, loading

# Fields of [model] that must be whole numbers.
# fmt: off
SIZE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings",
)
# fmt: on
WIDEST = 2**16  # a rank, a head's width or a number of heads


def validate(table: Mapping[str, Any]) -> str:
    """Check a [model] table before any work.

    Returns:
        The model type, or `path` for a model from a folder.

    Raises:
        LowkeyError: an empty table, an unknown type or field, or a size that cannot be meant.
    """
    if not table:
        raise LowkeyError(
            "recipe: [model] is empty; give at least hidden_size and num_hidden_layers, or a model to "
            "`pretrain`"
        )
    if "path" in table:
        if len(table) > 1:
            extra = next(name for name in table if name != "path")
            raise LowkeyError(f"model.{extra}: a model from model.path has it already; drop one of the two")
        return "path"
    kind = str(table.get("model_type", families.FROM_SCRATCH))
    if "attention" in table:
        if "model_type" in table:
            raise LowkeyError(
                f"model.model_type {kind!r}: a model with attention {table['attention']!r} is lowkey's own; "
                "drop one of the two"
            )
        from lowkey.attention import LowkeyConfig, register  # adds the kind to transformers' tables

        register()
        kind = LowkeyConfig.model_type
    if kind not in CONFIG_MAPPING:
        raise LowkeyError(f"model.model_type {kind!r} is unknown; {_near_kind(kind)}")
    known = sorted({f.name for f in fields(CONFIG_MAPPING[kind])} | {"model_type"})
    for name in table:
        if name not in known:
            raise LowkeyError(
                f"field {name!r} of [model] is unknown to {kind!r}; {nearest_name(name, known)}"
            )
    _check_sizes(table)
    return kind


def _check_sizes(table: Mapping[str, Any]) -> None:
    """Refuse sizes that transformers accepts and nobody means.

    Raises:
        LowkeyError: such a size.
    """
    for name in SIZE_FIELDS:
        most = 10_000 if name == "num_hidden_layers" else 2**24
        if name in table and not (type(table[name]) is int and 1 <= table[name] <= most):
            raise LowkeyError(
                f"model.{name} {shown(table[name])}: must be a whole number of at least 1 and at most {most}"
            )
    for name, value in table.items():
        if name.endswith(("_rank", "_dim", "_heads")) and type(value) is int and value > WIDEST:
            raise LowkeyError(f"model.{name} {shown(value)}: must be at most {WIDEST}; give less")
    heads, kv_heads = table.get("num_attention_heads"), table.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise LowkeyError(
            f"model.num_key_value_heads {kv_heads}: must divide the {heads} attention heads; give a divisor, "
            "or leave it out"
        )
    for name, value in table.items():
        if name.endswith("dropout") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise LowkeyError(f"model.{name} {shown(value)}: must be a number from 0 and below 1")
        if isinstance(value, float) and not math.isfinite(value):
            raise LowkeyError(f"model.{name} {value}: must be a finite number; leave it out for the default")
        if name in ("dtype", "torch_dtype"):
            raise LowkeyError(
                f"model.{name} {value!r}: weights are trained in fp32; leave it out, and see "
                "training.precision"
            )


def build(table: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedModel:
    """The model of a recipe, in fp32: with random weights from torch's random numbers as they stand, or from
    a folder to be trained further.

    Args:
        table: `path` alone, a folder or a Hub id (`lowkey convert` writes such folders); or fields of the
            config class, which is ours where `attention` is given, and otherwise that of `model_type`
            (default `llama`). vocab_size, ids of special tokens and max_position_embeddings come from the
            tokenizer and `length` if they are not given.
        tokenizer: the tokenizer of the data.
        length: tokens of a row.

    Raises:
        LowkeyError: an unknown field, or values that the config class or the model refuses.
    """
    kind = validate(table)
    if kind == "path":
        model, _ = loading.load(str(table["path"]), "float32", "cpu")
        model.set_attn_implementation("sdpa")  # nothing of ours stands between training and the fused kernels
        return model
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = None if pad in (bos, eos) else pad  # transformers would never train the embedding of such a token
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    given = {"vocab_size": vocabulary(tokenizer), "max_position_embeddings": length, **ids, **table}
    given.pop("model_type", None)
    config = _made(kind, given)
    check_reads(config, tokenizer, length)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # every class of models fails in its own way
        raise LowkeyError(
            f"recipe: no model can be made of [model]: {on_one_line(error, 300)}; change it"
        ) from error


def check_reads(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Check that a model can read rows of this length by this tokenizer.

    Raises:
        LowkeyError: it has too few ids or positions.
    """
    rows, needed = config.vocab_size, vocabulary(tokenizer)
    longest = families.configured_positions(config) or length
    if rows < needed:
        raise LowkeyError(
            f"model.vocab_size {rows}: the tokenizer's ids go up to {needed - 1}; leave it out, or give at "
            f"least {needed}"
        )
    if longest < length:
        raise LowkeyError(f"training.length {length}: the model has {longest} positions; give at most that")


def _near_kind(kind: str) -> str:
    """A remedy for an unknown model type."""
    near = get_close_matches(kind, list(CONFIG_MAPPING), 1)
    return (
        f"did you mean {near[0]!r}?"
        if near
        else "give one of transformers' decoders, like 'llama', or leave it out"
    )


def _made(kind: str, given: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of these fields.

    Raises:
        LowkeyError: its class refuses them.
    """
    try:
        return AutoConfig.for_model(kind, **given)
    except LowkeyError:
        raise
    except Exception as error:  # each config class checks in its own way
        raise LowkeyError(
            f"recipe: [model] is refused: {on_one_line(error.__cause__ or error, 300)}; change it"
        ) from error
