"""Seeds of random numbers that depend on what they are for, so that resumed work draws the same numbers."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts, such as a run's seed and the number of a step."""
    # 7 bytes, since torch takes seeds below 2^63
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
