"""Checks that a cache layer that was read from a file holds what such a layer can hold.

Shapes are checked against the model, counts against one another, and rows must begin where they can. Kernels
use these numbers without any check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowkey.storage.coded import CodedLayer
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.flaws import first_flaw, packed_rows_flaw, rows_flaw, unlike
from lowkey.storage.stored_tokens import EMPTY

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
        t.is_floating_point() and name not in ("rows_scores", "dense_scores") and not bool(t.isfinite().all())
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
    held_exactly = layer.seen - layer.front_start - stored
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
    heads, b, n = shape[0], len(layer.offset), layer.kept_entries
    if not layer.front_start <= layer.seen or layer.decode_steps > layer.seen:
        return f"it counts more than the {layer.seen} tokens seen"
    rows = layer.rows
    scores = n if layer.policy.stateful else 0
    if rule := _coded(layer, shape) or first_flaw(
        unlike("rows_positions", rows.positions, n),
        unlike("rows_starts", rows.starts, b * layer.row_heads + 1),
        unlike("rows_scores", rows.scores, scores),
        _recorded_queries(layer, (b, heads, groups), shape[1]),
        _dense_scores(layer, b),
    ):
        return rule
    if rule := rows_flaw(layer, layer.row_heads, rows.starts, rows.positions, n):
        return rule
    rules = [
        packed_rows_flaw(
            layer,
            [f"rows_{attribute}" for attribute in layer.packed_attributes(name)],
            packing,
            rows.starts,
            layer.shapes[name],
        )
        for name, packing in layer.packing.items()
    ]
    return first_flaw(*rules, layer.own_flaw(heads, shape[1], shape[2]))


def _dense_scores(layer: EvictingLayer, b: int) -> str | None:
    scores = layer.dense_scores
    if not layer.policy.stateful:
        return unlike("dense_scores", scores, 0)
    fits = scores.ndim == 3 and scores.shape[:2] == (b, layer.row_heads)
    fits = fits and scores.shape[2] <= layer.seen - layer.front_start
    return None if fits else f"dense_scores is of shape {tuple(scores.shape)}"


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
