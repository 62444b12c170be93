"""What all attention variants share: queries, the way through the cache, and what follows attention.

Letters: b batch, t new tokens, s stored tokens, D hidden size, H query heads, G key-value heads, d head dim.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from .configuration_lowkey import LowkeyConfig
from .costs import Costs

POSITION_NUMBERS = 3  # numbers that say a token's position

Turn = tuple[Tensor, Tensor]  # cos and sin, each (b, t, width)


class RotaryCall(NamedTuple):
    """How one call turns: cos and sin (b|1, t, width) of the new tokens; frequencies (width / 2) and scaling,
    which they were made of, so that stored tokens can be turned alike; narrow: cos and sin of the new tokens
    at the width of latents, where those are rotated too;
    other: of the layers with another attention, where there are some."""

    cos: Tensor
    sin: Tensor
    frequencies: Tensor
    scaling: float
    narrow: Turn | None
    other: RotaryCall | None = None

    def at(self, positions: Tensor, like: Tensor) -> Turn:
        """cos and sin of other positions (b, s), in the dtype of `like`."""
        angles = positions.unsqueeze(-1).float() * self.frequencies.float()
        cos, sin = (torch.cat((part, part), -1) * self.scaling for part in (angles.cos(), angles.sin()))
        return cos.to(like.dtype), sin.to(like.dtype)


class LayerCall(NamedTuple):
    """One call of a layer. mask: as transformers makes it for the attention function in use; rope: of the new
    tokens; positions (b|1, t);
    cached: whether what `project` returns goes through a cache; extra: keywords for the attention
    function."""

    mask: Tensor | None
    rope: RotaryCall
    positions: Tensor | None
    cached: bool
    extra: dict[str, Any]


class NoRotation(nn.Module):
    """A rotary embedding of no dimensions."""

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        """cos and sin of width 0, for positions (b, t)."""
        nothing = x.new_empty(*position_ids.shape, 0)
        return RotaryCall(nothing, nothing, x.new_empty(0), 1.0, None)


class KindRotaryEmbedding(LlamaRotaryEmbedding):
    """The decoder's rotary embedding for heads of `width`, and of `narrow` where that is not 0, with the same
    base and scaling.

    Layers hold none of their own: rotations whose frequencies follow the length of the text (dynamic,
    longrope) have a state, and it is this one's alone.
    """

    def __init__(self, config: LowkeyConfig, width: int, narrow: int = 0) -> None:
        own = copy.copy(config)
        own.head_dim = width
        super().__init__(own)
        self.narrow = KindRotaryEmbedding(config, narrow) if narrow else None

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        cos, sin = super().forward(x, position_ids)
        narrow = None if self.narrow is None else self.narrow(x, position_ids)[:2]
        return RotaryCall(cos, sin, self.inv_freq, self.attention_scaling, narrow)


class PreciseRMSNorm(nn.RMSNorm):
    """RMSNorm in its weight's precision: under autocast the input is narrower than the weight, in fp64
    neither is narrowed.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class TwoRotations(nn.Module):
    """Of two kinds of layers, each with its own rotary embedding."""

    def __init__(self, own: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.own, self.other = own, other

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        return self.own(x, position_ids)._replace(other=self.other(x, position_ids))


def rotary(config: LowkeyConfig) -> nn.Module:
    """The decoder's rotary embedding. Of no dimensions it is another module: transformers takes 0 for "not
    given".
    """
    own = (
        KindRotaryEmbedding(config, config.rope_width, config.narrow_rope_width)
        if config.rope_width
        else NoRotation()
    )
    return own if (others := config.others) is None else TwoRotations(own, rotary(others))


def rotated_by(x: Tensor, rope: RotaryCall | Turn, back: bool = False) -> Tensor:
    """Turn the last dimensions of x (b, heads, t, d), as many as the rotary embedding has. `back`: undo that,
    and with it the factor that scaled embeddings (YaRN) have on cos and sin."""
    cos, sin = (part.unsqueeze(1) for part in rope[:2])
    width = cos.shape[-1]
    if width == 0:
        return x
    turned = x[..., -width:]
    if back:
        turned = turned / (in_fp32_or_wider(cos).square() + in_fp32_or_wider(sin).square()).to(x.dtype)
    turned = turned * cos + rotate_half(turned) * (-sin if back else sin)
    return turned if width == x.shape[-1] else torch.cat((x[..., :-width], turned), -1)


def split_into_heads(x: Tensor, heads: int) -> Tensor:
    """(b, t, heads d) -> (b, heads, t, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_one_head(*parts: Tensor) -> Tensor:
    """(b, heads, t, d), ... -> one head (b, 1, t, sum of heads d), as caches store parts of different shapes."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1).unsqueeze(1)


def nothing(like: Tensor) -> Tensor:
    """An empty tensor in the place of values, where keys hold everything."""
    return like[..., :0]


def by_rows(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, both (rows, heads, ., .), one row of the batch after another: heads that lie between other
    numbers are one batch only within a row, and a product over rows and heads would copy b first."""
    return torch.stack([x @ y for x, y in zip(a, b, strict=True)])


def with_positions(stored: Tensor, positions: Tensor) -> Tensor:
    """Numbers (b, 1, t, w) with the positions (b|1, t) of their tokens behind them, as digits to the base
    256, which bf16 holds exactly.
    """
    digits = torch.stack((positions >> 16, positions >> 8 & 255, positions & 255), -1)
    return torch.cat((stored, digits.to(stored).expand(len(stored), -1, -1).unsqueeze(1)), -1)


def without_positions(stored: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_positions` was given: the numbers, and the positions (b, s)."""
    high, middle, low = stored[:, 0, :, -POSITION_NUMBERS:].long().unbind(-1)
    return stored[..., :-POSITION_NUMBERS], (high << 16) + (middle << 8) + low


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the stored tokens of scaled scores (b, H, t, s). mask: boolean or additive (b|1, 1, t, s);
    None: as transformers means it, causal from the first token on, or no mask at all for a single query."""
    t, s = scores.shape[-2:]
    if mask is None and t > 1:
        mask = torch.ones(t, s, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = mask[..., :s]
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            if mask.dtype == torch.bool
            else scores + mask
        )
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _check_exact(cache: Cache, layer: int) -> None:
    """Errors: ValueError for a cache that rounds what it stores: positions would come back as others."""
    layers = getattr(cache, "layers", [])
    if layer < len(layers) and isinstance(layers[layer], QuantizedLayer):
        raise ValueError(
            "cache 'quantized': attention 'lrkv' of mode 'full' stores positions, which must come back as "
            "they were; use 'dynamic'"
        )


class HeadMaps(NamedTuple):
    """The linear maps that the H query heads of one layer amount to, of the layer's normed input (row
    vectors: keys = inputs @ k[i].T).

    q (H, w, D); k (H, w or less, D): the first dimensions of a query meet it; v (H, u, D); o (H, D, u).
    key_slice (e, D): keys that all heads share, which the last e dimensions of a query meet, and which k may
    hold too; or None.
    k_residual, v_residual: the low-rank part of k and v, where they are a shared part plus that; or None.

    Weights of norms along the way are folded in; what a norm divides by depends on the input and is left out,
    as are rotation, biases and the output gate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    key_slice: Tensor | None = None
    k_residual: Tensor | None = None
    v_residual: Tensor | None = None


def weight_of(linear: nn.Linear, heads: int) -> Tensor:
    """The rows of a linear map by head, (heads, d, D), in fp32 or wider."""
    return in_fp32_or_wider(linear.weight).unflatten(0, (heads, -1))


def in_fp32_or_wider(x: Tensor) -> Tensor:
    """In fp32 or wider: products of maps are not rounded to the dtype that the maps are kept in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_folded(maps: Tensor, norm: nn.Module) -> Tensor:
    """Maps (heads, d, D) times the weight of the norm over d that follows them, if one does."""
    return maps * in_fp32_or_wider(norm.weight).unsqueeze(-1) if isinstance(norm, nn.RMSNorm) else maps


class LowRankQuery(nn.Module):
    """Queries through a normed latent (arXiv:2405.04434, section 2.1.2)."""

    def __init__(self, config: LowkeyConfig, width: int) -> None:
        super().__init__()
        rank = config.q_lora_rank
        assert rank
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.norm = PreciseRMSNorm(rank, eps=config.rms_norm_eps)
        self.up = nn.Linear(rank, width, bias=config.attention_bias)
        self.scale = (config.hidden_size / rank) ** 0.5 if config.mla_latent_scale else 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(self.norm(self.down(hidden)) * self.scale)

    def effective(self) -> Tensor:
        """Both maps as one (width, D), without what the norm divides by."""
        return (
            in_fp32_or_wider(self.up.weight)
            @ norm_folded(in_fp32_or_wider(self.down.weight), self.norm)
            * self.scale
        )


class HeadNorm(nn.Module):
    """RMSNorm of each head's output (arXiv:2601.19611, section 3): over d features, the weight shared by
    heads or each head's own.

    The paper writes GroupNorm and defines it so; whether its weight is shared is not said.
    """

    def __init__(self, config: LowkeyConfig, width: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(
            torch.ones(width)
            if config.head_norm == "shared"
            else torch.ones(config.num_attention_heads, width)
        )

    def forward(self, heads: Tensor) -> Tensor:
        return nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps) * self.weight

    def initialize(self) -> None:
        init.ones_(self.weight)


class OutputProjection(nn.Linear):
    """The last map of a layer's attention, (heads d) -> D. A class of its own: transformers asks only modules
    with parameters of their own how they start, so that a layer cannot speak for its parts."""

    def __init__(self, config: LowkeyConfig, width: int) -> None:
        super().__init__(width, config.hidden_size, bias=config.attention_bias)
        self.zero = config.zero_init_output

    def initialize(self) -> None:
        if self.zero:
            init.zeros_(self.weight)


class Attention(nn.Module, ABC):
    """One layer's attention. A variant says what it stores, how queries meet it, and what that costs.

    config: of this layer's kind. key_width: dimensions of a query head; value_width: of a head's output.
    """

    whole: LowkeyConfig | None = None  # the model's configuration, where this layer is one of the others
    stores_positions = False

    def __init__(
        self,
        config: LowkeyConfig,
        layer_idx: int,
        key_width: int | None = None,
        value_width: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.heads = config, layer_idx, config.num_attention_heads
        key_width, value_width = key_width or config.head_dim, value_width or config.head_dim
        self.scaling = key_width**-0.5
        self.attention_dropout, self.is_causal = config.attention_dropout, True
        self.num_key_value_groups = self.heads // config.num_key_value_heads
        self.q_proj = (
            LowRankQuery(config, self.heads * key_width)
            if config.q_lora_rank
            else self.linear(self.heads * key_width)
        )
        self.o_proj = OutputProjection(config, self.heads * value_width)
        self.gate_proj = (
            self.linear(self.heads * value_width, bias=False) if config.attn_output_gate else None
        )
        self.q_norm = self.norm(key_width)
        self.head_norm = HeadNorm(config, value_width) if config.head_norm != "none" else None

    def linear(self, width: int, bias: bool | None = None) -> nn.Linear:
        """A projection of the layer's input."""
        return nn.Linear(
            self.config.hidden_size, width, bias=self.config.attention_bias if bias is None else bias
        )

    def norm(self, width: int) -> nn.Module:
        """Of queries, keys or latents, over the last dimension, where the configuration has one."""
        return PreciseRMSNorm(width, eps=self.config.rms_norm_eps) if self.config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryCall | Turn,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (b, t, D) -> the same shape, and the weights (b, H, t, s) where they were formed."""
        if past_key_values is not None and self.stores_positions:
            _check_exact(past_key_values, self.layer_idx)
        rope = self._rope(position_embeddings, hidden_states, position_ids)
        call = LayerCall(attention_mask, rope, position_ids, past_key_values is not None, kwargs)
        query, keys, values = self.project(
            hidden_states, self.q_norm(split_into_heads(self.q_proj(hidden_states), self.heads)), call
        )
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        out, weights = self.attend(query, keys, values, call)
        return self.finish(out, hidden_states), weights

    def _rope(self, given: RotaryCall | Turn, hidden: Tensor, positions: Tensor | None) -> RotaryCall:
        """This layer's part of what the model's rotary embedding says. Of plain cos and sin, as stock layers
        take them, the rest is made anew from the configuration."""
        if isinstance(given, RotaryCall):
            rope = given if self.whole is None else given.other
            assert rope is not None
            return rope
        cos, sin = given
        if positions is None:
            return RotaryCall(cos, sin, cos.new_empty(0), 1.0, None)
        return rotary(self.config).to(cos.device)(hidden, positions)._replace(cos=cos, sin=sin)

    @abstractmethod
    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """The query (b, H, t, w) ready to meet what is stored, and what of the new tokens is stored: two
        tensors (b, heads, t, width).
        """

    @abstractmethod
    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """The query over all that is stored: (b, t, H, d), and the weights where they were formed."""

    @staticmethod
    @abstractmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""

    @abstractmethod
    def effective(self) -> tuple[Tensor, Tensor]:
        """The maps to keys and values that each of the H query heads reads, (H, w, D) and (H, u, D), as
        HeadMaps means them.
        """

    def key_slice(self) -> Tensor | None:
        """The map (e, D) to the part of the keys that all heads share, where a variant has one."""
        return None

    def residuals(self) -> tuple[Tensor, Tensor] | None:
        """The low-rank parts of `effective`, where a variant has them."""
        return None

    def head_maps(self) -> HeadMaps:
        """This layer's heads as linear maps, in fp32 or wider; gradients pass."""
        query = self.q_proj.effective() if self.config.q_lora_rank else in_fp32_or_wider(self.q_proj.weight)
        out = in_fp32_or_wider(self.o_proj.weight).unflatten(1, (self.heads, -1)).transpose(0, 1)
        if self.head_norm is not None:
            out = out * in_fp32_or_wider(self.head_norm.weight).unsqueeze(-2)
        query = norm_folded(query.unflatten(0, (self.heads, -1)), self.q_norm)
        return HeadMaps(query, *self.effective(), out, self.key_slice(), *(self.residuals() or (None, None)))

    def dense(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention function over written-out keys and values."""
        chosen = (self.whole or self.config)._attn_implementation  # of the model, whose user may change it
        function = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return function(
            self,
            query,
            keys,
            values,
            call.mask,
            dropout=dropout,
            scaling=self.scaling,
            position_ids=call.positions,
            **call.extra,
        )

    def weights(self, scores: Tensor, call: LayerCall) -> Tensor:
        """From scores (b, H, t, s), formed without written-out keys, to what values are weighed by."""
        weights = attention_weights(scores * self.scaling, call.mask)
        return nn.functional.dropout(weights, self.attention_dropout, self.training)

    def finish(self, heads: Tensor, hidden: Tensor) -> Tensor:
        """From heads (b, t, H, d) to the layer's output (b, t, D)."""
        if self.head_norm is not None:
            heads = self.head_norm(heads)
        out = heads.flatten(2)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(hidden))
        return self.o_proj(out)

    def initialize(self) -> None:
        """Starting values of parameters that lie in the layer itself, not in its maps and norms."""
