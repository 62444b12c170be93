"""Multi-head explicit attention (arXiv:2601.19611): key and value heads are linear combinations of stored
component heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .base import Attention, LayerCall, split_into_heads
from .configuration_lowkey import LowkeyConfig
from .costs import MANY, Costs, projection_costs
from .parts import in_fp32_or_wider, norm_folded, weight_of
from .rotary import rotated_by

NOISE = 0.02  # at the start, so that composite heads which share a component head can grow apart


class ExplicitAttention(Attention):
    """Multi-head explicit attention, or head-level linear composition (HLC): a kind of head sharing.

    Composite head j is `sum over c of W[c, j] * component head c`, for keys and for values with a W (m, G)
    each. Scalars commute with rotation, so rotated component heads can be stored. Stores 2 min(m, G) d
    numbers per token.

    With m < G components are stored and a reader has two ways. `expanded` composes them again: 2 m G d MACs
    per stored token, whatever the number of queries. `absorbed` mixes scores and outputs, without writing
    keys or values out: H m (2 d + 1) MACs per query and stored token instead of 2 H d. With m >= G composites
    are stored and nothing is left to do.

    The norm after attention (`head_norm`) is a part of the method: without it, says the paper, composition
    collapses to plain attention. qk_norm norms component heads.

    Source: arXiv:2601.19611. The paper does not say how W starts; here it is the identity, or component heads
    in turn with noise.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.components, composites = config.mea_num_component_heads, config.num_key_value_heads
        width = self.components * config.head_dim
        self.k_proj, self.v_proj = self.linear(width), self.linear(width)
        self.k_norm = self.norm(config.head_dim)
        self.k_mix, self.v_mix = (nn.Parameter(torch.empty(self.components, composites)) for _ in range(2))
        self.mixed_before = self.components >= composites

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and what the new tokens store; see `Attention.project`."""
        keys, values = (
            split_into_heads(part(hidden), self.components) for part in (self.k_proj, self.v_proj)
        )
        keys = self.k_norm(keys)
        if self.mixed_before:
            keys, values = composed(keys, self.k_mix), composed(values, self.v_mix)
        return rotated_by(query, call.rope), rotated_by(keys, call.rope), values

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored; see `Attention.attend`."""
        if self.mixed_before:
            return self.dense(query, keys, values, call)
        if _absorbs(self.config, query.shape[2], keys.shape[2]):
            return self._mixed(query, keys, values, call)
        return self.dense(query, composed(keys, self.k_mix), composed(values, self.v_mix), call)

    def _mixed(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Scores against all components, mixed; outputs of all components, mixed."""
        mix_k, mix_v = (
            mix.repeat_interleave(self.num_key_value_groups, 1) for mix in (self.k_mix, self.v_mix)
        )  # (m, H)
        scores = torch.einsum("bhtd,bmsd->bmhts", query, keys)
        weights = self.weights(torch.einsum("bmhts,mh->bhts", scores, mix_k), call)
        outputs = torch.einsum("bhts,bmsd->bmhtd", weights, values)
        return torch.einsum("bmhtd,mh->bthd", outputs, mix_v), weights

    def effective(self) -> tuple[Tensor, Tensor]:
        """Maps to the keys and values of each query head. Under qk_norm, component heads are divided by norms
        of their own before they are mixed, which is left out.
        """
        keys = norm_folded(weight_of(self.k_proj, self.components), self.k_norm)
        values = weight_of(self.v_proj, self.components)
        composites = (
            torch.einsum("mdi,mg->gdi", maps, in_fp32_or_wider(mix))
            for maps, mix in ((keys, self.k_mix), (values, self.v_mix))
        )
        k, v = (maps.repeat_interleave(self.num_key_value_groups, 0) for maps in composites)
        return k, v

    def initialize(self) -> None:
        """Start compositions with the identity, with component heads in turn and noise, or orthogonal."""
        components, composites = self.k_mix.shape
        for mix in (self.k_mix, self.v_mix):
            if self.config.mea_hlc_init == "orthogonal":
                init.orthogonal_(mix)
                continue
            # Composite head j starts as one component head: its own, or that of its share of the order.
            chosen = torch.arange(composites)
            if components < composites:
                chosen = chosen * components // composites
            init.normal_(mix, std=NOISE if components != composites else 0.0)
            init.copy_(mix, mix.detach() + nn.functional.one_hot(chosen, components).T.to(mix))

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        heads, composites, m, d = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.mea_num_component_heads,
            config.head_dim,
        )
        parameters, token = projection_costs(config, d, d)
        maps, mix, pair = 2 * config.hidden_size * m * d, 2 * m * composites, 2 * heads * d
        norms = (d if config.qk_norm else 0) + (2 * m * d if config.attention_bias else 0)
        stored, total = 2 * min(m, composites) * d, parameters + maps + mix + norms
        compose = mix * d
        if m >= composites:
            return Costs(total, stored, stored, token + maps + compose, pair, token + maps + compose, pair)
        token, mixing, mixed = token + maps, heads * m * d, heads * m * (2 * d + 1)
        whole = (token + mixing, mixed) if _absorbs(config, MANY, MANY) else (token + compose, pair)
        step = (token + mixing, mixed) if _absorbs(config, 1, MANY) else (token, pair + compose)
        return Costs(total, stored, stored, *whole, *step)


def _absorbs(config: LowkeyConfig, new: int, stored: int) -> bool:
    """Whether `new` of `stored` tokens are read absorbed. With `auto` they are, if that takes fewer
    operations than composing again.
    """
    if config.decode != "auto":
        return config.decode == "absorbed"
    heads, composites, m, d = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.mea_num_component_heads,
        config.head_dim,
    )
    absorbed = new * heads * m * d + new * stored * heads * m * (2 * d + 1)
    expanded = stored * 2 * m * composites * d + new * stored * 2 * heads * d
    return absorbed < expanded


def composed(components: Tensor, mix: Tensor) -> Tensor:
    """Composite heads.

    Args:
        components: component heads (b, m, s, d).
        mix: weights (m, G).

    Returns:
        (b, G, s, d).
    """
    # One product over flat rows: its result is contiguous per head, as fused kernels need.
    return (mix.T @ components.flatten(2)).unflatten(2, components.shape[2:])
