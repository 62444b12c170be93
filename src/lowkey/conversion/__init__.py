"""Convert trained multi-head or grouped-query checkpoints into models with a small cache, and measure what
that costs at the start.

    smaller = convert(model, "lrkv", lrkv_rank=12)
    loss = starting_loss(smaller, tokenizer)

`source` reads a trained model, `target` makes the new configuration, `kinds` has one conversion for each
attention kind, `gauge` aligns heads first, `exactness` says whether a conversion loses anything, and `record`
measures and saves it. May import every room up to `models` and `plan`, and `attention`.
"""

from __future__ import annotations

from lowkey.conversion.convert import convert, input_moments
from lowkey.conversion.exactness import Exactness, exactness
from lowkey.conversion.kinds import BASES, CONVERSIONS, FREQUENCIES, HEAD_POOLINGS, ConversionOptions
from lowkey.conversion.record import Loss, conversion_record, save_conversion, starting_loss
from lowkey.conversion.target import CONVERSION_FIELDS

__all__ = [
    "BASES",
    "CONVERSIONS",
    "Exactness",
    "CONVERSION_FIELDS",
    "FREQUENCIES",
    "HEAD_POOLINGS",
    "Loss",
    "ConversionOptions",
    "convert",
    "conversion_record",
    "exactness",
    "input_moments",
    "save_conversion",
    "starting_loss",
]
