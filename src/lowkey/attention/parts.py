"""Modules that layers of several kinds are built of, and their weights as maps by head.

Letters: D hidden size, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_lowkey import LowkeyConfig


def in_fp32_or_wider(x: Tensor) -> Tensor:
    """A tensor in fp32 or wider, so that products of maps are not rounded to the dtype that the maps are
    stored in.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weight_of(linear: nn.Linear, heads: int) -> Tensor:
    """Rows of a linear map by head (heads, d, D), in fp32 or wider."""
    return in_fp32_or_wider(linear.weight).unflatten(0, (heads, -1))


def norm_folded(maps: Tensor, norm: nn.Module) -> Tensor:
    """Maps (heads, d, D) times the weight of the norm that follows them, if one does."""
    return maps * in_fp32_or_wider(norm.weight).unsqueeze(-1) if isinstance(norm, nn.RMSNorm) else maps


class PreciseRMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight. Under autocast the input is narrower than the weight; in fp64
    neither is narrowed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x over its root mean square, times the weight."""
        return super().forward(x.to(self.weight.dtype))


class LowRankQuery(nn.Module):
    """Queries through a normed latent.

    Source: arXiv:2405.04434, section 2.1.2.
    """

    def __init__(self, config: LowkeyConfig, width: int) -> None:
        super().__init__()
        rank = config.q_lora_rank
        assert rank
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.norm = PreciseRMSNorm(rank, eps=config.rms_norm_eps)
        self.up = nn.Linear(rank, width, bias=config.attention_bias)
        self.scale = (config.hidden_size / rank) ** 0.5 if config.mla_latent_scale else 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Queries (b, t, width) of hidden states (b, t, D)."""
        return self.up(self.norm(self.down(hidden)) * self.scale)

    def effective(self) -> Tensor:
        """Both maps as one (width, D), without what the norm divides by."""
        return (
            in_fp32_or_wider(self.up.weight)
            @ norm_folded(in_fp32_or_wider(self.down.weight), self.norm)
            * self.scale
        )


class HeadNorm(nn.Module):
    """RMSNorm of each head's output over its features, with one weight for all heads or one for each.

    Source: arXiv:2601.19611, section 3. The paper writes GroupNorm and defines it so; it does not say whether
    heads share the weight.
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
        """Normed outputs of heads (b, t, H, d)."""
        return nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps) * self.weight

    def initialize(self) -> None:
        """Start with weights of one."""
        init.ones_(self.weight)


class OutputProjection(nn.Linear):
    """The last map of attention, (heads d) to D.

    It is a class of its own because transformers initialises modules that have parameters of their own, so a
    layer cannot initialise its parts.
    """

    def __init__(self, config: LowkeyConfig, width: int) -> None:
        super().__init__(width, config.hidden_size, bias=config.attention_bias)
        self.zero = config.zero_init_output

    def initialize(self) -> None:
        """Start with zeros if the configuration says so."""
        if self.zero:
            init.zeros_(self.weight)
