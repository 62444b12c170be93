"""The one attention function that we register with transformers, and what passes through it.

A cache layer of ours returns an `Incoming` in the place of keys and values. transformers passes it on to this
function untouched, which hands the query to that layer. Plain tensors, of a stock cache or a sliding layer,
go to transformers' own SDPA function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lowkey.backends import fused, grouped
from lowkey.backends.segment import Segment
from lowkey.core.types import LowkeyError
from lowkey.models import families

ATTENTION_NAME = "lowkey"
UNCOMPILED = (  # shown by torch.compile
    "lowkey: a cache grows from step to step and a graph does not, so it runs between compiled parts; leave "
    "out fullgraph=True"
)


@dataclass(frozen=True)
class Call:
    """One attention call.

    Args:
        query: (b, h, g, t, d), rotated.
        mask: (b|1, t, s) over all tokens seen, True where a query may attend; None for causal attention
            without padding.
        positions: (b|1, t), of the new tokens; None if the model does not give them.
        scaling: what scores are multiplied with.
        softcap: the soft cap of scores, or None.
    """

    query: Tensor
    mask: Tensor | None
    positions: Tensor | None
    scaling: float
    softcap: float | None

    def full_mask(self, seen: int) -> Tensor | None:
        """The mask written out.

        Args:
            seen: tokens seen, the new ones included.

        Returns:
            (b|1, t, seen), or None if every query sees everything.
        """
        t = self.query.shape[3]
        if self.mask is not None or t == 1:
            return self.mask
        return torch.ones(t, seen, dtype=torch.bool, device=self.query.device).tril(seen - t).unsqueeze(0)


class AttendingLayer(Protocol):
    """A cache layer that stores new tokens and computes attention itself."""

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store new tokens and answer the call.

        Args:
            keys: rotated keys (b, h, t, d).
            values: (b, h, t, d).
            call: queries, mask and positions.

        Returns:
            (b, h, g, t, d).
        """
        ...

    def call_answered(self, keys: Tensor, values: Tensor, call: Call) -> None:
        """Called with the arguments of `attend` when it returned."""
        return None

    def attend_succeeded(self) -> None:
        """Called when nothing can fail any more."""
        return None

    def attend_failed(self) -> None:
        """Called when `attend` or a check before it raised: undo this forward pass in every layer."""
        return None


def needed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask for SDPA; None where every query sees all tokens up to its own.

    That includes the later chunks of a prompt, for which transformers writes out a mask of queries by tokens.
    Arguments are those of `transformers.masking_utils.sdpa_mask`.
    """
    newest = isinstance(q_offset, int) and q_offset + q_length == kv_length and not kv_offset
    plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip
    known = attention_mask is None or not torch.compiler.is_compiling()
    if newest and plain and known:
        # of a step and of a first chunk, transformers asks itself; asked twice, a GPU would wait twice
        asks = attention_mask is not None and q_length not in (1, kv_length)
        if attention_mask is None or (asks and bool(attention_mask.all())):
            return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        # it would skip the mask of a first chunk over a cache of fixed size, too
        allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )


@dataclass(frozen=True)
class Incoming:
    """New keys and values on their way to a layer, which stores them when the query arrives.

    Args:
        layer: the layer.
        keys: rotated keys (b, h, t, d).
        values: (b, h, t, d).
    """

    layer: AttendingLayer
    keys: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the keys: libraries that wrap every attention function compare it with the queries'."""
        return self.keys.shape


def cast_for_autocast(x: Tensor) -> Tensor:
    """A tensor in the dtype that autocast, if it is on, gives the arguments of attention.

    Without this, rotated keys may be of a wider dtype than values.
    """
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model use our attention function, so that it can fill our caches.

    Only the text decoder changes, through transformers' public call. A stock cache behaves as before.

    Args:
        model: any supported model.

    Returns:
        The same model.

    Raises:
        LowkeyError: for a family that is not supported.
    """
    families.family(model.config)
    if not families.stores_own_form(model.config):
        families.geometry(model)  # refuses a model without a layer that could be compressed
    AttentionInterface.register(ATTENTION_NAME, attention)
    # class-wide: a mask function set on one object is ignored
    AttentionMaskInterface.register(ATTENTION_NAME, needed_mask)
    # not the whole model: it may have a vision tower, whose masks are of other kinds
    model.get_decoder().set_attn_implementation(ATTENTION_NAME)
    return model


def attached(model: PreTrainedModel) -> bool:
    """Whether `attach` was called with this model."""
    return model.config.get_text_config()._attn_implementation == ATTENTION_NAME


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Incoming,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers' SDPA function.

    Args:
        module: the attention module that calls.
        query: (b, H, t, d).
        key: (b, h, s, d), or the `Incoming` that a layer of ours returned.
        value: the same.
        attention_mask: (b|1, 1|H, t, s), boolean; None for causal attention.
        dropout: for stock caches.
        scaling: what scores are multiplied with; None for d ** -0.5.
        softcap: the soft cap of scores, or None.
        position_ids: (b|1, t), of the new tokens.
        **kwargs: passed on to SDPA for stock caches.

    Returns:
        (output (b, t, H, d), None), since weights are never formed.

    Raises:
        LowkeyError: for what is not supported, like `s_aux` or a float mask.
    """
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
    """Attention by a layer of ours, which is told whether it succeeded.

    Under `torch.compile` it runs uncompiled, between compiled parts. Autocast is off inside: the layer took
    keys and values in autocast's dtype, and computes in that or a wider one.
    """
    try:
        with torch.autocast(query.device.type, enabled=False):
            result = _attention(module, query.to(key.keys.dtype), key, *args, **kwargs)
    except BaseException:
        key.layer.attend_failed()
        raise
    key.layer.attend_succeeded()
    return result


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
    _check_supported(kwargs, attention_mask)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(key, Incoming):
        mask = _shared_mask(attention_mask, query)
        call = Call(query.unflatten(1, (key.keys.shape[1], -1)), mask, position_ids, scale, softcap)
        out = key.layer.attend(key.keys, key.values, call)
        key.layer.call_answered(key.keys, key.values, call)
    elif softcap is not None:
        out = _softcapped_attention(query, key, value, attention_mask, scale, softcap)
    elif attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        out = _later_chunk(query, key, value, scale, dropout)
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
    """The mask (b|1, t, s) that all heads of our layers get, from one of shape (b|1, 1|H, t, s).

    Raises:
        LowkeyError: if its heads differ.
    """
    if mask is None:
        return None
    _check_shape(mask, query)
    first = mask[:, :1]
    # a stride of 0 says that one mask was expanded over the heads, so there is nothing to compare
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


def _later_chunk(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attention of the newest queries over stock keys without a mask, which SDPA would align with the oldest.

    Returns:
        (b, h, g, t, d).
    """
    h, t, s = key.shape[1], query.shape[2], key.shape[2]
    grouped_query = query.unflatten(1, (h, -1))
    if not dropout and fused.gives_lse(grouped_query, key, None):
        return fused.causal_newest(grouped_query, key, value, scaling)[0].to(query.dtype)
    mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    out = scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] > h
    )
    return out.unflatten(1, (h, -1))


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Attention over stock keys with a soft cap, which SDPA would silently leave out."""
    b, heads, h = *query.shape[:2], key.shape[1]
    if mask is not None:
        _check_shape(mask, query)
    if mask is not None and mask.shape[1] > 1:  # heads have masks of their own: treat them as sequences
        mask = mask.expand(b, -1, -1, -1).flatten(0, 1)
        query, key, value = (
            x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1).unsqueeze(1)
            for x in (query, key, value)
        )
        out = _softcapped_attention(query, key, value, mask.unsqueeze(1), scaling, softcap)
        return out.view(b, h, heads // h, *out.shape[3:])
    call = Call(query.unflatten(1, (h, -1)), None if mask is None else mask[:, 0], None, scaling, softcap)
    return grouped.attend([Segment(call.query, key, value, call.full_mask(key.shape[2]))], scaling, softcap)


def _check_supported(kwargs: dict, mask: Tensor | None) -> None:
    """Refuse by name what cannot be honoured, and never ignore it. Raises: LowkeyError."""
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
