"""The only place that knows architectures: which decoders work, where their parts are, how they rotate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.attention import GROUPED, LowkeyConfig
from lowkey.attention.base import HeadMaps, rotary
from lowkey.core.types import Layout, LowkeyError, device_of
from lowkey.models import weights


@dataclass(frozen=True)
class Family:
    """How one architecture differs from Llama.

    pre_norm: the attention block reads `input_layernorm(hidden)` (else the residual stream itself, as in OLMo
    2);
    rope_per_layer_type: the rotary module wants the layer type as a third argument (Gemma 3);
    fused_qkv: one `qkv_proj` makes queries, keys and values, in this order (Phi-3);
    fused_mlp: one `gate_up_proj` makes the gate and what it multiplies, in this order (Phi-3);
    normed: queries and keys pass a norm between their projection and their rotation;
    no_conversion: why `lowkey.conversion` cannot write it in the decoder of `lowkey.attention`; empty where it can.
    """

    pre_norm: bool = True
    rope_per_layer_type: bool = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    normed: bool = False
    no_conversion: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(normed=True),
    "phi3": Family(fused_qkv=True, fused_mlp=True),
    "gemma2": Family(no_conversion="it scales its embeddings and caps its scores"),
    "gemma3_text": Family(
        rope_per_layer_type=True,
        normed=True,
        no_conversion="it scales its embeddings and has norms of its own",
    ),
    "granite": Family(no_conversion="it scales embeddings, residuals and logits"),
    "olmo2": Family(pre_norm=False, normed=True, no_conversion="its norms stand after the blocks"),
}

REFUSED = {
    "deepseek_v2": "its latent attention (MLA) already stores one joint latent",
    "deepseek_v3": "its latent attention (MLA) already stores one joint latent",
    "qwen3_next": "its linear-attention layers keep a recurrent state, not keys and values",
    "gpt_oss": "its attention sinks (s_aux) are not honoured yet",
}

CHANGING_ROPE = ("dynamic", "longrope")
OWN_TYPE = LowkeyConfig.model_type
FROM_SCRATCH = "llama"  # what `pretrain` trains where a recipe names no model type


@dataclass(frozen=True)
class Geometry:
    """The shapes of a decoder's cache. `compressible` are the layers with full attention; sliding ones stay
    stock.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    compressible: tuple[int, ...]

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    def full_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that stock storage of the compressible layers takes per token."""
        return len(self.compressible) * 2 * self.kv_heads * self.head_dim * itemsize


def family(config: PreTrainedConfig) -> Family:
    kind = config.get_text_config().model_type
    if is_own(config):
        return Family(normed=config.get_text_config().qk_norm)
    if kind in FAMILIES:
        return FAMILIES[kind]
    reason = (
        REFUSED.get(kind)
        or f"nearest supported: {', '.join(difflib.get_close_matches(kind, FAMILIES, 3, 0.3)) or 'none'}"
    )
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
    """Errors: LowkeyError for a family that is not among `convertible`."""
    kind = config.model_type
    if kind in convertible():
        return
    reason = FAMILIES[kind].no_conversion if kind in FAMILIES else REFUSED.get(kind, "it is not known here")
    raise LowkeyError(
        f"model of family {kind!r} cannot be converted: {reason}; families that can: {', '.join(convertible())}"
    )


def stores_its_own(config: PreTrainedConfig) -> bool:
    """Whether attention keeps something else than rotated keys and values of every head: then nothing of ours
    stands in for its cache.
    """
    config = config.get_text_config()
    if not is_own(config):
        return False
    return (
        config.attention not in GROUPED
        or config.attention_layers is not None
        or config.q_lora_rank is not None
    )


def linear_output(config: PreTrainedConfig) -> bool:
    """Whether nothing but a linear map follows attention."""
    config = config.get_text_config()
    return not is_own(config) or not (config.attn_output_gate or config.head_norm != "none")


def geometry(model: PreTrainedModel) -> Geometry:
    """`shapes` of a model whose cache can be compressed: refuses those with no full-attention layer, too."""
    found, config = shapes(model), model.config.get_text_config()
    if not found.compressible:
        raise LowkeyError(
            f"model of family {config.model_type!r} has only sliding-window layers "
            f"(sliding_window={config.sliding_window}); "
            "their cache is bounded already: use a model with full-attention layers"
        )
    return found


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for, or None where its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if type(found) is int else None


def readable_length(model: PreTrainedModel, length: int) -> int:
    """`length`, or all of the model's positions where it has fewer."""
    return min(length, positions(model) or length)


def shapes(model: PreTrainedModel) -> Geometry:
    """Read the cache's shapes off the model. Refuses unsupported families, and models that store something
    else than keys and values.
    """
    family(model.config)
    config = model.config.get_text_config()
    if stores_its_own(config):
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
    """How many heads of keys and values a layer stores."""
    return config.num_key_value_heads or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """The width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config: PreTrainedConfig) -> Sequence[str]:
    """One of `full_attention`, `sliding_attention`, ... per layer, as transformers' own caches infer it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_decoder().layers


def attention_input(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """What the q, k and v projections of a layer read, from the layer's input (b, t, D)."""
    block = decoder_layers(model)[layer]
    return block.input_layernorm(hidden) if family(model.config).pre_norm else hidden  # type: ignore[operator]


@dataclass(frozen=True)
class ProjectionPart:
    """Where the model keeps one of its projections: some rows of a linear module, all of them unless it is
    fused.
    """

    linear: nn.Linear
    rows: slice

    def weight(self, heads: int) -> Tensor:
        """A copy (heads, d, D) in fp32 on the CPU."""
        with weights.at_hand(self.linear):
            return self._copy(self.linear.weight if self._plain else self._asked(True)).unflatten(
                0, (heads, -1)
            )

    def bias(self, heads: int) -> Tensor | None:
        """A copy (heads, d) in fp32 on the CPU, or None."""
        if self.linear.bias is None:
            return None
        with weights.at_hand(self.linear):
            return self._copy(self.linear.bias if self._plain else self._asked(False)).unflatten(
                0, (heads, -1)
            )

    @property
    def _plain(self) -> bool:
        return type(self.linear) is nn.Linear

    @torch.no_grad()
    def _asked(self, weight: bool) -> Tensor:
        """Weight or bias of what the module does: an adapter around it (LoRA), or a scale of quantised
        weights, is not in its own.
        """
        wide = next(
            (p.dtype for p in self.linear.parameters() if p.is_floating_point() and p.dtype.itemsize > 1),
            torch.float32,
        )
        size, like = self.linear.in_features, torch.empty(0, dtype=wide, device=device_of(self.linear))
        bias = self.linear(like.new_zeros(size))
        return (self.linear(torch.eye(size).to(like)) - bias).mT if weight else bias

    def _copy(self, parameter: Tensor) -> Tensor:
        return parameter.detach()[self.rows].to("cpu", torch.float32, copy=True)


def projection_parts(
    model: PreTrainedModel, layer: int
) -> tuple[ProjectionPart, ProjectionPart, ProjectionPart]:
    """The live query, key and value projections of a layer: rows (H d, D), (h d, D) and (h d, D)."""
    if not family(model.config).fused_qkv:
        q, k, v = (_attention_part(model, layer, f"{name}_proj") for name in "qkv")
        return q, k, v
    shape = shapes(model)
    edges = [
        n * shape.head_dim
        for n in (0, shape.heads, shape.heads + shape.kv_heads, shape.heads + 2 * shape.kv_heads)
    ]
    q, k, v = (_attention_part(model, layer, "qkv_proj", slice(*ends)) for ends in pairwise(edges))
    return q, k, v


def _attention_part(
    model: PreTrainedModel, layer: int, name: str, rows: slice = slice(None)
) -> ProjectionPart:
    return ProjectionPart(getattr(decoder_layers(model)[layer].self_attn, name), rows)


@dataclass(frozen=True)
class Projections:
    """Weights of one layer's attention, copies in fp32 on the CPU. Row vectors: keys = inputs @ k[h].T +
    k_bias[h].

    q (H, d, D), k and v (h, d, D), o (H, D, d); the biases q_bias (H, d), k_bias and v_bias (h, d), or None.
    normed: keys and queries pass a norm between their projection and their rotation, which is not in these
    weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    normed: bool


def projections(model: PreTrainedModel, layer: int) -> Projections:
    """Read the weights of a layer's attention off the model, for every family and kind of layer."""
    shape = shapes(model)
    q, k, v = projection_parts(model, layer)
    out = _attention_part(model, layer, "o_proj").weight(1)[0]
    return Projections(
        q=q.weight(shape.heads),
        k=k.weight(shape.kv_heads),
        v=v.weight(shape.kv_heads),
        o=out.unflatten(1, (shape.heads, shape.head_dim)).transpose(0, 1).contiguous(),
        q_bias=q.bias(shape.heads),
        k_bias=k.bias(shape.kv_heads),
        v_bias=v.bias(shape.kv_heads),
        normed=family(model.config).normed,
    )


def weights_outside_attention(model: PreTrainedModel) -> dict[str, Tensor]:
    """All other weights, by the names that Llama has for them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    if not family(model.config).fused_mlp:
        return state
    for name in [name for name in state if name.endswith("mlp.gate_up_proj.weight")]:
        for part, tensor in zip(("gate_proj", "up_proj"), state.pop(name).chunk(2), strict=True):
            state[name.replace("gate_up_proj", part)] = tensor
    return state


@dataclass(frozen=True)
class Rope:
    """The model's own rotary module, asked at chosen positions."""

    module: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None

    def embeddings(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (b, s, p), in the dtype of `like`, as the decoder layer wants them."""
        args = (like, positions) if self.layer_type is None else (like, positions, self.layer_type)
        found = self.module(*args)
        # accelerate leaves it where the rotary module is, which on several devices is not where every layer
        # is
        return found if found[0].device == like.device else send_to_device(found, like.device)

    def __call__(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (b, 1, s, p) in fp32, rounded as the model rounds them for `like`."""
        cos, sin = self.embeddings(positions, like)[:2]
        return cos.float().unsqueeze(1), sin.float().unsqueeze(1)


def rope(model: PreTrainedModel, layer: int) -> Rope:
    config = model.config.get_text_config()
    kind = layer_types(config)[layer] if family(config).rope_per_layer_type else None
    return Rope(rotary_module(model), kind)


def rotary_module(model: PreTrainedModel) -> Any:
    """What makes cos and sin of positions in all layers: a class of each architecture's own."""
    return model.get_decoder().rotary_emb


def narrower_rope(rope: Rope, config: PreTrainedConfig) -> Rope:
    """What a model of the same family would turn its heads with under another config."""
    inner, kind = cast(Any, config.get_text_config()), cast(Any, type(rope.module))
    return replace(rope, module=rotary(inner) if is_own(inner) else kind(config=inner))


def check_layout(model: PreTrainedModel, layout: Layout) -> None:
    """`pre_rope` rotates stored keys again at every read, which is wrong when frequencies change with the
    length.
    """
    kind = changing_rope(model)
    if layout == "pre_rope" and kind:
        raise LowkeyError(
            f"layout 'pre_rope': rope_type {kind!r} changes its frequencies with the length; use layout "
            "'post_rope'"
        )


def changing_rope(model: PreTrainedModel) -> str | None:
    """The kind of rotary embedding of the layers with full attention, if its frequencies change with the
    length.
    """
    kind = rope_parameters(model.config).get("rope_type", "default")
    return kind if kind in CHANGING_ROPE else None


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Those of the layers with full attention: some families (Gemma 3) keep a set for each type of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    own = found.get("full_attention")
    return own if isinstance(own, dict) else found


def run_layer(model: PreTrainedModel, layer: int, block: nn.Module, hidden: Tensor, cache: object) -> Tensor:
    """One decoder layer on unpadded inputs (b, t, D) at positions 0..t-1, through the cache given. Returns
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
    return out if isinstance(out, Tensor) else out[0]


def _window_mask(model: PreTrainedModel, layer: int, positions: Tensor) -> Tensor | None:
    """A boolean (1, 1, t, t) mask for a sliding layer; None, plain causal, for the others."""
    config = model.config.get_text_config()
    if layer_types(config)[layer] != "sliding_attention":
        return None
    behind = positions.unsqueeze(1) - positions
    return ((behind >= 0) & (behind < config.sliding_window))[None, None]


def head_maps(model: PreTrainedModel, layer: int) -> HeadMaps:
    """What every query head of a layer amounts to as linear maps, (H, d, D) each; those of a KV head are
    repeated for its group.
    """
    block: Any = decoder_layers(model)[layer].self_attn
    if is_own(model.config):
        with weights.at_hand(block):
            return block.head_maps()
    found = projections(model, layer)
    q, k = found.q, found.k
    if found.normed:
        q, k = q * _norm_weight(block.q_norm, q.shape[1]), k * _norm_weight(block.k_norm, k.shape[1])
    groups = len(q) // len(k)
    return HeadMaps(q, k.repeat_interleave(groups, 0), found.v.repeat_interleave(groups, 0), found.o)


@torch.no_grad()
def _norm_weight(norm: Any, head_dim: int) -> Tensor:
    """What an RMSNorm over a head or over all heads (OLMo 2) multiplies by, (1|heads, d, 1). The norm is
    asked, as families keep the number itself or the number less one; the vector is long, so that the norm's
    epsilon does not count."""
    asked = torch.full((norm.weight.numel(),), 2.0**10, device=device_of(norm))
    return norm(asked).view(-1, head_dim, 1).to("cpu", torch.float32)
