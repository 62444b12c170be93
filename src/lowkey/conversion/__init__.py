"""Trained multi-head or grouped-query checkpoints become models with a small cache, and what that costs at
the start is measured.

smaller = convert(model, "lrkv", lrkv_rank=12) loss = starting_loss(smaller, tokenizer)
"""

from __future__ import annotations

from lowkey.conversion.convert import convert, input_moments
from lowkey.conversion.exactness import Exactness, exactness
from lowkey.conversion.kinds import BASES, CONVERSIONS, FREQUENCIES, HEADS, ConversionOptions
from lowkey.conversion.record import Loss, conversion_record, save_conversion, starting_loss
from lowkey.conversion.target import CONVERSION_FIELDS

__all__ = [
    "BASES",
    "CONVERSIONS",
    "Exactness",
    "CONVERSION_FIELDS",
    "FREQUENCIES",
    "HEADS",
    "Loss",
    "ConversionOptions",
    "convert",
    "conversion_record",
    "exactness",
    "input_moments",
    "save_conversion",
    "starting_loss",
]
