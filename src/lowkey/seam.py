"""The one attention function we register with transformers, and what passes through it.

A cache layer of ours returns an `Incoming` in the place of keys and values; it reaches this function untouched, which
hands the query to that layer. Plain tensors (a stock cache, a sliding layer) go to transformers' own SDPA function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowkey import families
from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.types import LowkeyError

NAME = "lowkey"


@dataclass(frozen=True)
class Call:
    """One attention call. query (b, h, g, t, d); mask (b|1, t, s) over all tokens seen, or None for causal without
    padding; positions (b|1, t) of the new tokens, or None when the model gives none."""

    query: Tensor
    mask: Tensor | None
    positions: Tensor | None
    scaling: float
    softcap: float | None

    def full_mask(self, seen: int) -> Tensor | None:
        """The mask written out: (b|1, t, seen), or None when every query sees everything."""
        t = self.query.shape[3]
        if self.mask is not None or t == 1:
            return self.mask
        return torch.ones(t, seen, dtype=torch.bool, device=self.query.device).tril(seen - t).unsqueeze(0)


class Attending(Protocol):
    """What a cache layer of ours offers the attention function."""

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store keys and values (b, h, t, d) and answer the call: (b, h, g, t, d)."""
        ...


@dataclass(frozen=True)
class Incoming:
    """New keys and values (b, h, t, d) on their way to a layer; they are stored when the query arrives."""

    layer: Attending
    keys: Tensor
    values: Tensor


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model` use our attention function, through transformers' public call; a stock cache behaves as before.

    Errors: LowkeyError for a family that is not supported.
    """
    families.family(model.config)
    if not families.stores_its_own(model.config):
        families.geometry(model)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # class-wide: a mask function set on one object is ignored
    model.set_attn_implementation(NAME)
    return model


def attached(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == NAME


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Incoming,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (b, H, t, d) -> (b, t, H, d), no weights."""
    _refuse(kwargs, attention_mask)
    mask = None if attention_mask is None else attention_mask[:, 0]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(key, Incoming):
        call = Call(query.unflatten(1, (key.keys.shape[1], -1)), mask, position_ids, scale, softcap)
        out = key.layer.attend(key.keys, key.values, call)
    elif softcap is not None:
        out = _dense(key, value, Call(query.unflatten(1, (key.shape[1], -1)), mask, position_ids, scale, softcap))
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs
        )
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _dense(key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Stock keys under soft-capping, which SDPA would silently drop."""
    segment = Segment(call.query, key, value, call.full_mask(key.shape[2]))
    return grouped.attend([segment], call.scaling, call.softcap)


def _refuse(kwargs: dict, mask: Tensor | None) -> None:
    """What we cannot honour is refused by name, never ignored."""
    if kwargs.get("s_aux") is not None:
        raise LowkeyError("attention sinks (s_aux) are not supported by lowkey; use the model's own attention implementation")
    if kwargs.get("output_attentions"):
        raise LowkeyError(
            "output_attentions=True: attention weights are never formed here; load the model with attn_implementation='eager'"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise LowkeyError(f"attention_mask of dtype {mask.dtype}: give a 2D padding mask or a boolean 4D mask (True = attend)")
