"""Copies of the weights of a decoder's attention, whatever its family calls its modules."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowkey.attention.base import HeadMaps
from lowkey.core.types import device_of
from lowkey.models import weights
from lowkey.models.families import decoder_layers, family, is_own, shapes


@dataclass(frozen=True)
class ProjectionPart:
    """One projection of a model: some rows of a linear module, or all rows unless projections are fused.

    Args:
        linear: the module.
        rows: which rows of its weight.
    """

    linear: nn.Linear
    rows: slice

    def weight(self, heads: int) -> Tensor:
        """A copy (heads, d, D) in fp32 on the CPU."""
        with weights.weights_loaded(self.linear):
            weight = self.linear.weight if self._is_plain else self._measured(weight=True)
            return self._copy(weight).unflatten(0, (heads, -1))

    def bias(self, heads: int) -> Tensor | None:
        """A copy (heads, d) in fp32 on the CPU, or None."""
        if self.linear.bias is None:
            return None
        with weights.weights_loaded(self.linear):
            bias = self.linear.bias if self._is_plain else self._measured(weight=False)
            return self._copy(bias).unflatten(0, (heads, -1))

    @property
    def _is_plain(self) -> bool:
        """Whether the module is a plain linear map, whose weight says what it does."""
        return type(self.linear) is nn.Linear

    @torch.no_grad()
    def _measured(self, weight: bool) -> Tensor:
        """The weight or the bias of the map that the module computes, measured by applying it.

        An adapter around it (LoRA), or a scale of quantised weights, is not in the module's own weight.
        """
        wide = next(
            (p.dtype for p in self.linear.parameters() if p.is_floating_point() and p.dtype.itemsize > 1),
            torch.float32,
        )
        size, like = self.linear.in_features, torch.empty(0, dtype=wide, device=device_of(self.linear))
        # a linear map of zeros is its bias, and of the identity its transposed weight plus the bias
        bias = self.linear(like.new_zeros(size))
        return (self.linear(torch.eye(size).to(like)) - bias).mT if weight else bias

    def _copy(self, parameter: Tensor) -> Tensor:
        """A copy of this part's rows, in fp32 on the CPU."""
        return parameter.detach()[self.rows].to("cpu", torch.float32, copy=True)


def projection_parts(
    model: PreTrainedModel, layer: int
) -> tuple[ProjectionPart, ProjectionPart, ProjectionPart]:
    """The query, key and value projections of a layer, with rows (H d, D), (h d, D) and (h d, D)."""
    if not family(model.config).fused_qkv:
        q, k, v = (_attention_part(model, layer, f"{name}_proj") for name in "qkv")
        return q, k, v
    shape = shapes(model)
    # rows of queries, then of keys, then of values
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
    """Copies of the weights of one layer's attention, in fp32 on the CPU.

    Row vectors: keys = inputs @ k[h].T + k_bias[h].

    Args:
        q: (H, d, D).
        k: (h, d, D).
        v: (h, d, D).
        o: (H, D, d).
        q_bias: (H, d) or None.
        k_bias: (h, d) or None.
        v_bias: (h, d) or None.
        normed: whether keys and queries pass a norm between their projection and their rotation, which is
            not in these weights.
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
    """Read the weights of a layer's attention, for every family and type of layer."""
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
    """All weights but those of attention, by the names that Llama has for them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    if not family(model.config).fused_mlp:
        return state
    for name in [name for name in state if name.endswith("mlp.gate_up_proj.weight")]:
        for part, tensor in zip(("gate_proj", "up_proj"), state.pop(name).chunk(2), strict=True):
            state[name.replace("gate_up_proj", part)] = tensor
    return state


def head_maps(model: PreTrainedModel, layer: int) -> HeadMaps:
    """The linear maps (H, d, D) of every query head of a layer.

    The maps of a KV head are repeated for its query heads, and the weights of norms are included.
    """
    block: Any = decoder_layers(model)[layer].self_attn
    if is_own(model.config):
        with weights.weights_loaded(block):
            return block.head_maps()
    maps = projections(model, layer)
    q, k = maps.q, maps.k
    if maps.normed:
        q, k = q * _norm_weight(block.q_norm, q.shape[1]), k * _norm_weight(block.k_norm, k.shape[1])
    groups = len(q) // len(k)
    return HeadMaps(q, k.repeat_interleave(groups, 0), maps.v.repeat_interleave(groups, 0), maps.o)


@torch.no_grad()
def _norm_weight(norm: Any, head_dim: int) -> Tensor:
    """What an RMSNorm over a head, or over all heads (OLMo 2), multiplies by: (1|heads, d, 1).

    It is measured, since families store the factor itself or the factor less one. The vector that is normed
    is long, so that the norm's epsilon does not count.
    """
    long_vector = torch.full((norm.weight.numel(),), 2.0**10, device=device_of(norm))
    return norm(long_vector).view(-1, head_dim, 1).to("cpu", torch.float32)
