"""What cache files call the tensors and counters of a layer.

Files of format 1 were defined by the attribute names of their time. Some attributes have been renamed since;
the files keep the old names, so that every cache of format 1 still loads.
"""

from __future__ import annotations

FILE_NAMES = {  # attribute of a layer: its name in files, where the two differ
    "choice_is_firm": "sure",
    "decode_steps": "steps",
    "end_index": "ended",
    "first_index": "first",
    "kept_channels": "channels",
    "kept_entries": "kept",
    "pruned_entries": "thin",
    "pruned_k": "thin_k",
    "pruned_positions": "thin_where",
    "pruned_starts": "thin_starts",
    "pruned_until": "until",
    "pruned_v": "thin_v",
    "recorded_queries": "asked",
    "sink_index": "sink_at",
}
ATTRIBUTES = {in_files: attribute for attribute, in_files in FILE_NAMES.items()}


def file_name(attribute: str) -> str:
    """The name in files of a layer's attribute."""
    return FILE_NAMES.get(attribute, attribute)


def attribute_name(in_files: str) -> str:
    """The inverse of `file_name`."""
    return ATTRIBUTES.get(in_files, in_files)
