"""`convert`: a trained model in, a `LowkeyForCausalLM` with another attention out."""

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
    HEADS,
    POOLING,
    ConversionOptions,
    Layer,
    RotaryFrequencies,
)
from lowkey.conversion.target import configuration
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families

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
    """The model with another attention, in its dtype, on its device and in eval mode; `model` stays as it is.
    Nothing is trained.

    attention: one of CONVERSIONS. fields: what LowkeyConfig calls the sizes of that kind (CONVERSION_FIELDS lists them);
    gqa needs num_key_value_heads, lrkv lrkv_rank, mea mea_num_component_heads, mla kv_lora_rank;
    attention_layers leaves all other layers as they are (`half` and `deep` are those of arXiv:2601.19611,
    section 5.2). head_norm and mla_kv_norm are off unless given: they change what the model computes.
    moments: of every layer's inputs, as `input_moments` makes them; truncations then lose least of what
    projections make of the inputs, not of their weights.

    Exact, to rounding: mha; gqa and mqa with as many heads as the source has (or a multiple), lrkv of mode
    `full` or `latent` with as many shared heads, or at rank d where keys have no biases; mea with as many
    components as KV heads; mla of a source with one KV head. Other starts lose something: `exactness` says
    what and which fields would lose nothing, `starting_loss` how much. What loses something and stores no
    less than the source is logged as a warning.
    Errors: LowkeyError for a source that our skeleton cannot say, or fields and options that do not go
    together.
    """
    options = options or ConversionOptions()
    config = checked_configuration(model, attention, options, moments is not None, fields)
    start = exactness(model, config)
    if not start.exact and model_bytes_per_token(
        layer_costs(config), model.dtype.itemsize
    ) >= source.full_bytes_per_token(model):
        logging.getLogger(__name__).warning(
            "attention %r stores no less than the source and is %s", attention, start
        )
    made = _empty(config, model)
    state = _outside(model, made)
    rope, gated = _rope(model, made), source.gated(config)
    others = config.others
    for i in progress(range(config.num_hidden_layers), f"converting to {attention}"):
        own, choice = (
            (config, options)
            if others is None or i in config.attention_layers
            else (others, ConversionOptions())
        )
        layer = Layer(
            source.attention_weights_of(model, i),
            own,
            choice,
            rope,
            None if moments is None else moments[i],
            gated,
        )
        _fill(state, made, i, CONVERSIONS[own.attention](layer), source.kept_weights(model, i))
    made.generation_config = model.generation_config
    return made.to(device_of(model)).eval()  # type: ignore[arg-type]


def checked_configuration(
    model: PreTrainedModel,
    attention: str,
    options: ConversionOptions,
    whitened: bool,
    fields: Mapping[str, Any],
) -> LowkeyConfig:
    """The configuration of what `convert` will make, before any work. whitened: with moments. Errors: as in
    `convert`.
    """
    source.check_source(model)
    config = configuration(model, attention, options.frequencies, fields)
    _check_options(model, config, options, whitened)
    return config


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, rows: Tensor, *, batch: int = 4, progress: Progress = silent
) -> InputMoments:
    """By layer, the mean second moment (D + 1, D + 1) of what its projections read and a constant 1, over
    unpadded ids (n, t); fp64.
    """
    source.check_source(model)
    found: InputMoments = {}
    for ids in progress(rows.to(device_of(model)).split(batch), "second moments", -(-len(rows) // batch)):
        hidden = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        for i in range(model.config.num_hidden_layers):
            x = families.attention_input(model, i, hidden[i]).flatten(0, 1).float()
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            found[i] = found.get(i, 0) + (x.mT @ x).double().cpu() / rows.numel()
    return found


def _check_options(
    model: PreTrainedModel, config: LowkeyConfig, options: ConversionOptions, whitened: bool
) -> None:
    kind, stored, narrow = (
        config.attention,
        config.num_key_value_heads,
        config.rope_width not in (0, config.head_dim),
    )
    for name, value, known in (
        ("heads", options.heads, HEADS),
        ("basis", options.basis, BASES),
        ("frequencies", options.frequencies, FREQUENCIES),
    ):
        if value not in known:
            raise LowkeyError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    if options.heads != "mean" and kind not in POOLING:
        raise LowkeyError(f"heads {options.heads!r}: attention {kind!r} pools none; leave it out")
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
    if config.attention not in (*POOLING, "mea"):
        raise LowkeyError(
            f"basis 'aligned': attention {config.attention!r} does not mix heads as they are; leave it out"
        )
    if config.qk_norm:
        raise LowkeyError(
            "basis 'aligned': this model norms its keys after their projection, so that they cannot be "
            "turned; leave it out"
        )
    if source.gated(config):
        raise LowkeyError(
            "basis 'aligned': a gate or norm follows attention, so that values cannot be turned; leave it out"
        )


def _check_normed(model: PreTrainedModel, config: LowkeyConfig) -> None:
    """Norms of keys come after what is pooled or rebuilt in whole heads; elsewhere the parts would be normed,
    not the keys.
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
            "would be normed apart; "
            "use 'gqa', or 'lrkv' with lrkv_rope_mode='full'"
        )


def _empty(config: LowkeyConfig, model: PreTrainedModel) -> LowkeyForCausalLM:
    """A model whose random weights will be written over; torch's random numbers go on as if none had been
    drawn.
    """
    with torch.random.fork_rng(devices=[]):
        made: LowkeyForCausalLM = LowkeyForCausalLM._from_config(config, dtype=model.dtype)
    return made


def _outside(model: PreTrainedModel, made: LowkeyForCausalLM) -> dict[str, Tensor]:
    """Copy all but the attention, and return what is to be filled, by name."""
    state, found = made.state_dict(), families.weights_outside_attention(model)
    wanted = {name for name in state if ".self_attn." not in name}
    if wanted != found.keys():
        name = sorted(wanted ^ found.keys())[0]
        raise LowkeyError(
            f"model of family {model.config.model_type!r}: weight {name!r} has no place in our models, or is "
            "missing"
        )
    for name, value in found.items():
        state[name].copy_(value)
    return state


def _fill(
    state: dict[str, Tensor], made: LowkeyForCausalLM, i: int, new: dict[str, Tensor], kept: dict[str, Tensor]
) -> None:
    """One layer's attention; what the conversion leaves alone is the source's, and ones where only the new
    model has a norm.
    """
    prefix = f"model.layers.{i}.self_attn."
    for name, target in state.items():
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        if own in new or own in kept:
            target.copy_(new[own] if own in new else kept[own])


def _rope(model: PreTrainedModel, made: LowkeyForCausalLM) -> RotaryFrequencies:
    found, rotary = source.frequencies(model), made.model.rotary_emb
    rotary = rotary if made.config.attention_layers is None else rotary.own
    rotary = rotary.narrow if made.config.narrow_rope_width else rotary
    narrow = rotary.inv_freq if made.config.rope_width else found[:0]
    return RotaryFrequencies(found, narrow.detach().double().cpu(), source.rope_scaling(model) ** 2)
