"""A plan that tests save, and what a folder then holds."""

from __future__ import annotations

from pathlib import Path

import pico

from lowkey.plan.plan import Plan


def plan(rank: int = 6) -> Plan:
    return pico.plan(pico.stock("llama"), rank, rank)


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}
