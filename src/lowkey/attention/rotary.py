"""Rotary position embeddings: cos and sin of one call, and the rotation of queries, keys and latents.

Letters: b batch, t new tokens, s stored tokens, d head dim.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from .configuration_lowkey import LowkeyConfig
from .parts import in_fp32_or_wider

CosSin = tuple[Tensor, Tensor]  # cos and sin, each (b, t, width)


class RotaryCall(NamedTuple):
    """Rotations of one call.

    Args:
        cos: (b or 1, t, width) of the new tokens.
        sin: (b or 1, t, width) of the new tokens.
        frequencies: (width / 2), from which cos and sin of stored tokens can be made.
        scaling: factor on cos and sin (YaRN).
        narrow: cos and sin of the new tokens at the width of latents, where latents are rotated too; or None.
        other: rotations of the layers that have another attention, if there are such layers.
    """

    cos: Tensor
    sin: Tensor
    frequencies: Tensor
    scaling: float
    narrow: CosSin | None
    other: RotaryCall | None = None

    def at(self, positions: Tensor, like: Tensor) -> CosSin:
        """cos and sin of other positions.

        Args:
            positions: (b, s).
            like: a tensor of the wanted dtype.
        """
        angles = positions.unsqueeze(-1).float() * self.frequencies.float()
        cos, sin = (torch.cat((part, part), -1) * self.scaling for part in (angles.cos(), angles.sin()))
        return cos.to(like.dtype), sin.to(like.dtype)


class NoRotation(nn.Module):
    """A rotary embedding of no dimensions."""

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        """cos and sin of width 0, for positions (b, t)."""
        nothing = x.new_empty(*position_ids.shape, 0)
        return RotaryCall(nothing, nothing, x.new_empty(0), 1.0, None)


class KindRotaryEmbedding(LlamaRotaryEmbedding):
    """The decoder's rotary embedding for heads of a given width, with the configuration's base and scaling.

    Layers have none of their own. Rotations whose frequencies follow the length of the text (dynamic,
    longrope) have a state, and it must exist once.

    Args:
        config: the model's configuration.
        width: rotated dimensions of a head.
        narrow: rotated dimensions of latents; 0 for none.
    """

    def __init__(self, config: LowkeyConfig, width: int, narrow: int = 0) -> None:
        own = copy.copy(config)
        own.head_dim = width  # where Llama's class reads the width from
        super().__init__(own)
        self.narrow = KindRotaryEmbedding(config, narrow) if narrow else None

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        """Rotations of positions (b, t), at the width of latents too if they are rotated."""
        cos, sin = super().forward(x, position_ids)
        narrow = None if self.narrow is None else self.narrow(x, position_ids)[:2]
        return RotaryCall(cos, sin, self.inv_freq, self.attention_scaling, narrow)


class TwoRotations(nn.Module):
    """The rotary embeddings of two kinds of layers."""

    def __init__(self, own: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.own, self.other = own, other

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryCall:
        """Rotations of positions (b, t) for both kinds of layers."""
        return self.own(x, position_ids)._replace(other=self.other(x, position_ids))


def rotary(config: LowkeyConfig) -> nn.Module:
    """The decoder's rotary embedding for a configuration."""
    own = (
        KindRotaryEmbedding(config, config.rope_width, config.narrow_rope_width)
        if config.rope_width
        else NoRotation()
    )
    return own if (others := config.others) is None else TwoRotations(own, rotary(others))


def rotated_by(x: Tensor, rope: RotaryCall | CosSin, back: bool = False) -> Tensor:
    """Rotate the last dimensions, as many as the rotary embedding has.

    Args:
        x: (b, heads, t, d).
        rope: cos and sin.
        back: undo the rotation, and the factor that scaled embeddings (YaRN) have on cos and sin.
    """
    cos, sin = (part.unsqueeze(1) for part in rope[:2])
    width = cos.shape[-1]
    if width == 0:
        return x
    rotated = x[..., -width:]
    if back:
        # cos^2 + sin^2 is the square of the factor that YaRN puts on both, and 1 without it.
        rotated = rotated / (in_fp32_or_wider(cos).square() + in_fp32_or_wider(sin).square()).to(x.dtype)
    rotated = rotated * cos + rotate_half(rotated) * (-sin if back else sin)
    return rotated if width == x.shape[-1] else torch.cat((x[..., :-width], rotated), -1)
