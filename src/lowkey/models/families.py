"""The only module that knows architectures.

It says which decoders are supported, where their parts are, how they rotate, and how to run one layer alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.attention import GROUPED, LowkeyConfig
from lowkey.attention.rotary import rotary
from lowkey.core.types import Layout, LowkeyError


@dataclass(frozen=True)
class Family:
    """How one architecture differs from Llama.

    Args:
        pre_norm: whether the attention block reads `input_layernorm(hidden)`, and not the residual stream
            itself as in OLMo 2.
        rope_per_layer_type: whether the rotary module takes the layer type as a third argument (Gemma 3).
        fused_qkv: whether one `qkv_proj` makes queries, keys and values, in this order (Phi-3).
        fused_mlp: whether one `gate_up_proj` makes the gate and what it multiplies, in this order (Phi-3).
        normed: whether queries and keys pass a norm between their projection and their rotation.
        norm_spans_heads: whether that norm is one over all heads of a token (OLMo 2), and not over each head.
        block_norms: norms of a layer beside those of queries and keys.
        biased: whether the projections of queries, keys and values always have a bias (Qwen 2).
        no_conversion: why `lowkey.conversion` cannot write it in the decoder of `lowkey.attention`; empty if
            it can.
    """

    pre_norm: bool = True
    rope_per_layer_type: bool = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    normed: bool = False
    norm_spans_heads: bool = False
    block_norms: int = 2
    biased: bool = False
    no_conversion: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(biased=True),
    "qwen3": Family(normed=True),
    "phi3": Family(fused_qkv=True, fused_mlp=True),
    "gemma2": Family(block_norms=4, no_conversion="it scales its embeddings and caps its scores"),
    "gemma3_text": Family(
        rope_per_layer_type=True,
        normed=True,
        block_norms=4,
        no_conversion="it scales its embeddings and has norms of its own",
    ),
    "granite": Family(no_conversion="it scales embeddings, residuals and logits"),
    "olmo2": Family(
        pre_norm=False,
        normed=True,
        norm_spans_heads=True,
        no_conversion="its norms stand after the blocks",
    ),
}

REFUSED = {
    "deepseek_v2": "its latent attention (MLA) already stores one joint latent",
    "deepseek_v3": "its latent attention (MLA) already stores one joint latent",
    "qwen3_next": "its linear-attention layers keep a recurrent state, not keys and values",
    "gpt_oss": "its attention sinks (s_aux) are not honoured yet",
    "qwen2_vl_text": "an image's tokens have positions on three axes (M-RoPE), which are not followed yet",
    "qwen2_5_vl_text": "an image's tokens have positions on three axes (M-RoPE), which are not followed yet",
}

# Those of REFUSED whose parameters and cache can be counted all the same (`lowkey cost`).
LATENT = ("deepseek_v2", "deepseek_v3")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rope types whose frequencies change with the length
OWN_TYPE = LowkeyConfig.model_type
# Families whose layers an engine can be told to store by a plan, and the classes that engines know them by.
SERVED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
# Those that engines know, too, and that take no plan there yet.
NOT_SERVED = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
FROM_SCRATCH = "llama"  # what `pretrain` trains if a recipe names no model type


@dataclass(frozen=True)
class Geometry:
    """The shapes of a decoder's cache.

    Args:
        layers: number of decoder layers.
        heads: query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: width of a head.
        hidden: width of the residual stream.
        compressible: the indices of the layers with full attention. Sliding layers stay stock.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    compressible: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    def full_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token of the compressible layers in a stock cache, given the bytes of a number."""
        return len(self.compressible) * 2 * self.kv_heads * self.head_dim * itemsize


def family(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises:
        LowkeyError: for one that is not supported.
    """
    kind = config.get_text_config().model_type
    if is_own(config):
        return Family(normed=config.get_text_config().qk_norm)
    if kind in FAMILIES:
        return FAMILIES[kind]
    nearest = ", ".join(difflib.get_close_matches(kind, FAMILIES, 3, 0.3)) or "none"
    reason = REFUSED.get(kind, f"nearest supported: {nearest}")
    raise LowkeyError(
        f"model of family {kind!r} is not supported ({reason}); supported families: {', '.join(FAMILIES)}"
    )


def is_own(config: PreTrainedConfig) -> bool:
    """Whether the model is one of `lowkey.attention`."""
    return config.get_text_config().model_type == OWN_TYPE


def convertible() -> list[str]:
    """The families that `lowkey.conversion` can write in the decoder of `lowkey.attention`."""
    return [*(name for name, family in FAMILIES.items() if not family.no_conversion), OWN_TYPE]


def check_convertible(config: PreTrainedConfig) -> None:
    """Refuse a family that is not among `convertible`. Raises: LowkeyError."""
    kind = config.model_type
    if kind in convertible():
        return
    reason = FAMILIES[kind].no_conversion if kind in FAMILIES else REFUSED.get(kind, "it is not known here")
    raise LowkeyError(
        f"model of family {kind!r} cannot be converted: {reason}; families that can: "
        f"{', '.join(convertible())}"
    )


def stores_own_form(config: PreTrainedConfig) -> bool:
    """Whether a model's cache holds something else than rotated keys and values of every head.

    No cache of ours can then take its place.
    """
    config = config.get_text_config()
    if not is_own(config):
        return False
    return (
        config.attention not in GROUPED
        or config.attention_layers is not None
        or config.q_lora_rank is not None
    )


def plain_architecture(config: PreTrainedConfig) -> str | None:
    """The class of SERVED that computes the same as one of our own models, from the same weights.

    Returns:
        Its name; None if there is none, or the model is not one of ours.
    """
    config = config.get_text_config()
    if not is_own(config) or stores_own_form(config) or not linear_output(config):
        return None
    if not config.qk_norm:
        return SERVED["llama"]
    # with norms of queries and keys, this family has no biases behind them
    return None if config.attention_bias or config.mlp_bias else SERVED["qwen3"]


def linear_output(config: PreTrainedConfig) -> bool:
    """Whether attention is followed by nothing but a linear map, so that value maps can be folded into it."""
    config = config.get_text_config()
    return not is_own(config) or not (config.attn_output_gate or config.head_norm != "none")


def stores_latents(config: PreTrainedConfig) -> bool:
    """Whether this is a family of LATENT, whose cache holds a latent in the place of keys and values."""
    return config.get_text_config().model_type in LATENT


def geometry(model: PreTrainedModel) -> Geometry:
    """The shapes of a model whose cache can be compressed. Raises: LowkeyError, as `configured_geometry`."""
    return configured_geometry(model.config)


def configured_geometry(config: PreTrainedConfig) -> Geometry:
    """As `geometry`, from a config alone.

    Raises:
        LowkeyError: as `configured_shapes`, and for a model without any layer of full attention.
    """
    shape, config = configured_shapes(config), config.get_text_config()
    if not shape.compressible:
        raise LowkeyError(
            f"model of family {config.model_type!r} has only sliding-window layers "
            f"(sliding_window={config.sliding_window}); "
            "their cache is bounded already: use a model with full-attention layers"
        )
    return shape


def sliding_layers(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """For every sliding layer, (tokens that it holds at most, numbers that one of them takes)."""
    return configured_sliding_layers(model.config)


def configured_sliding_layers(config: PreTrainedConfig) -> tuple[tuple[int, int], ...]:
    """As `sliding_layers`, from a config alone."""
    shape = configured_shapes(config)  # all layers of a supported family have the same heads
    window = int(getattr(config.get_text_config(), "sliding_window", None) or 1)
    # the newest token sees itself and window - 1 others, which are what a layer holds between calls
    held = (window - 1, 2 * shape.kv_heads * shape.head_dim)
    return (held,) * (shape.layers - len(shape.compressible))


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model was made for; None if its config does not say."""
    return configured_positions(model.config)


def configured_positions(config: PreTrainedConfig) -> int | None:
    """As `max_positions`, from a config alone."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if type(positions) is int else None


def readable_length(model: PreTrainedModel, length: int) -> int:
    """`length`, or the number of positions that the model was made for if that is smaller."""
    return min(length, max_positions(model) or length)


def shapes(model: PreTrainedModel) -> Geometry:
    """The shapes of a model's cache. Raises: LowkeyError, as `configured_shapes`."""
    return configured_shapes(model.config)


def configured_shapes(config: PreTrainedConfig) -> Geometry:
    """The shapes of a cache, from a config alone.

    Raises:
        LowkeyError: for unsupported families, and models that store something else than keys and values.
    """
    family(config)
    config = config.get_text_config()
    if stores_own_form(config):
        raise LowkeyError(
            f"model with attention {config.attention!r} already stores a small form of its own, which plans, "
            "policies and bits do not "
            "read; use it with the full cache, or pretrain with attention 'mha', 'gqa' or 'mqa'"
        )
    kinds = layer_types(config)
    return Geometry(
        layers=len(kinds),
        heads=config.num_attention_heads,
        kv_heads=stored_heads(config),
        head_dim=head_dim(config),
        hidden=config.hidden_size,
        compressible=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    )


def stored_heads(config: PreTrainedConfig) -> int:
    """The number of KV heads of a layer."""
    return config.num_key_value_heads or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """The width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config: PreTrainedConfig) -> Sequence[str]:
    """The type of every layer, like `full_attention`, as transformers' own caches infer it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model."""
    return model.get_decoder().layers


def attention_input(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """What the query, key and value projections of a layer read, given the layer's input (b, t, D)."""
    block: Any = decoder_layers(model)[layer]
    return block.input_layernorm(hidden) if family(model.config).pre_norm else hidden


@dataclass(frozen=True)
class Rope:
    """The model's own rotary embedding, for positions of choice.

    Args:
        module: the rotary module.
        layer_type: the type of layer to ask it for; None if it does not depend on that.
    """

    module: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None

    def embeddings(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (b, s, p), in the dtype of `like`, as the decoder layer wants them."""
        args = (like, positions) if self.layer_type is None else (like, positions, self.layer_type)
        cos_and_sin = self.module(*args)
        # with several devices, the rotary module need not be on the device of this layer
        return (
            cos_and_sin if cos_and_sin[0].device == like.device else send_to_device(cos_and_sin, like.device)
        )

    def __call__(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (b, 1, s, p) in fp32, rounded as the model rounds them for `like`."""
        cos, sin = self.embeddings(positions, like)[:2]
        return cos.float().unsqueeze(1), sin.float().unsqueeze(1)


def rope(model: PreTrainedModel, layer: int) -> Rope:
    """The rotary embedding of a layer."""
    config = model.config.get_text_config()
    kind = layer_types(config)[layer] if family(config).rope_per_layer_type else None
    return Rope(rotary_module(model), kind)


def rotated_width(model: PreTrainedModel) -> int:
    """How many of the first channels of a head are rotated, in layers with full attention."""
    own = rope(model, geometry(model).compressible[0])
    position = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return own(position, torch.empty(0, device=model.device))[0].shape[-1]


def head_sizes(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(KV heads, query heads of each, channels of a head, how many of these are rotated)."""
    shape = geometry(model)
    return shape.kv_heads, shape.groups, shape.head_dim, rotated_width(model)


def rotary_module(model: PreTrainedModel) -> Any:
    """The module that computes cos and sin of positions for all layers. Each architecture has its class."""
    return model.get_decoder().rotary_emb


def narrower_rope(rope: Rope, config: PreTrainedConfig) -> Rope:
    """The rotary embedding that a model of the same family would have under another config."""
    inner, kind = cast(Any, config.get_text_config()), cast(Any, type(rope.module))
    return replace(rope, module=rotary(inner) if is_own(inner) else kind(config=inner))


def check_layout(model: PreTrainedModel, layout: Layout) -> None:
    """Refuse layout `pre_rope` for a model whose rotary frequencies change with the length.

    That layout rotates stored keys again at every read, and they would be rotated by other frequencies.

    Raises:
        LowkeyError: for such a model and layout.
    """
    kind = length_dependent_rope(model)
    if layout == "pre_rope" and kind:
        raise LowkeyError(
            f"layout 'pre_rope': rope_type {kind!r} changes its frequencies with the length; use layout "
            "'post_rope'"
        )


def length_dependent_rope(model: PreTrainedModel) -> str | None:
    """The rope type of the full-attention layers if its frequencies change with the length, else None."""
    kind = rope_parameters(model.config).get("rope_type", "default")
    return kind if kind in LENGTH_DEPENDENT_ROPE else None


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters of the layers with full attention.

    Some families (Gemma 3) keep a set for each type of layer.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    own = parameters.get("full_attention")
    return own if isinstance(own, dict) else parameters


def run_layer(model: PreTrainedModel, layer: int, block: nn.Module, hidden: Tensor, cache: object) -> Tensor:
    """Run one decoder layer on its own.

    Args:
        model: the model that the layer is of.
        layer: its index.
        block: the layer, or a copy.
        hidden: inputs (b, t, D) without padding, at positions 0 to t - 1.
        cache: what keys and values pass through; None for no cache.

    Returns:
        (b, t, D).
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    out = block(
        hidden,
        attention_mask=_window_mask(model, layer, positions[0]),
        position_ids=positions,
        past_key_values=cache,
        position_embeddings=rope(model, layer).embeddings(positions, hidden),
    )
    return out if isinstance(out, Tensor) else out[0]  # some families return a tuple


def _window_mask(model: PreTrainedModel, layer: int, positions: Tensor) -> Tensor | None:
    """The mask (1, 1, t, t) of a sliding layer; None, for causal attention, of other layers."""
    config = model.config.get_text_config()
    if layer_types(config)[layer] != "sliding_attention":
        return None
    behind = positions.unsqueeze(1) - positions
    return ((behind >= 0) & (behind < config.sliding_window))[None, None]
