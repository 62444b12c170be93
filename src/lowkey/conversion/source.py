"""What is read from a trained model: whether our decoder can express it, and the weights of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.attention import GROUPED
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models import weights as plain
from lowkey.models.projections import ProjectionPart, projection_parts


@dataclass(frozen=True)
class Weights:
    """The attention of one layer, in fp64 on the CPU.

    Vectors are rows, and a bias is the weight of one more input, which is always 1: keys = [inputs, 1] @
    k[h].T.

    Args:
        q: (H, d, R + 1), with R the hidden size D, or the width of a low-rank query's latent.
        k: (h, d, D + 1).
        v: (h, d, D + 1).
        o: (H, D, d).
        o_bias: (D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    o_bias: Tensor

    @property
    def heads(self) -> tuple[int, int]:
        """Number of query heads and of KV heads."""
        return len(self.q), len(self.k)


def check_source(model: PreTrainedModel) -> None:
    """Refuse a model that our decoder cannot express.

    Raises:
        LowkeyError: the first reason why it cannot.
    """
    config = model.config
    families.check_convertible(config)
    kind, own = config.model_type, families.is_own(config)
    if own and config.attention not in GROUPED:
        raise LowkeyError(
            f"model with attention {config.attention!r} cannot be converted; attention must be one of "
            f"{', '.join(GROUPED)}"
        )
    if own and config.attention_layers is not None:
        raise LowkeyError(
            f"model with attention_layers {config.attention_layers} cannot be converted; its layers must be "
            "of one kind"
        )
    plain.check_plain("convert", model, families.decoder_layers(model))
    sliding = [i for i, name in enumerate(families.layer_types(config)) if name != "full_attention"]
    if not own and sliding:
        raise LowkeyError(
            f"model of family {kind!r}: layer {sliding[0]} has a sliding window, which our models lack; use "
            "another model"
        )
    rotated, width = 2 * len(frequencies(model)), families.head_dim(config)
    if rotated != width:
        raise LowkeyError(
            f"model of family {kind!r}: rotates {rotated} of {width} channels, which our models "
            "lack; use another model"
        )


def gated(config: PreTrainedConfig) -> bool:
    """Whether more than a linear map follows attention: a gate or a norm."""
    return not families.linear_output(config)


def frequencies(model: PreTrainedModel) -> Tensor:
    """Rotary frequencies of the source.

    They are those of a text within the trained length: frequencies that follow the length change the module,
    not its original frequencies.

    Returns:
        Angles per position (p / 2) by which the pairs (f, f + p / 2) of a head's p rotated channels are
        rotated; fp64 on the CPU.
    """
    return families.rotary_module(model).original_inv_freq.detach().double().cpu()


def rope_scaling(model: PreTrainedModel) -> float:
    """Factor that rotary embedding multiplies keys and queries with, each (YaRN)."""
    return float(families.rotary_module(model).attention_scaling)


def has_biases(model: PreTrainedModel) -> bool:
    """Whether projections of the attention have biases."""
    return any(part.linear.bias is not None for part in _parts(model, 0))


def key_biases(model: PreTrainedModel) -> bool:
    """Whether any key of any layer has a bias that is not zero."""
    layers = range(model.config.num_hidden_layers)
    return has_biases(model) and any(bool(_extended(_parts(model, i)[1])[:, -1].any()) for i in layers)


def full_bytes_per_token(model: PreTrainedModel) -> int:
    """Cache bytes per token of the source, all layers together."""
    config = model.config
    stored = families.stored_heads(config) * families.head_dim(config)
    return config.num_hidden_layers * 2 * stored * model.dtype.itemsize


def read_attention(model: PreTrainedModel, layer: int) -> Weights:
    """Read the attention of one layer."""
    config = model.config
    q, k, v, o = _parts(model, layer)
    heads, stored = config.num_attention_heads, families.stored_heads(config)
    out, bias = _extended(o)[:, :-1], _extended(o)[:, -1]
    return Weights(
        q=_extended(q).unflatten(0, (heads, -1)),
        k=_extended(k).unflatten(0, (stored, -1)),
        v=_extended(v).unflatten(0, (stored, -1)),
        o=out.unflatten(1, (heads, -1)).transpose(0, 1),
        o_bias=bias,
    )


def _parts(
    model: PreTrainedModel, layer: int
) -> tuple[ProjectionPart, ProjectionPart, ProjectionPart, ProjectionPart]:
    """Projections of queries, keys, values and outputs."""
    attention: Any = families.decoder_layers(model)[layer].self_attn
    out = ProjectionPart(attention.o_proj, slice(None))
    if not families.is_own(model.config):
        return *projection_parts(model, layer), out
    # Of a low-rank query the up-map is read; the rest of it stays as it is.
    query = attention.q_proj.up if model.config.q_lora_rank else attention.q_proj
    return (
        ProjectionPart(query, slice(None)),
        ProjectionPart(attention.k_proj, slice(None)),
        ProjectionPart(attention.v_proj, slice(None)),
        out,
    )


def _extended(part: ProjectionPart) -> Tensor:
    """A projection with its bias as one more column (rows, inputs + 1)."""
    weight = part.linear.weight.detach()[part.rows].to("cpu", torch.float64)
    bias = part.linear.bias
    column = (
        weight.new_zeros(len(weight)) if bias is None else bias.detach()[part.rows].to("cpu", torch.float64)
    )
    return torch.cat([weight, column.unsqueeze(1)], 1)


def kept_weights(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Weights of one layer's attention, by name. Of these the conversion keeps what it does not make itself:
    norms of queries and keys, gates, low-rank queries.
    """
    attention: Any = families.decoder_layers(model)[layer].self_attn
    return dict(attention.state_dict())
