"""Fast KVzip's gate (arXiv:2601.17668): attention of a token's small query to its own small key."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

WIDTH = 16  # of the gate's queries and keys
EPSILON = 1e-6  # of their normalisation


def sink_gate(
    x: Float[Tensor, "*n z"], gate: Mapping[str, Tensor], bias_factor: float = 1.0
) -> Float[Tensor, "*n h"]:
    """How much each KV head needs a token, between 0 and 1.

    With q_g = norm(W_g x + c_g) of each query head g of the KV head, k = norm(V x + e), and learned sinks
    k_s:
    `mean over g of 1 / (1 + sum over s of exp((k_s - k) . q_g / 4 - b_g))`, the attention of q_g to k beside
    the sinks.

    Args:
        x: what is known of a token.
        gate: `query` (h, g, 16, z) and `query_bias` (h, g, 16), `key` (h, 16, z) and `key_bias` (h, 16),
            `query_norm` and `key_norm` (16), `sinks` (h, s, 16) and `bias` (h, g).
        bias_factor: how often b counts. The published training adds it twice, the published inference once.
    """
    q = torch.einsum("...z,hgwz->...hgw", x, gate["query"]) + gate["query_bias"]
    k = torch.einsum("...z,hwz->...hw", x, gate["key"]) + gate["key_bias"]
    q, k = _normalised(q, gate["query_norm"]), _normalised(k, gate["key_norm"])
    own = (q * k.unsqueeze(-2)).sum(-1) / WIDTH**0.5 + bias_factor * gate["bias"]
    sinks = torch.einsum("...hgw,hsw->...hgs", q, gate["sinks"]) / WIDTH**0.5
    return (own - sinks.logsumexp(-1)).sigmoid().mean(-1)


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    """Vectors (..., 16) of root mean square 1, times a weight for each channel."""
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight
