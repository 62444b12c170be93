"""Multi-head attention, grouped-query attention (arXiv:2305.13245) and multi-query attention
(arXiv:1911.02150): one class, with different numbers of stored heads.
"""

from __future__ import annotations

from torch import Tensor

from .base import Attention, LayerCall, split_into_heads
from .configuration_lowkey import LowkeyConfig
from .costs import Costs, projection_costs
from .parts import norm_folded, weight_of
from .rotary import rotated_by


class GroupedQuery(Attention):
    """Grouped-query attention: H query heads share G stored heads. Multi-head attention is G = H, multi-query
    attention G = 1.

    Stores rotated keys and values of G heads, 2 G d numbers per token; query head i reads stored head i G //
    H.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.num_key_value_heads * config.head_dim
        self.k_proj, self.v_proj = self.linear(width), self.linear(width)
        self.k_norm = self.norm(config.head_dim)

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated keys, and values, of G heads; see `Attention.project`."""
        stored = self.config.num_key_value_heads
        keys, values = (split_into_heads(part(hidden), stored) for part in (self.k_proj, self.v_proj))
        return rotated_by(query, call.rope), rotated_by(self.k_norm(keys), call.rope), values

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention by transformers' own function."""
        return self.dense(query, keys, values, call)

    def effective(self) -> tuple[Tensor, Tensor]:
        """The maps to keys and values; see `Attention.effective`."""
        stored, group = self.config.num_key_value_heads, self.num_key_value_groups
        keys = norm_folded(weight_of(self.k_proj, stored), self.k_norm)
        values = weight_of(self.v_proj, stored)
        return keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        heads, stored, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        parameters, token = projection_costs(config, d, d)
        maps, numbers = 2 * config.hidden_size * stored * d, 2 * stored * d
        norms = (d if config.qk_norm else 0) + (numbers if config.attention_bias else 0)
        pair = 2 * heads * d  # scores and outputs, d MACs each
        return Costs(parameters + maps + norms, numbers, numbers, token + maps, pair, token + maps, pair)
