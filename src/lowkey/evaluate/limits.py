"""What a measurement may ask for. Imports no torch: the command line checks it before torch is loaded."""

from __future__ import annotations

from lowkey.core.errors import LowkeyError


def check_head_groups(heads: int, kv_heads: int) -> None:
    """Check that every KV head serves the same number of query heads.

    Args:
        heads: number of query heads, at least 1.
        kv_heads: number of KV heads, at least 1.

    Raises:
        LowkeyError: if one is no multiple of the other.
    """
    if heads % kv_heads:
        remedy = f"try {-(-heads // kv_heads) * kv_heads}"
        raise LowkeyError(f"heads {heads}: must be a multiple of kv_heads {kv_heads}; {remedy}")
