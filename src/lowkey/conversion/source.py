"""What is read off a trained model: whether our skeleton can say it, the weights of its attention, and
everything else.
"""

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
from lowkey.models.families import ProjectionPart


@dataclass(frozen=True)
class Weights:
    """One layer's attention in fp64 on the CPU. Row vectors, the bias as the weight of one more input that is
    always 1 (zeros where there is none): keys = [inputs, 1] @ k[h].T.

    q (H, d, R + 1) with R the hidden size D, or the width of a low-rank query; k and v (h, d, D + 1); o (H,
    D, d); o_bias (D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    o_bias: Tensor

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads."""
        return len(self.q), len(self.k)


def check_source(model: PreTrainedModel) -> None:
    """Errors: LowkeyError for what the skeleton of our models cannot say."""
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
    turned, width = 2 * len(frequencies(model)), families.head_dim(config)
    if turned != width:
        raise LowkeyError(
            f"model of family {kind!r}: rotates {turned} of {width} channels, which our models "
            "lack; use another model"
        )


def gated(config: PreTrainedConfig) -> bool:
    """Whether anything but a linear map follows attention."""
    return not families.linear_output(config)


def frequencies(model: PreTrainedModel) -> Tensor:
    """(p / 2) angles per position, by which pair (f, f + p / 2) of a head's p rotated channels turns; fp64 on
    the CPU. Those of a text within the limit, whatever was read before: frequencies that follow the length
    stay in the module."""
    return families.rotary_module(model).original_inv_freq.detach().double().cpu()


def rope_scaling(model: PreTrainedModel) -> float:
    """What rotation multiplies keys and queries by, each (YaRN)."""
    return float(families.rotary_module(model).attention_scaling)


def has_biases(model: PreTrainedModel) -> bool:
    return any(part.linear.bias is not None for part in _parts(model, 0))


def key_biases(model: PreTrainedModel) -> bool:
    """Whether any key of any layer has a bias that is not zero."""
    layers = range(model.config.num_hidden_layers)
    return (
        any(bool(_extended(_parts(model, i)[1])[:, -1].any()) for i in layers) if has_biases(model) else False
    )


def full_bytes_per_token(model: PreTrainedModel) -> int:
    """What stock storage of all layers takes."""
    config = model.config
    stored = families.stored_heads(config) * families.head_dim(config)
    return config.num_hidden_layers * 2 * stored * model.dtype.itemsize


def attention_weights_of(model: PreTrainedModel, layer: int) -> Weights:
    """Read one layer's attention."""
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
    attention: Any = families.decoder_layers(model)[layer].self_attn
    out = ProjectionPart(attention.o_proj, slice(None))
    if not families.is_own(model.config):
        return *families.projection_parts(model, layer), out
    query = attention.q_proj.up if model.config.q_lora_rank else attention.q_proj
    return (
        ProjectionPart(query, slice(None)),
        ProjectionPart(attention.k_proj, slice(None)),
        ProjectionPart(attention.v_proj, slice(None)),
        out,
    )


def _extended(part: ProjectionPart) -> Tensor:
    """(rows, inputs + 1)."""
    weight = part.linear.weight.detach()[part.rows].to("cpu", torch.float64)
    bias = part.linear.bias
    column = (
        weight.new_zeros(len(weight)) if bias is None else bias.detach()[part.rows].to("cpu", torch.float64)
    )
    return torch.cat([weight, column.unsqueeze(1)], 1)


def kept_weights(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Weights of one layer's attention that stay as they are, by name: norms of queries and keys, gates,
    low-rank queries.
    """
    attention = families.decoder_layers(model)[layer].self_attn
    return dict(attention.state_dict())  # type: ignore[union-attr]
