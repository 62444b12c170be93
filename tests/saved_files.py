"""A plan that tests save, and what a folder then holds."""

from __future__ import annotations

from pathlib import Path

import pico

from lowkey.plan.plan import Plan


def plan(rank: int = 6) -> Plan:
    """A plan of the llama model with random factors of one rank."""
    return pico.plan(pico.stock("llama"), rank, rank)


def entries(folder: Path) -> set[str]:
    """Names of what a folder holds."""
    return {p.name for p in folder.iterdir()}
