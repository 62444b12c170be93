"""What is stored of keys, in words. Imports no torch: the command line checks these words."""

from __future__ import annotations

from typing import Literal

# keys are stored after or before their rotation by position (RoPE)
Layout = Literal["post_rope", "pre_rope"]
LAYOUTS: dict[Layout, str] = {
    "post_rope": "keys are stored rotated, and queries are carried into their basis",
    "pre_rope": "keys are stored before rotation, and rotated at their own positions when they are read",
}
# one basis for all KV heads of a layer, or one for each
Heads = Literal["shared", "per_head"]
HEADS: tuple[Heads, ...] = ("shared", "per_head")
