"""The definition of low-rank attention with exact tokens, computed densely and slowly.

There is no cache, no latent and no segment in it.
"""

from __future__ import annotations

import sys

import torch
from pico import padding
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowkey.core.types import Factors, Layout
from lowkey.storage.exact import Exact


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    ids: Tensor,
    maps: dict[int, Factors],
    layout: Layout,
    exact: Exact,
    *,
    pads: list[int] | None = None,
    splits: list[int] | None = None,
) -> Tensor:
    """One forward of the whole sequence. `model` is the caller's own: its attention implementation is
    replaced.
    """
    pads, splits = pads or [0] * len(ids), splits or [ids.shape[1]]
    mask, positions = padding(pads, ids.shape[1])
    is_exact = exact_pairs(ids.shape[1], pads, exact, splits)

    def attention(module, q, k, v, attention_mask, *, scaling=None, softcap=None, **kwargs):
        if module.layer_idx not in maps:
            return _plain(module, q, k, v, attention_mask, scaling=scaling, softcap=softcap)
        f = maps[module.layer_idx]
        turn = (
            rotations(model, module.layer_idx, positions, k.shape[-1]).unsqueeze(1)
            if layout == "pre_rope"
            else None
        )
        keys, values = (k, _project_keys(k, f, turn)), (v, _project(v, f.v_down, f.v_up, f.order, f.v_mean))
        return _attend(
            q, keys, values, is_exact, _allowed(pads, ids.shape[1]), scaling=scaling, softcap=softcap
        )

    AttentionInterface.register("dense", attention)
    AttentionMaskInterface.register("dense", sdpa_mask)
    model.set_attn_implementation("dense")
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def exact_pairs(length: int, pads: list[int], exact: Exact, splits: list[int]) -> Tensor:
    """(b, t, s): does query i see key j exactly? j > i - recent, or j is one of the row's first `sinks` real
    tokens, or, under exact prefill, j came in the same piece of several tokens."""
    piece = torch.cat([torch.full((n,), i) for i, n in enumerate(splits)])
    out = torch.zeros(len(pads), length, length, dtype=torch.bool)
    for row, pad in enumerate(pads):
        for i in range(length):
            for j in range(i + 1):
                together = exact.prefill == "exact" and piece[i] == piece[j] and splits[piece[i]] > 1
                out[row, i, j] = j > i - exact.recent or pad <= j < pad + exact.sinks or bool(together)
    return out


def _allowed(pads: list[int], length: int) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.stack([causal & (torch.arange(length) >= p) for p in pads])


def _project_keys(k: Tensor, f: Factors, turn: Tensor | None) -> Tensor:
    """Keys (b, h, s, d) through down and up; with `turn` (b, 1, s, d, d), in the basis before rotation."""
    if turn is None:
        return _project(k, f.k_down, f.k_up, f.order, f.k_mean)
    plain = (k.unsqueeze(-2) @ torch.linalg.inv(turn)).squeeze(-2)
    return (_project(plain, f.k_down, f.k_up, f.order, f.k_mean).unsqueeze(-2) @ turn).squeeze(-2)


def _project(x: Tensor, down: Tensor, up: Tensor, order: Tensor | None, mean: Tensor | None) -> Tensor:
    """(b, h, s, d) through down and up, group by group of heads."""
    h, d = x.shape[1], x.shape[3]
    order = list(range(h)) if order is None else order.tolist()
    mean = torch.zeros(h, d) if mean is None else mean
    t, out = down.shape[1] // d, torch.empty_like(x)
    for first in range(0, h, t):
        group = down[first // t % len(down)]
        latent = sum(
            (x[:, order[j]] - mean[j]) @ group[(j - first) * d : (j - first + 1) * d]
            for j in range(first, first + t)
        )
        for j in range(first, first + t):
            out[:, order[j]] = latent @ up[j % len(up)] + mean[j]
    return out


def rotations(model: PreTrainedModel, layer: int, positions: Tensor, d: int) -> Tensor:
    """(b, s, d, d): R with rotated = x @ R, read off transformers' own function on the unit vectors."""
    config, module = model.config, model.get_decoder().rotary_emb
    kind = (config.layer_types[layer],) if config.model_type == "gemma3_text" else ()
    cos, sin = module(torch.empty(0), positions, *kind)
    units = torch.eye(d).view(1, d, 1, d).expand(len(positions), d, positions.shape[1], d)
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    return apply(units, units, cos, sin)[0].transpose(1, 2)


def _attend(q, keys, values, is_exact, allowed, *, scaling, softcap):
    """keys and values: the exact ones and the approximate ones; is_exact and allowed (b, t, s)."""
    groups = q.shape[1] // keys[0].shape[1]
    k, near_k, v, near_v = (x.repeat_interleave(groups, 1) for x in (*keys, *values))
    exact = is_exact.unsqueeze(1)
    scores = torch.where(exact, q @ k.mT, q @ near_k.mT) * (
        scaling if scaling is not None else q.shape[-1] ** -0.5
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
    out = (weights * exact) @ v + (weights * ~exact) @ near_v
    return out.transpose(1, 2).contiguous(), None


def _plain(module, q, k, v, mask, *, scaling, softcap):
    """A sliding layer: stock attention, soft-capped where the family asks for it."""
    if softcap is None:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)
    allowed = (
        mask[:, 0] if mask is not None else torch.ones(1, q.shape[2], k.shape[2], dtype=torch.bool).tril()
    )
    everything = torch.ones(1, q.shape[2], k.shape[2], dtype=torch.bool)
    return _attend(q, (k, k), (v, v), everything, allowed, scaling=scaling, softcap=softcap)
