"""What all kinds of attention share: queries, the way through the cache, and what follows attention.

Letters: b batch, t new tokens, s stored tokens, D hidden size, H query heads, G KV heads, d head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_lowkey import LowkeyConfig
from .costs import Costs
from .parts import HeadNorm, LowRankQuery, OutputProjection, PreciseRMSNorm, in_fp32_or_wider, norm_folded
from .rotary import CosSin, RotaryCall, rotary

POSITION_NUMBERS = 3  # numbers that hold a token's position, 8 bits each


class LayerCall(NamedTuple):
    """One call of a layer.

    Args:
        mask: as transformers makes it for the attention function in use.
        rope: rotations of the new tokens.
        positions: (b or 1, t).
        cached: whether what `project` returns goes through a cache.
        extra: keywords for the attention function.
    """

    mask: Tensor | None
    rope: RotaryCall
    positions: Tensor | None
    cached: bool
    extra: dict[str, Any]


def split_into_heads(x: Tensor, heads: int) -> Tensor:
    """(b, t, heads d) to (b, heads, t, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_one_head(*parts: Tensor) -> Tensor:
    """Tensors (b, heads, t, d) of different shapes as one head (b, 1, t, sum of heads d), as a cache can
    store them together.
    """
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1).unsqueeze(1)


def nothing(like: Tensor) -> Tensor:
    """An empty tensor in the place of values, where keys hold everything."""
    return like[..., :0]


def by_rows(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, both (rows, heads, ., .), one row of the batch after the other.

    Heads that lie between other numbers in memory are one batch only within a row; a product over rows and
    heads together would copy b first.
    """
    return torch.stack([x @ y for x, y in zip(a, b, strict=True)])


def with_positions(stored: Tensor, positions: Tensor) -> Tensor:
    """Append positions to what is stored.

    Args:
        stored: (b, 1, t, w).
        positions: (b or 1, t). They are written as three digits to the base 256, which bf16 holds exactly.

    Returns:
        (b, 1, t, w + 3).
    """
    digits = torch.stack((positions >> 16, positions >> 8 & 255, positions & 255), -1)
    return torch.cat((stored, digits.to(stored).expand(len(stored), -1, -1).unsqueeze(1)), -1)


def without_positions(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers and the positions (b, s) that `with_positions` was given."""
    # a cache may hold them in bf16, and three whole numbers below 256 come back as they were
    high, middle, low = stored[:, 0, :, -POSITION_NUMBERS:].long().unbind(-1)
    return stored[..., :-POSITION_NUMBERS], (high << 16) + (middle << 8) + low


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the stored tokens.

    Args:
        scores: scaled scores (b, H, t, s).
        mask: boolean or additive (b or 1, 1, t, s). None means what transformers means by it: causal from the
            first token on, or no mask for a single query.
    """
    t, s = scores.shape[-2:]
    # transformers leaves the mask out for a single query, and where the new tokens are the first of the text.
    # A static cache then has more places than tokens, which the lower triangle hides.
    if mask is None and t > 1:
        mask = torch.ones(t, s, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = mask[..., :s]  # of a static cache it also covers tokens to come
        if mask.dtype == torch.bool:
            # Not -inf: the softmax of a row that is masked everywhere (padding) would be NaN.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _check_exact(cache: Cache, layer: int) -> None:
    """Check that a cache gives back what it was given, as stored positions need.

    Raises:
        ValueError: it rounds what it stores.
    """
    layers = getattr(cache, "layers", [])
    if layer < len(layers) and isinstance(layers[layer], QuantizedLayer):
        raise ValueError(
            "cache 'quantized': attention 'lrkv' of mode 'full' stores positions, which must come back as "
            "they were; use 'dynamic'"
        )


class HeadMaps(NamedTuple):
    """The linear maps that the H query heads of a layer amount to, from the layer's normed input: keys =
    inputs @ k[i].T.

    Weights of norms along the way are folded in. What a norm divides by depends on the input and is left out,
    as are rotation, biases and the output gate.

    Args:
        q: (H, w, D).
        k: (H, w or less, D); the first dimensions of a query meet it.
        v: (H, u, D).
        o: (H, D, u).
        key_slice: keys (e, D) that all heads share, which the last e dimensions of a query meet, and which k
            may contain too; or None.
        k_residual: the low-rank part of k, where k is a shared part plus that; or None.
        v_residual: the low-rank part of v, likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    key_slice: Tensor | None = None
    k_residual: Tensor | None = None
    v_residual: Tensor | None = None


class Attention(nn.Module, ABC):
    """The attention of one layer.

    A kind of attention says what a token stores (`project`), how queries meet what is stored (`attend`), what
    that costs (`costs`) and which linear maps its heads amount to (`effective`).

    Args:
        config: configuration of this layer's kind.
        layer_idx: number of the layer.
        key_width: dimensions of a query head (default: head_dim).
        value_width: dimensions of a head's output (default: head_dim).
    """

    # The model's configuration, if this layer is one of those that `attention_layers` leaves out.
    whole: LowkeyConfig | None = None
    stores_positions = False  # whether positions are stored among the keys

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
        # transformers' attention functions read these four by name.
        self.scaling = key_width**-0.5
        self.attention_dropout, self.is_causal = config.attention_dropout, True
        self.num_key_value_groups = self.heads // config.num_key_value_heads
        self.q_proj: LowRankQuery | nn.Linear = (
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
        """The norm of queries, keys or latents over the last dimension, if the configuration has one."""
        return PreciseRMSNorm(width, eps=self.config.rms_norm_eps) if self.config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryCall | CosSin,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output, with the signature that Llama's decoder calls.

        Args:
            hidden_states: (b, t, D).
            position_embeddings: rotations of the new tokens.
            attention_mask: as transformers makes it.
            past_key_values: the cache, or None.
            position_ids: (b or 1, t).
            kwargs: keywords for the attention function.

        Returns:
            The output (b, t, D), and the attention weights (b, H, t, s) if they were formed.
        """
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

    def _rope(self, given: RotaryCall | CosSin, hidden: Tensor, positions: Tensor | None) -> RotaryCall:
        """This layer's rotations.

        Stock layers pass plain cos and sin, without frequencies: these are then made anew from the
        configuration.
        """
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
        """Queries, and what the new tokens store.

        Args:
            hidden: the layer's input (b, t, D).
            query: normed queries (b, H, t, w).
            call: the call.

        Returns:
            The query ready to meet what is stored, and two tensors (b, heads, t, width) that go through the
            cache.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored.

        Args:
            query: what `project` returned.
            keys: what the cache returned, all tokens' first tensor.
            values: all tokens' second tensor.
            call: the call.

        Returns:
            Outputs of heads (b, t, H, d), and the attention weights if they were formed.
        """

    @staticmethod
    @abstractmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""

    @abstractmethod
    def effective(self) -> tuple[Tensor, Tensor]:
        """The maps to keys (H, w, D) and values (H, u, D) that each query head reads, as in `HeadMaps`."""

    def key_slice(self) -> Tensor | None:
        """The map (e, D) to the part of the keys that all heads share, or None."""
        return None

    def residuals(self) -> tuple[Tensor, Tensor] | None:
        """The low-rank parts of `effective`, or None."""
        return None

    def head_maps(self) -> HeadMaps:
        """The layer's heads as linear maps, in fp32 or wider. Gradients flow through them."""
        q_proj = self.q_proj
        query = q_proj.effective() if isinstance(q_proj, LowRankQuery) else in_fp32_or_wider(q_proj.weight)
        out = in_fp32_or_wider(self.o_proj.weight).unflatten(1, (self.heads, -1)).transpose(0, 1)
        if self.head_norm is not None:
            out = out * in_fp32_or_wider(self.head_norm.weight).unsqueeze(-2)
        query = norm_folded(query.unflatten(0, (self.heads, -1)), self.q_norm)
        return HeadMaps(query, *self.effective(), out, self.key_slice(), *(self.residuals() or (None, None)))

    def dense(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention function over keys and values that are written out for every head."""
        # Read at every call, and from the model's own configuration: users may change it there.
        chosen = (self.whole or self.config)._attn_implementation
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
        """Attention weights from scores that were formed without written-out keys.

        Args:
            scores: unscaled scores (b, H, t, s).
            call: the call.
        """
        weights = attention_weights(scores * self.scaling, call.mask)
        return nn.functional.dropout(weights, self.attention_dropout, self.training)

    def finish(self, heads: Tensor, hidden: Tensor) -> Tensor:
        """From outputs of heads (b, t, H, d) to the layer's output (b, t, D)."""
        if self.head_norm is not None:
            heads = self.head_norm(heads)
        out = heads.flatten(2)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(hidden))
        return self.o_proj(out)

    def initialize(self) -> None:
        """Initialise parameters that lie in the layer itself, and not in its maps and norms."""
