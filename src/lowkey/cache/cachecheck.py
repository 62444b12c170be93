"""Checks that a cache layer that was read from a file holds what such a layer can hold.

Shapes are checked against the model, counts against one another, and rows must begin where they can. Kernels
use these numbers without any check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowkey.cache.file_names import file_name
from lowkey.ops.ragged import row_of
from lowkey.storage.coded import EMPTY, CodedLayer
from lowkey.storage.compensating import CompensatingLayer
from lowkey.storage.evicting import TAIL_STEP, EvictingLayer
from lowkey.storage.pruning import PruningLayer

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
    if any(
        t.is_floating_point() and name != "previous_scores" and not bool(t.isfinite().all())
        for name, t in own.items()
    ):
        return "it holds NaN or infinite numbers"
    if isinstance(layer, EvictingLayer):
        return _placed(layer) or _evicting(layer, shape, groups)
    if isinstance(layer, CodedLayer):
        return _placed(layer) or _coded(layer, shape)
    return _stock(layer, shape)


def _unlike(name: str, t: Tensor, *shape: int) -> str | None:
    """The rule that a tensor breaks if it has another shape."""
    return (
        None if tuple(t.shape) == shape else f"{file_name(name)} is of shape {tuple(t.shape)} and not {shape}"
    )


def _first(*rules: str | None) -> str | None:
    return next((rule for rule in rules if rule), None)


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
    return _first(
        _unlike("keys", layer.keys, b, heads, tokens, k), _unlike("values", layer.values, b, heads, tokens, v)
    )


def _placed(layer: Any) -> str | None:
    """Check where the tokens of each sequence are: at positions that a model has."""
    offset, first = layer.offset, getattr(layer, "first_index", None)
    if offset.ndim != 2 or offset.shape[1] != 1 or not len(offset):
        return f"offset is of shape {tuple(offset.shape)}"
    if bool((offset > layer.seen).any()) or bool((offset <= layer.seen - 2**31).any()):
        return "offset puts tokens where no positions are"
    if first is not None:
        if rule := _unlike("first_index", first, len(offset), 1):
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
    near = layer.seen - stored
    rules = [
        _unlike("recent_k", layer.recent_k, b, heads, near, k),
        _unlike("recent_v", layer.recent_v, b, heads, near, v),
        _unlike("sink_k", layer.sink_k, b, heads, exact.sinks, k),
        _unlike("sink_v", layer.sink_v, b, heads, exact.sinks, v),
        _unlike("sink_index", layer.sink_index, b, exact.sinks) if "sink_index" in layer.tensors() else None,
        _unlike("end_index", layer.end_index, b, 1) if layer.form_depends_on_age else None,
    ]
    for name, packing in layer.packing.items():
        groups, width = layer.shapes[name]
        like = packing.pack(torch.empty(b, groups, stored, width, dtype=layer.recent_k.dtype, device="meta"))
        names = zip(layer.packed_attributes(name), layer.packed_tensors(name), like, strict=True)
        rules += [_unlike(attribute, part, *other.shape) for attribute, part, other in names]
    at = layer.sink_index
    if not bool((((at >= 0) & (at < layer.seen)) | (at == EMPTY)).all()):
        rules.append("sink_at is not among the tokens seen")
    if layer.form_depends_on_age and _first(*rules) is None:
        begun = layer.first_index < layer.seen
        if bool(
            torch.where(
                begun,
                (layer.end_index <= layer.first_index) | (layer.end_index > layer.seen),
                layer.end_index != 0,
            ).any()
        ):
            rules.append("ended is not behind the tokens seen")
    return _first(*rules)


def _evicting(layer: EvictingLayer, shape: HeadShape, groups: int) -> str | None:
    """Check an `EvictingLayer` of any kind."""
    heads, b = shape[0], len(layer.offset)
    room = layer.joined_length + -(-(layer.tail_length - layer.joined_length) // TAIL_STEP) * TAIL_STEP
    if not 0 <= layer.joined_length <= layer.tail_length <= layer.seen or layer.decode_steps > layer.seen:
        return (
            f"it counts {layer.joined_length} of {layer.tail_length} tokens in the tail of {layer.seen} seen"
        )
    keys, values = (torch.empty(1, heads, 0, d).to(layer.tail_k) for d in shape[1:])
    stored = [x.shape[-1] for x in layer.codec.encode(keys, values, layer.offset[:1, :0])]
    more: list[str | None] = []
    if isinstance(layer, CompensatingLayer):
        more += [
            _unlike(n, getattr(layer, n), b, heads, 1, w)
            for n, w in (("mean_k", stored[0]), ("mean_v", stored[1]))
        ]
        more.append(_unlike("dropped", layer.dropped, b, heads, 1))
        more.append("it counts less than nothing dropped" if bool((layer.dropped < 0).any()) else None)
    return _first(
        _unlike("tail_k", layer.tail_k, b, heads, room, stored[0]),
        _unlike("tail_v", layer.tail_v, b, heads, room, stored[1]),
        _unlike("keys", layer.keys, layer.kept_entries, stored[0]),
        _unlike("values", layer.values, layer.kept_entries, stored[1]),
        _unlike("positions", layer.positions, layer.kept_entries),
        _unlike("previous_scores", layer.previous_scores, layer.kept_entries if layer.policy.stateful else 0),
        _unlike("starts", layer.starts, b * heads + 1),
        _asked(layer, (b, heads, groups), shape[1]),
        *more,
    ) or _first(
        _rows(layer, heads, layer.starts, layer.positions, layer.kept_entries),
        _pruned(layer, b, heads, stored[0]) if isinstance(layer, PruningLayer) else None,
    )


def _pruned(layer: PruningLayer, b: int, heads: int, width: int) -> str | None:
    """Check the tokens whose keys lost channels, and the channels that they have left."""
    at, until = layer.kept_channels.long(), layer.pruned_until
    wrong = _first(
        _unlike("pruned_k", layer.pruned_k, layer.pruned_entries, layer.channel_count),
        _unlike("pruned_v", layer.pruned_v, layer.pruned_entries, layer.values.shape[-1]),
        _unlike("pruned_positions", layer.pruned_positions, layer.pruned_entries),
        _unlike("pruned_starts", layer.pruned_starts, b * heads + 1),
        _unlike("kept_channels", layer.kept_channels, b, layer.prunings, heads, layer.channel_count),
        _unlike("pruned_until", until, b, layer.prunings),
        _unlike("choice_is_firm", layer.choice_is_firm, b, 1),
    )
    if wrong:
        return wrong
    if bool(((at < 0) | (at >= width)).any()) or bool((at.diff(dim=3) <= 0).any()):
        return "channels are not those of a key, ascending"
    if bool((until.diff(dim=1) < 0).any()):
        return "a pruning went less far than the one before"
    wrong = _rows(layer, heads, layer.pruned_starts, layer.pruned_positions, layer.pruned_entries)
    if wrong or not layer.pruned_entries:
        return wrong
    late = (
        layer.pruned_positions >= until[:, -1][row_of(layer.pruned_starts) // heads]
        if layer.prunings
        else layer.pruned_positions >= 0
    )
    return "tokens lost channels that no pruning took" if bool(late.any()) else None


def _asked(layer: EvictingLayer, rows: tuple[int, int, int], width: int) -> str | None:
    asked = layer.recorded_queries
    if not asked.numel():
        return None if asked.ndim == 1 else f"asked is of shape {tuple(asked.shape)}"
    fits = (
        asked.ndim == 5
        and asked.shape[:3] == rows
        and asked.shape[4] == width
        and asked.shape[3] <= layer.seen
    )
    return None if fits else f"asked is of shape {tuple(asked.shape)}"


def _rows(layer: EvictingLayer, heads: int, starts: Tensor, where: Tensor, kept: int) -> str | None:
    """Check that rows lie one behind another, with tokens from before the tail, each once and in order."""
    where = where.long()
    if int(starts[0]) != 0 or int(starts[-1]) != kept or bool((starts.diff() < 0).any()):
        return "rows do not begin one behind the other"
    if not kept:
        return None
    row = row_of(starts)
    index = where + layer.offset[:, 0][row // heads]
    if bool(((index < 0) | (index >= layer.seen - layer.tail_length)).any()):
        return "positions are not among those of the tokens seen"
    together = row[1:] == row[:-1]
    return "positions of a row do not rise" if bool((together & (where.diff() <= 0)).any()) else None
