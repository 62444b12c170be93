"""Multi-head latent attention (arXiv:2405.04434): one latent for keys and values of all heads, and one
rotated key slice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Attention, LayerCall, nothing, split_into_heads
from .configuration_lowkey import LowkeyConfig
from .costs import MANY, Costs, projection_costs
from .parts import PreciseRMSNorm, in_fp32_or_wider, norm_folded, weight_of
from .rotary import rotated_by


class LatentAttention(Attention):
    """Multi-head latent attention: all heads share one compressed latent.

    Stores a normed latent (c) and a shared rotated key slice (e), c + e numbers per token for keys and values
    together. Query heads have n unrotated and then e rotated dimensions, value heads v dimensions.

    A reader has two ways. `expanded` writes keys and values of all heads out (prefill, training). `absorbed`
    carries queries into the latent and outputs out of it, so that only latents are read. For t new of s
    stored tokens, absorbed takes fewer operations if t s (2 c - n - v) < (s - t) c (n + v).

    Source: arXiv:2405.04434, section 2.1. With attention_bias the down-map has a bias, as in DeepSeek's code,
    and so has the up-map (ours), so that biases of any converted model have a place.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        n, e, c, v = _widths(config)
        super().__init__(config, layer_idx, n + e, v)
        self.scaling *= temperature(config)
        self.num_key_value_groups = 1
        self.kv_a_proj = self.linear(c + e)
        self.kv_a_norm = PreciseRMSNorm(c, eps=config.rms_norm_eps) if config.mla_kv_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(c, self.heads * (n + v), bias=config.attention_bias)
        self.latent_scale = (config.hidden_size / c) ** 0.5 if config.mla_latent_scale else 1.0

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and what the new tokens store; see `Attention.project`."""
        latent, shared = self.kv_a_proj(hidden).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1
        )
        latent, shared = self.kv_a_norm(latent) * self.latent_scale, split_into_heads(shared, 1)
        if self.config.mla_rotate:
            query, shared = rotated_by(query, call.rope), rotated_by(shared, call.rope)
        stored = torch.cat((latent.unsqueeze(1), shared), -1)
        return query, stored, nothing(stored)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored; see `Attention.attend`."""
        if self._readable() and _absorbs(self.config, query.shape[2], keys.shape[2]):
            return self._absorbed(query, keys[:, 0], call)
        return self._expanded(query, keys, call)

    def _readable(self) -> bool:
        """Whether the up-map is nothing but its weight. An adapter around it (LoRA) or a quantised map acts
        only when it is called.

        Raises:
            ValueError: it is not, and the configuration demands absorbed reading.
        """
        plain = type(self.kv_b_proj) is nn.Linear
        if self.config.decode == "absorbed" and not plain:
            kind = type(self.kv_b_proj).__name__
            raise ValueError(
                f"decode 'absorbed': kv_b_proj is wrapped ({kind}), its weight is not all of it; merge it, "
                "or use decode='auto'"
            )
        return plain

    def _expanded(self, query: Tensor, stored: Tensor, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Attention with keys and values written out."""
        n, _, c, v = _widths(self.config)
        keys, values = split_into_heads(self.kv_b_proj(stored[:, 0, :, :c]), self.heads).split([n, v], -1)
        # all heads share the rotated slice
        keys = torch.cat((keys, stored[..., c:].expand(-1, self.heads, -1, -1)), -1)
        missing = keys.shape[-1] - v
        if missing <= 0:
            return self.dense(query, keys, values, call)
        # Fused kernels need values as wide as keys.
        out, weights = self.dense(query, keys, nn.functional.pad(values, (0, missing)), call)
        return out[..., :v], weights

    def _absorbed(self, query: Tensor, stored: Tensor, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Attention over latents.

        Args:
            query: (b, H, t, n + e).
            stored: (b, s, c + e), read once for all heads: as keys and, without the slice, as values.
            call: the call.
        """
        n, _, c, v = _widths(self.config)
        up_keys, up_values = self.kv_b_proj.weight.view(self.heads, n + v, c).split([n, v], 1)
        carried = torch.cat((query[..., :n] @ up_keys, query[..., n:]), -1)  # (b, H, t, c + e)
        # All heads read the same latents, so they are rows of one product. The up-map's bias of keys adds the
        # same to all scores of a query, which the softmax does not see.
        scores = (carried.flatten(1, 2) @ stored.mT).unflatten(1, (self.heads, -1))
        weights = self.weights(scores, call)
        latents = (weights.flatten(1, 2) @ stored[..., :c]).unflatten(1, (self.heads, -1))
        out = latents @ up_values.mT
        if self.kv_b_proj.bias is not None:
            # Weights add up to 1, except under dropout.
            bias = self.kv_b_proj.bias.view(self.heads, 1, n + v)[..., n:]
            out = out + weights.sum(-1, keepdim=True) * bias
        return out.transpose(1, 2), weights

    def effective(self) -> tuple[Tensor, Tensor]:
        """Maps to the values of each query head, and to its keys on the n unrotated dimensions; the rotated
        ones are the key slice.
        """
        n, _, c, v = _widths(self.config)
        down = norm_folded(in_fp32_or_wider(self.kv_a_proj.weight)[:c], self.kv_a_norm) * self.latent_scale
        k, v = weight_of(self.kv_b_proj, self.heads).split([n, v], 1)
        return k @ down, v @ down

    def key_slice(self) -> Tensor | None:
        """The map to the shared part of keys, or None."""
        _, e, c, _ = _widths(self.config)
        return in_fp32_or_wider(self.kv_a_proj.weight)[c:] if e else None

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        (n, e, c, v), heads, hidden = _widths(config), config.num_attention_heads, config.hidden_size
        parameters, token = projection_costs(config, n + e, v)
        down, up = hidden * (c + e), heads * c * (n + v)
        others = (c if config.mla_kv_norm else 0) + (c + e + heads * (n + v) if config.attention_bias else 0)
        pair = heads * (n + e + max(v, n + e))  # values are padded to the keys' width
        absorbed = heads * (2 * c + e)
        reading = absorbed if _absorbs(config, MANY, MANY) else pair
        total, token = parameters + down + up + others, token + down
        if _absorbs(config, 1, MANY):
            return Costs(total, c + e, 2 * c + e, token + up, reading, token + up, absorbed)
        return Costs(total, c + e, c + e, token + up, reading, token, pair + up)


def temperature(config: LowkeyConfig) -> float:
    """Factor on scores under YaRN with `mscale_all_dim`, where DeepSeek keeps it out of cos and sin."""
    rope = config.rope_parameters or {}
    of_all, factor = rope.get("mscale_all_dim"), rope.get("factor", 1.0)
    if rope.get("rope_type", "default") == "default" or not of_all or factor <= 1:
        return 1.0
    return (0.1 * of_all * math.log(factor) + 1.0) ** 2


def _widths(config: LowkeyConfig) -> tuple[int, int, int, int]:
    """(n, e, c, v): unrotated and rotated dimensions of a query head, width of the latent, dimensions of a
    value head.
    """
    return config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim


def _absorbs(config: LowkeyConfig, new: int, stored: int) -> bool:
    """Whether `new` of `stored` tokens are read absorbed. With `auto` they are, if that takes fewer
    operations than writing keys and values out.
    """
    n, _, c, v = _widths(config)
    if config.decode != "auto":
        return config.decode == "absorbed"
    return new * stored * (2 * c - n - v) < (stored - new) * c * (n + v)
