"""Second moments of stored activations, computed slowly."""

from __future__ import annotations

import sys

import pico
import torch
from pico import stock

from lowkey.models import families


@torch.no_grad()
def activations(name: str, layer: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """(n, h, d) keys, values and (n, H, d) queries of every token, from the projections themselves."""
    model = stock(name)
    block = families.decoder_layers(model)[layer].self_attn
    x = families.attention_input(model, layer, model(ids, output_hidden_states=True).hidden_states[layer])
    q, k, v = project(model, block, x)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    cos, sin = families.rope(model, layer).embeddings(positions, x)
    post_q, post_k = sys.modules[type(model).__module__].apply_rotary_pos_emb(q, k, cos, sin)
    found = {"queries_pre": q, "keys_pre": k, "queries_post": post_q, "keys_post": post_k, "values": v}
    return {"inputs": x.flatten(0, 1).double()} | {
        n: y.transpose(1, 2).flatten(0, 1).double() for n, y in found.items()
    }


def project(model, block, x):
    """(b, h, t, d) queries, keys, values before rotation; where each family puts its norms is written out
    here.
    """
    kind, shape = model.config.model_type, (*x.shape[:2], -1, pico.HEAD_DIM)
    if kind == "phi3":
        heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
        q, k, v = block.qkv_proj(x).view(shape).split([heads, kv, kv], dim=2)
    else:
        q, k, v = block.q_proj(x), block.k_proj(x), block.v_proj(x)
        if kind == "olmo2":  # over all heads together
            q, k = block.q_norm(q), block.k_norm(k)
        q, k, v = (y.view(shape) for y in (q, k, v))
    if kind in ("qwen3", "gemma3_text"):  # per head
        q, k = block.q_norm(q), block.k_norm(k)
    return (y.transpose(1, 2) for y in (q, k, v))


def outer(x: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of x x^T, one token after another."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for row in x:
        total += torch.outer(row, row)
    return total
