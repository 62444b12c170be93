"""Checks that a cache layer that was read from a file holds what such a layer can hold.

Shapes are checked against the model, counts against one another, and rows must begin where they can. Kernels
use these numbers without any check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowkey.storage.coded import EMPTY, CodedLayer
from lowkey.storage.evicting import TAIL_STEP, EvictingLayer
from lowkey.storage.flaws import first_flaw, rows_flaw, unlike

HeadShape = tuple[int, int, int]
"""(heads, width of a key, width of a value) that a layer stores."""


def flaw(layer: Any, own: dict[str, Tensor], shape: HeadShape, groups: int) -> str | None:
    """The first rule that a layer breaks.

    Args:
        layer: the layer.
        own: its tensors, by attribute.
        shape: heads and widths that it must store.
        groups: query heads per KV head.

    Returns:
        The rule in words, or None.
    """
    # scores may be infinite: they say that a token stays
    if any(
        t.is_floating_point() and name != "previous_scores" and not bool(t.isfinite().all())
        for name, t in own.items()
    ):
        return "it holds NaN or infinite numbers"
    if isinstance(layer, EvictingLayer):
        return _positioned(layer) or _evicting(layer, shape, groups)
    if isinstance(layer, CodedLayer):
        return _positioned(layer) or _coded(layer, shape)
    return _stock(layer, shape)


def _stock(layer: Any, shape: HeadShape) -> str | None:
    """Check transformers' own layers, full and sliding."""
    heads, k, v = shape
    if layer.keys.ndim != 4 or not len(layer.keys):
        return f"keys are of shape {tuple(layer.keys.shape)}"
    b, tokens = layer.keys.shape[0], layer.keys.shape[2]
    if layer.is_sliding and tokens != min(layer.cumulative_length, layer.sliding_window - 1):
        return (
            f"it holds {tokens} tokens of {layer.cumulative_length} seen under a window of "
            f"{layer.sliding_window}"
        )
    return first_flaw(
        unlike("keys", layer.keys, b, heads, tokens, k), unlike("values", layer.values, b, heads, tokens, v)
    )


def _positioned(layer: Any) -> str | None:
    """Check where the tokens of each sequence are: at positions that a model has."""
    offset, first = layer.offset, getattr(layer, "first_index", None)
    if offset.ndim != 2 or offset.shape[1] != 1 or not len(offset):
        return f"offset is of shape {tuple(offset.shape)}"
    # positions are indices less the offset, and are held in 32 bits
    if bool((offset > layer.seen).any()) or bool((offset <= layer.seen - 2**31).any()):
        return "offset puts tokens where no positions are"
    if first is not None:
        if rule := unlike("first_index", first, len(offset), 1):
            return rule
        if bool(((first < 0) | (first > layer.seen)).any()):
            return "first is not among the tokens seen"
    return None


def _coded(layer: CodedLayer, shape: HeadShape) -> str | None:
    """Check a `CodedLayer`."""
    (heads, k, v), b, exact = shape, len(layer.offset), layer.exact
    stored, ahead = layer.storable()
    if not 0 <= stored <= ahead <= layer.seen:
        return f"{stored} to {ahead} tokens of {layer.seen} seen would be stored"
    held_exactly = layer.seen - stored
    rules = [
        unlike("recent_k", layer.recent_k, b, heads, held_exactly, k),
        unlike("recent_v", layer.recent_v, b, heads, held_exactly, v),
        unlike("sink_k", layer.sink_k, b, heads, exact.sinks, k),
        unlike("sink_v", layer.sink_v, b, heads, exact.sinks, v),
        unlike("sink_index", layer.sink_index, b, exact.sinks) if "sink_index" in layer.tensors() else None,
        unlike("end_index", layer.end_index, b, 1) if layer.form_depends_on_age else None,
    ]
    for name, packing in layer.packing.items():
        groups, width = layer.shapes[name]
        # packing tensors without memory tells the shapes that files of such a layer must have
        like = packing.pack(torch.empty(b, groups, stored, width, dtype=layer.recent_k.dtype, device="meta"))
        names = zip(layer.packed_attributes(name), layer.packed_tensors(name), like, strict=True)
        rules += [unlike(attribute, part, *other.shape) for attribute, part, other in names]
    # every sink slot is empty or names a token that was seen
    at = layer.sink_index
    if not bool((((at >= 0) & (at < layer.seen)) | (at == EMPTY)).all()):
        rules.append("sink_at is not among the tokens seen")
    if layer.form_depends_on_age and first_flaw(*rules) is None:
        # a sequence ends behind its first token; one without tokens has no end yet
        begun = layer.first_index < layer.seen
        if bool(
            torch.where(
                begun,
                (layer.end_index <= layer.first_index) | (layer.end_index > layer.seen),
                layer.end_index != 0,
            ).any()
        ):
            rules.append("ended is not behind the tokens seen")
    return first_flaw(*rules)


def _evicting(layer: EvictingLayer, shape: HeadShape, groups: int) -> str | None:
    """Check an `EvictingLayer` of any kind."""
    heads, b = shape[0], len(layer.offset)
    # as `EvictingLayer.predicted_nbytes`: the tail grows by whole steps
    room = layer.joined_length + -(-(layer.tail_length - layer.joined_length) // TAIL_STEP) * TAIL_STEP
    if not 0 <= layer.joined_length <= layer.tail_length <= layer.seen or layer.decode_steps > layer.seen:
        return (
            f"it counts {layer.joined_length} of {layer.tail_length} tokens in the tail of {layer.seen} seen"
        )
    # encoding no tokens tells the widths that the codec stores
    keys, values = (torch.empty(1, heads, 0, d).to(layer.tail_k) for d in shape[1:])
    stored = [x.shape[-1] for x in layer.codec.encode(keys, values, layer.offset[:1, :0])]
    return first_flaw(
        unlike("tail_k", layer.tail_k, b, heads, room, stored[0]),
        unlike("tail_v", layer.tail_v, b, heads, room, stored[1]),
        unlike("keys", layer.keys, layer.kept_entries, stored[0]),
        unlike("values", layer.values, layer.kept_entries, stored[1]),
        unlike("positions", layer.positions, layer.kept_entries),
        unlike("previous_scores", layer.previous_scores, layer.kept_entries if layer.policy.stateful else 0),
        unlike("starts", layer.starts, b * heads + 1),
        _recorded_queries(layer, (b, heads, groups), shape[1]),
    ) or first_flaw(
        rows_flaw(layer, heads, layer.starts, layer.positions, layer.kept_entries),
        layer.own_flaw(heads, stored[0], stored[1]),
    )


def _recorded_queries(layer: EvictingLayer, rows: tuple[int, int, int], width: int) -> str | None:
    queries = layer.recorded_queries
    if not queries.numel():
        return None if queries.ndim == 1 else f"asked is of shape {tuple(queries.shape)}"
    fits = (
        queries.ndim == 5
        and queries.shape[:3] == rows
        and queries.shape[4] == width
        and queries.shape[3] <= layer.seen
    )
    return None if fits else f"asked is of shape {tuple(queries.shape)}"
