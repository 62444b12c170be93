"""Trained multi-head or grouped-query checkpoints become models with a small cache, and what that costs at
the start is measured.

smaller = convert(model, "lrkv", lrkv_rank=12) loss = starting_loss(smaller, tokenizer)
"""

from __future__ import annotations

from lowkey.conversion.convert import convert, input_moments
from lowkey.conversion.exactness import Exactness, exactness
from lowkey.conversion.kinds import BASES, CONVERSIONS, FREQUENCIES, HEADS, Options
from lowkey.conversion.record import Loss, describe, save, starting_loss
from lowkey.conversion.target import FIELDS

__all__ = [
    "BASES",
    "CONVERSIONS",
    "Exactness",
    "FIELDS",
    "FREQUENCIES",
    "HEADS",
    "Loss",
    "Options",
    "convert",
    "describe",
    "exactness",
    "input_moments",
    "save",
    "starting_loss",
]
