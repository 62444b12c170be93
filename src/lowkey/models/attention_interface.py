"""The one attention function we register with transformers, and what passes through it.

A cache layer of ours returns an `Incoming` in the place of keys and values; it reaches this function
untouched, which hands the query to that layer. Plain tensors (a stock cache, a sliding layer) go to
transformers' own SDPA function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowkey.backends import grouped
from lowkey.backends.segment import Segment
from lowkey.core.types import LowkeyError
from lowkey.models import families

ATTENTION_NAME = "lowkey"
UNCOMPILED = "lowkey: a cache grows from step to step and a graph does not, so it runs between compiled parts; leave out fullgraph=True"


@dataclass(frozen=True)
class Call:
    """One attention call. query (b, h, g, t, d); mask (b|1, t, s) over all tokens seen, or None for causal
    without padding; positions (b|1, t) of the new tokens, or None when the model gives none."""

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


class AttendingLayer(Protocol):
    """What a cache layer of ours offers the attention function."""

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store keys and values (b, h, t, d) and answer the call: (b, h, g, t, d)."""
        ...

    def attend_succeeded(self) -> None:
        """`attend` ended well."""
        return None

    def attend_failed(self) -> None:
        """It did not, or the call was refused: what this forward pass has stored is undone, in every layer."""
        return None


@dataclass(frozen=True)
class Incoming:
    """New keys and values (b, h, t, d) on their way to a layer; they are stored when the query arrives."""

    layer: AttendingLayer
    keys: Tensor
    values: Tensor


def as_cast(x: Tensor) -> Tensor:
    """In the dtype that SDPA gives its arguments: under autocast rotated keys may still be wider than values."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make the text decoder of `model` use our attention function, through transformers' public call; a stock
    cache behaves as before.

    Errors: LowkeyError for a family that is not supported.
    """
    families.family(model.config)
    if not families.stores_its_own(model.config):
        families.geometry(model)
    AttentionInterface.register(ATTENTION_NAME, attention)
    # class-wide: a mask function set on one object is ignored
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    # not the whole model: it may have a vision tower, whose masks are of other kinds
    model.get_decoder().set_attn_implementation(ATTENTION_NAME)
    return model


def attached(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == ATTENTION_NAME


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
    if isinstance(key, Incoming):
        return _through_layer(
            module, query, key, value, attention_mask, scaling, dropout, softcap, position_ids, **kwargs
        )
    return _attention(
        module, query, key, value, attention_mask, scaling, dropout, softcap, position_ids, **kwargs
    )


@torch.compiler.disable(reason=UNCOMPILED)
def _through_layer(
    module: torch.nn.Module, query: Tensor, key: Incoming, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """A layer of ours is told whether it answered well. Under `torch.compile` it runs as it is, between
    compiled parts.

    Autocast ends here: the layer has taken keys and values in its dtype, and computes in that or wider."""
    try:
        with torch.autocast(query.device.type, enabled=False):
            found = _attention(module, query.to(key.keys.dtype), key, *args, **kwargs)
    except BaseException:
        key.layer.attend_failed()
        raise
    key.layer.attend_succeeded()
    return found


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Incoming,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    position_ids: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    _refuse(kwargs, attention_mask)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(key, Incoming):
        mask = _shared_mask(attention_mask, query)
        call = Call(query.unflatten(1, (key.keys.shape[1], -1)), mask, position_ids, scale, softcap)
        out = key.layer.attend(key.keys, key.values, call)
    elif softcap is not None:
        out = _dense(query, key, value, attention_mask, scale, softcap)
    else:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_ids=position_ids,
            **kwargs,
        )
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _shared_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask (b|1, 1|H, t, s) as the one mask (b|1, t, s) that our layers give to all heads."""
    if mask is None:
        return None
    _check_shape(mask, query)
    first = mask[:, :1]
    if mask.shape[1] > 1 and mask.stride(1) and not bool((mask == first).all()):
        raise LowkeyError(
            "attention_mask: its heads differ, and this kind of cache gives all heads of a layer one mask; "
            "give one for all heads, "
            "(b, 1, t, s), or use a cache of transformers"
        )
    return first[:, 0]


def _check_shape(mask: Tensor, query: Tensor) -> None:
    b, heads, t = query.shape[:3]
    if mask.ndim != 4 or mask.shape[0] not in (1, b) or mask.shape[1] not in (1, heads) or mask.shape[2] != t:
        raise LowkeyError(
            f"attention_mask of shape {tuple(mask.shape)}: a call of {b} rows of {t} tokens and {heads} "
            "heads takes "
            f"({b}, {heads}, {t}, tokens seen), of which rows and heads may be 1; or give a 2D padding mask"
        )


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Stock keys under soft-capping, which SDPA would silently drop."""
    b, heads, h = *query.shape[:2], key.shape[1]
    if mask is not None:
        _check_shape(mask, query)
    if mask is not None and mask.shape[1] > 1:  # heads with masks of their own, as rows of a batch
        mask = mask.expand(b, -1, -1, -1).flatten(0, 1)
        query, key, value = (
            x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1).unsqueeze(1)
            for x in (query, key, value)
        )
        out = _dense(query, key, value, mask.unsqueeze(1), scaling, softcap)
        return out.view(b, h, heads // h, *out.shape[3:])
    call = Call(query.unflatten(1, (h, -1)), None if mask is None else mask[:, 0], None, scaling, softcap)
    return grouped.attend([Segment(call.query, key, value, call.full_mask(key.shape[2]))], scaling, softcap)


def _refuse(kwargs: dict, mask: Tensor | None) -> None:
    """What we cannot honour is refused by name, never ignored."""
    if kwargs.get("s_aux") is not None:
        raise LowkeyError(
            "attention sinks (s_aux) are not supported by lowkey; use the model's own attention "
            "implementation"
        )
    if kwargs.get("output_attentions"):
        raise LowkeyError(
            "output_attentions=True: attention weights are never formed here; load the model with "
            "attn_implementation='eager'"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise LowkeyError(
            f"attention_mask of dtype {mask.dtype}: give a 2D padding mask or a boolean 4D mask (True = "
            "attend)"
        )
