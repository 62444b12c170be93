"""`convert`: from a trained model to a `LowkeyForCausalLM` with another attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, layer_costs, model_bytes_per_token
from lowkey.conversion import source
from lowkey.conversion.exactness import exactness
from lowkey.conversion.kinds import (
    BASES,
    CONVERSIONS,
    FREQUENCIES,
    HEAD_POOLINGS,
    POOLING,
    ConversionOptions,
    Layer,
    RotaryFrequencies,
)
from lowkey.conversion.target import configuration
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families
from lowkey.models.projections import weights_outside_attention

InputMoments = dict[int, Tensor]


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    attention: str,
    *,
    options: ConversionOptions | None = None,
    moments: InputMoments | None = None,
    progress: Progress = silent,
    **fields: Any,
) -> LowkeyForCausalLM:
    """Make the same model with another attention. Nothing is trained, and `model` does not change.

    Exact, up to rounding: `mha`; `gqa` and `mqa` with as many heads as the source has, or a multiple; `lrkv`
    of mode `full` or `latent` with as many shared heads, or at rank d where keys have no biases; `mea` with
    as many components as KV heads; `mla` of a source with one KV head. Other conversions lose something:
    `exactness` says what, and which fields would lose nothing; `starting_loss` says how much. A conversion
    that loses something and stores no less than the source logs a warning.

    Args:
        model: the source.
        attention: attention kind, a name of `CONVERSIONS`.
        options: how heads become fewer.
        moments: second moments of each layer's inputs, as `input_moments` makes them. Truncations then lose
            least of what projections make of the inputs, rather than of their weights.
        progress: shows progress over layers.
        fields: fields of `LowkeyConfig` for this kind (`CONVERSION_FIELDS` lists them). Needed are
            num_key_value_heads for gqa, lrkv_rank for lrkv, mea_num_component_heads for mea and kv_lora_rank
            for mla. attention_layers converts some layers only (`half` and `deep` are those of
            arXiv:2601.19611, section 5.2). head_norm and mla_kv_norm are off unless they are given, since
            they change what the model computes.

    Returns:
        The new model, in the source's dtype, on its device, in evaluation mode.

    Raises:
        LowkeyError: a source that our decoder cannot express, or fields and options that do not go together.
    """
    options = options or ConversionOptions()
    config = checked_configuration(model, attention, options, moments is not None, fields)
    start = exactness(model, config)
    stored = model_bytes_per_token(layer_costs(config), model.dtype.itemsize)
    if not start.exact and stored >= source.full_bytes_per_token(model):
        logging.getLogger(__name__).warning(
            "attention %r stores no less than the source and is %s", attention, start
        )
    made = _empty(config, model)
    # The state dict shares its tensors with the model, which is thus filled by writing into it.
    state = _outside(model, made)
    rope, gated = _rope(model, made), source.gated(config)
    others = config.others
    for i in progress(range(config.num_hidden_layers), f"converting to {attention}"):
        if others is None or i in (config.attention_layers or ()):
            own, choice = config, options
        else:  # a layer that stays as it is
            own, choice = others, ConversionOptions()
        layer = Layer(
            source.read_attention(model, i),
            own,
            choice,
            rope,
            None if moments is None else moments[i],
            gated,
        )
        _fill(state, made, i, CONVERSIONS[own.attention](layer), source.kept_weights(model, i))
    made.generation_config = model.generation_config
    moved: Any = made  # upstream wraps `to` in a way that types do not follow
    return moved.to(device_of(model)).eval()


def checked_configuration(
    model: PreTrainedModel,
    attention: str,
    options: ConversionOptions,
    whitened: bool,
    fields: Mapping[str, Any],
) -> LowkeyConfig:
    """The configuration of the model that `convert` would make. Nothing is computed.

    Args:
        model: the source.
        attention: attention kind.
        options: how heads become fewer.
        whitened: whether moments will be given.
        fields: fields of `LowkeyConfig`.

    Raises:
        LowkeyError: as `convert` does.
    """
    source.check_source(model)
    config = configuration(model, attention, options.frequencies, fields)
    _check_options(model, config, options, whitened)
    return config


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, rows: Tensor, *, batch: int = 4, progress: Progress = silent
) -> InputMoments:
    """Second moments of the inputs of each layer's projections.

    Args:
        model: the source.
        rows: ids (n, t) without padding.
        batch: rows that are read at a time.
        progress: shows progress over batches.

    Returns:
        By layer, the mean second moment (D + 1, D + 1) of the inputs and a constant 1, in fp64.
    """
    source.check_source(model)
    moments: InputMoments = {}
    for ids in progress(rows.to(device_of(model)).split(batch), "second moments", -(-len(rows) // batch)):
        hidden = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        for i in range(model.config.num_hidden_layers):
            x = families.attention_input(model, i, hidden[i]).flatten(0, 1).float()
            # The constant gives biases their place in the moment: they are weights of one more input.
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            moments[i] = moments.get(i, 0) + (x.mT @ x).double().cpu() / rows.numel()
    return moments


def _check_options(
    model: PreTrainedModel, config: LowkeyConfig, options: ConversionOptions, whitened: bool
) -> None:
    """Check that options suit the kind and the source.

    Raises:
        LowkeyError: an option is unknown, or does not suit them.
    """
    kind, stored = config.attention, config.num_key_value_heads
    narrow = config.rope_width not in (0, config.head_dim)
    for name, value, known in (
        ("heads", options.heads, HEAD_POOLINGS),
        ("basis", options.basis, BASES),
        ("frequencies", options.frequencies, FREQUENCIES),
    ):
        if value not in known:
            raise LowkeyError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    if options.heads != "mean" and kind not in POOLING:
        raise LowkeyError(f"heads {options.heads!r}: attention {kind!r} pools no heads; leave it out")
    if options.frequencies != "high" and not narrow:
        raise LowkeyError(
            f"frequencies {options.frequencies!r}: heads are rotated whole or not at all; leave it out"
        )
    if options.basis == "aligned":
        _check_aligned(model, config)
    if families.family(model.config).normed:
        _check_normed(model, config)
    if whitened and kind not in ("lrkv", "mea", "mla") and options.basis == "weights":
        raise LowkeyError(
            f"moments (--whiten): attention {kind!r} is made from weights alone; leave them out, or align "
            "heads (basis 'aligned')"
        )
    if options.basis == "aligned" and kind != "mea" and (model.config.num_key_value_heads or stored) % stored:
        raise LowkeyError(
            f"basis 'aligned': the source's {model.config.num_key_value_heads} KV heads are no multiple of "
            f"{stored}"
        )


def _check_aligned(model: PreTrainedModel, config: LowkeyConfig) -> None:
    """Refuse aligned heads where they would change what the model computes, or have no use.

    Raises:
        LowkeyError: the reason.
    """
    if config.attention not in (*POOLING, "mea"):
        raise LowkeyError(
            f"basis 'aligned': attention {config.attention!r} does not mix heads as they are; leave it out"
        )
    if config.qk_norm:
        raise LowkeyError(
            "basis 'aligned': this model norms its keys after their projection, so that they cannot be "
            "aligned; leave it out"
        )
    if source.gated(config):
        raise LowkeyError(
            "basis 'aligned': a gate or norm follows attention, so that values cannot be aligned; leave it "
            "out"
        )


def _check_normed(model: PreTrainedModel, config: LowkeyConfig) -> None:
    """Check a source that norms its keys.

    Such a norm follows the projection of whole heads. A kind that pools or rebuilds whole heads can keep it;
    any other would norm parts of keys separately.

    Raises:
        LowkeyError: the kind is not of the first sort.
    """
    kind = config.attention
    whole = (
        kind in ("mha", "gqa", "mqa")
        or (kind == "lrkv" and config.lrkv_rope_mode == "full")
        or (kind == "mea" and config.mea_num_component_heads == config.num_key_value_heads)
    )
    if not whole:
        mode = f" with lrkv_rope_mode {config.lrkv_rope_mode!r}" if kind == "lrkv" else ""
        raise LowkeyError(
            f"attention {kind!r}{mode}: this model norms its keys after their projection, and parts of keys "
            "would be normed apart; use 'gqa', or 'lrkv' with lrkv_rope_mode='full'"
        )


def _empty(config: LowkeyConfig, model: PreTrainedModel) -> LowkeyForCausalLM:
    """A model whose random weights will be overwritten. torch's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        made: LowkeyForCausalLM = LowkeyForCausalLM._from_config(config, dtype=model.dtype)
    return made


def _outside(model: PreTrainedModel, made: LowkeyForCausalLM) -> dict[str, Tensor]:
    """Copy all weights outside attention.

    Args:
        model: the source.
        made: the new model.

    Returns:
        The state dict of the new model, whose tensors are filled in place.

    Raises:
        LowkeyError: the two models do not have the same weights outside attention.
    """
    state, weights = made.state_dict(), weights_outside_attention(model)
    expected = {name for name in state if ".self_attn." not in name}
    if expected != weights.keys():
        name = sorted(expected ^ weights.keys())[0]
        raise LowkeyError(
            f"model of family {model.config.model_type!r}: weight {name!r} has no place in our models, or is "
            "missing"
        )
    for name, value in weights.items():
        state[name].copy_(value)
    return state


def _fill(
    state: dict[str, Tensor], made: LowkeyForCausalLM, i: int, new: dict[str, Tensor], kept: dict[str, Tensor]
) -> None:
    """Fill the attention of one layer.

    Args:
        state: the state dict of the new model.
        i: the layer.
        new: what the conversion made, by name within the attention.
        kept: what stays the source's. Norms that only the new model has keep their ones.
    """
    prefix = f"model.layers.{i}.self_attn."
    for name, target in state.items():
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        if own in new or own in kept:
            target.copy_(new[own] if own in new else kept[own])


def _rope(model: PreTrainedModel, made: LowkeyForCausalLM) -> RotaryFrequencies:
    """Rotary frequencies of the source and of the new model."""
    frequencies, rotary = source.frequencies(model), made.model.rotary_emb
    # The new model may have a rotary embedding for each of two kinds of layers, and a second one for latents.
    rotary = rotary if made.config.attention_layers is None else rotary.own
    rotary = rotary.narrow if made.config.narrow_rope_width else rotary
    narrow = rotary.inv_freq if made.config.rope_width else frequencies[:0]
    return RotaryFrequencies(frequencies, narrow.detach().double().cpu(), source.rope_scaling(model) ** 2)
