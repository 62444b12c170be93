"""Kinds of attention that store one tensor for keys and values: grouped tied attention, and keys that are
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Attention, LayerCall, as_one_head, nothing, split_into_heads
from .configuration_lowkey import LowkeyConfig
from .costs import Costs, projection_costs
from .parts import in_fp32_or_wider, norm_folded, weight_of
from .rotary import rotated_by


class TiedAttention(Attention):
    """Grouped tied attention: keys and values of a head are tied.

    Stores tied vectors of G heads and one rotated key slice of e dimensions that all heads share, G d + e
    numbers per token. Values are the tied vectors; keys are their first d - e dimensions and the slice.
    qk_norm norms the tied vectors, thus values too.

    Source: arXiv:2505.21487.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kv_proj = self.linear(config.num_key_value_heads * config.head_dim)
        self.k_rope_proj = (
            self.linear(config.qk_rope_head_dim, bias=False) if config.qk_rope_head_dim else None
        )
        self.kv_norm = self.norm(config.head_dim)

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and what the new tokens store; see `Attention.project`."""
        tied = self.kv_norm(split_into_heads(self.kv_proj(hidden), self.config.num_key_value_heads))
        parts = [tied]
        if self.k_rope_proj is not None:
            parts.append(rotated_by(split_into_heads(self.k_rope_proj(hidden), 1), call.rope))
        # G tied heads and one slice of another width: caches take them as one flat head.
        stored = as_one_head(*parts)
        return rotated_by(query, call.rope), stored, nothing(stored)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored; see `Attention.attend`."""
        heads, d, e = self.config.num_key_value_heads, self.config.head_dim, self.config.qk_rope_head_dim
        tied = split_into_heads(keys[:, 0, :, : heads * d], heads)
        shared = keys[..., heads * d :].expand(-1, heads, -1, -1)
        return self.dense(query, torch.cat((tied[..., : d - e], shared), -1), tied, call)

    def effective(self) -> tuple[Tensor, Tensor]:
        """The maps to keys and values; see `Attention.effective`."""
        tied = norm_folded(weight_of(self.kv_proj, self.config.num_key_value_heads), self.kv_norm)
        tied = tied.repeat_interleave(self.num_key_value_groups, 0)
        shared = self.key_slice()
        if shared is None:
            return tied, tied
        return torch.cat((tied[:, : -len(shared)], shared.expand(self.heads, -1, -1)), 1), tied

    def key_slice(self) -> Tensor | None:
        """The map to the shared part of keys, or None."""
        return None if self.k_rope_proj is None else in_fp32_or_wider(self.k_rope_proj.weight)

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        heads, stored, d, e = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.qk_rope_head_dim,
        )
        parameters, token = projection_costs(config, d, d)
        maps, pair = config.hidden_size * (stored * d + e), 2 * heads * d
        norms = (d if config.qk_norm else 0) + (stored * d if config.attention_bias else 0)
        read = stored * (d - e) + e + stored * d  # keys, then values
        return Costs(parameters + maps + norms, stored * d + e, read, token + maps, pair, token + maps, pair)


class KeysAreValues(Attention):
    """Keys are values: one tensor of G heads is both, G d numbers per token.

    The last qk_rope_head_dim dimensions are rotated. The output is rotated back by the query's position, so
    that values become relative to it.

    Source: DeepSeek-V4 and Gemma 4 (`attention_k_eq_v`) have it so.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kv_proj = self.linear(config.num_key_value_heads * config.head_dim)
        self.kv_norm = self.norm(config.head_dim)

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and what the new tokens store; see `Attention.project`."""
        stored = rotated_by(
            self.kv_norm(split_into_heads(self.kv_proj(hidden), self.config.num_key_value_heads)), call.rope
        )
        return rotated_by(query, call.rope), stored, nothing(stored)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored; see `Attention.attend`."""
        # Values are rotated by their own positions; rotating the output back by the query's makes them
        # relative.
        out, weights = self.dense(query, keys, keys, call)
        return rotated_by(out.transpose(1, 2), call.rope, back=True).transpose(1, 2), weights

    def effective(self) -> tuple[Tensor, Tensor]:
        """The maps to keys and values; see `Attention.effective`."""
        tied = norm_folded(weight_of(self.kv_proj, self.config.num_key_value_heads), self.kv_norm)
        tied = tied.repeat_interleave(self.num_key_value_groups, 0)
        return tied, tied

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        heads, stored, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        parameters, token = projection_costs(config, d, d)
        maps, pair = config.hidden_size * stored * d, 2 * heads * d
        norms = (d if config.qk_norm else 0) + (stored * d if config.attention_bias else 0)
        return Costs(
            parameters + maps + norms, stored * d, 2 * stored * d, token + maps, pair, token + maps, pair
        )
