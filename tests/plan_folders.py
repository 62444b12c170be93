"""Saved plans that tests damage: edited files with checksums that fit."""

from __future__ import annotations

import pico

from lowkey.plan.plan import Plan

MODEL = "llama"


def make(rank_k=6, rank_v=9, model=None, **fields) -> Plan:
    """A plan of the pico model with random factors of these ranks."""
    return pico.plan(model or pico.stock(MODEL), rank_k, rank_v, **fields)
