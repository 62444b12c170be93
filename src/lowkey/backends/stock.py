"""Torch's own attention, for a chunk that meets nothing but itself."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of a chunk over itself.

    Args:
        query: (b, h, g, t, d).
        keys: (b, h, t, d).
        values: (b, h, t, d).
        mask: (b|1, t, t), True where a query may attend; None for causal attention.
        scaling: what scores are multiplied with.

    Returns:
        (b, h, g, t, d).
    """
    h, g, t = query.shape[1:4]
    allowed = None if mask is None else mask.unsqueeze(1)
    out = scaled_dot_product_attention(
        query.flatten(1, 2),
        keys,
        values,
        allowed,
        is_causal=mask is None and t > 1,
        scale=scaling,
        enable_gqa=g > 1,
    )
    return out.unflatten(1, (h, g))
