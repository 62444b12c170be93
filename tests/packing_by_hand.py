"""Packed storage written out by hand: whole matrices, rounded group by group in loops."""

from __future__ import annotations

import math
from dataclasses import asdict

import dense
import numpy as np
import pico
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import lowkey
from lowkey import Exact
from lowkey.core.types import identity_factors
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan

BLOCK, D, HEADS = 32, pico.HEAD_DIM, 4
RECENT = {"kivi2": BLOCK, "kivi4": BLOCK, "kivi8": BLOCK}
# under kivi two blocks of the longer row have left the window, and one of the shorter, cut elsewhere
LENGTH, PADS = 100, [41, 0]
# a number between two steps may go to the other after a sum in another order
TOLERANCE = {2: 0.1, 4: 2e-2, 8: 2e-3}


def merged(t_k, t_v):
    """Random factors in which t_k heads share a latent of keys and t_v one of values."""
    return lambda m: {
        i: pico.merged_factors(HEADS, 5, 9, t_k, t_v, seed=i) for i in families.geometry(m).compressible
    }


FORMS = {  # (layout, factors of the layers)
    "plain": ("post_rope", None),
    "post": ("post_rope", lambda m: pico.layer_factors(m, 10, 5)),
    "pre": ("pre_rope", lambda m: pico.layer_factors(m, 5, 10, shared=True)),
    "merged": ("post_rope", merged(2, 4)),
    "merged-pre": ("pre_rope", merged(4, 2)),
}


def plan(model, form):
    """The plan of a form, or None where keys and values are stored as they are."""
    layout, factors = FORMS[form]
    if factors is None:
        return None
    about = {"name": "pca", "parameters": {}}
    known = {"model": "pico", "model_sha256": model_fingerprint(model)}
    return Plan(
        factors(model),
        layout,
        about,
        about,
        "50%",
        asdict(families.geometry(model)),
        known,
        orthonormal=False,
    )


def packed(model, name, form="plain", exact=None):
    """exact: the scheme's own when None, and no sinks, so that most of these short texts is packed."""
    return lowkey.make_cache(model, plan(model, form), bits=name, exact=effective(name, exact))


def close(a, b, tolerance):
    """Nowhere further than a code that went the other way takes it, and mostly much closer."""
    error, size = (a - b).abs(), max(1.0, float(b.abs().max()))
    assert a.shape == b.shape
    assert error.max() <= tolerance * size and error.mean() <= tolerance * size / 20


def tolerance(name):
    """Relative tolerance of a packing scheme, by its number of bits."""
    return TOLERANCE[int(name[-1])]


def effective(name, exact):
    """The exact tokens of a scheme when none are asked for."""
    return exact or Exact(recent=RECENT.get(name, 0))


def group_size(width, bits):
    """Channels that share a scale: at most 32, as even as can be, whole bytes."""
    size = math.ceil(width / math.ceil(width / 32))
    return size + -size % (8 // bits)


def rounded_group(x, bits):
    """Numbers of one group, rounded to 2**bits levels between their minimum and maximum."""
    low, high = min(x), max(x)
    step = max(np.float32((high - low) / np.float32(2**bits - 1)), np.float32(1e-8))
    return [np.rint((value - low) / step) * step + low for value in x]


def rounded(latent, per_channel, bits):
    """(s, w), one row's real tokens; tokens that fill no block stay as they are, and no query sees them
    rounded.
    """
    x = latent.numpy().copy()
    tokens, width = x.shape
    if per_channel:
        for start in range(0, tokens - BLOCK + 1, BLOCK):
            for c in range(width):
                x[start : start + BLOCK, c] = rounded_group(x[start : start + BLOCK, c], bits)
        return torch.from_numpy(x)
    size = group_size(width, bits)
    for token in range(tokens):
        for c in range(0, width, size):
            x[token, c : c + size] = rounded_group(x[token, c : c + size], bits)
    return torch.from_numpy(x)


def hadamard(n):
    """Of blocks of powers of two: the sign is the parity of the common bits of row and column."""
    out, start = torch.zeros(n, n), 0
    for size in (1 << i for i in reversed(range(n.bit_length())) if n >> i & 1):
        for i in range(size):
            for j in range(size):
                out[start + i, start + j] = (-1) ** (i & j).bit_count() / math.sqrt(size)
        start += size
    return out


def through(x, down, up, mean, order, how):
    """(h, s, d) of one row, head by head into the latents of its group, rounded, and back."""
    h, _, d = x.shape
    t, order = down.shape[1] // d, range(h) if order is None else order.tolist()
    out = torch.empty_like(x)
    turn = hadamard(down.shape[2]) if how["turned"] else torch.eye(down.shape[2])
    for g in range(h // t):
        members = order[g * t : g * t + t]
        means = [mean[g * t + a] if mean is not None else 0.0 for a in range(t)]
        joint = torch.cat([x[j] - m for j, m in zip(members, means, strict=True)], 1)
        latent = rounded(joint @ down[g % len(down)] @ turn, how["per_channel"], how["bits"]) @ turn
        for a, j in enumerate(members):
            out[j] = latent @ up[(g * t + a) % len(up)] + means[a]
    return out


def exact_pairs(length, pads, exact, splits, block, sinks=None):
    """(b, t, s): as `dense.exact_pairs`, but tokens leave the window in whole blocks, counted from each row's
    first real token.
    sinks: indices of each row, in the place of its first real tokens."""
    sinks = sinks or [range(p, p + exact.sinks) for p in pads]
    piece = [i for i, n in enumerate(splits) for _ in range(n)]
    out = torch.zeros(len(pads), length, length, dtype=torch.bool)
    for row, pad in enumerate(pads):
        for i in range(pad, length):
            left = max(0, i + 1 - pad - exact.recent) // block * block
            for j in range(pad, i + 1):
                together = exact.prefill == "exact" and piece[i] == piece[j] and splits[piece[i]] > 1
                out[row, i, j] = j - pad >= left or j in sinks[row] or together
    return out


@torch.no_grad()
def oracle(ids, name, form, exact, pads, splits, model=None, sinks=None):
    """One forward of the whole text; `model` is the caller's own, its attention is replaced."""
    model = model or pico.build("llama")
    (layout, factors), bits, length = FORMS[form], int(name[-1]), ids.shape[1]
    maps = factors(model) if factors else {i: identity_factors(D) for i in range(pico.LAYERS)}
    mask, positions = pico.padding(pads, length)
    is_exact = exact_pairs(length, pads, exact, splits, BLOCK if name.startswith("kivi") else 1, sinks)

    def attention(module, q, k, v, attention_mask, *, scaling=None, softcap=None, **kwargs):
        f, near_k, near_v = maps[module.layer_idx], k.clone(), v.clone()
        turn = dense.rotations(model, module.layer_idx, positions, D) if layout == "pre_rope" else None
        how = {"bits": bits, "turned": name.startswith("hadamard")}
        for row, pad in enumerate(pads):
            keys = k[row, :, pad:]
            if turn is not None:
                keys = (keys.unsqueeze(-2) @ torch.linalg.inv(turn[row, pad:])).squeeze(-2)
            keys = through(
                keys, f.k_down, f.k_up, f.k_mean, f.order, {**how, "per_channel": name.startswith("kivi")}
            )
            near_k[row, :, pad:] = (
                keys if turn is None else (keys.unsqueeze(-2) @ turn[row, pad:]).squeeze(-2)
            )
            near_v[row, :, pad:] = through(
                v[row, :, pad:], f.v_down, f.v_up, f.v_mean, f.order, {**how, "per_channel": False}
            )
        return dense._attend(
            q,
            (k, near_k),
            (v, near_v),
            is_exact,
            dense._allowed(pads, length),
            scaling=scaling,
            softcap=softcap,
        )

    AttentionInterface.register("dense-packed", attention)
    AttentionMaskInterface.register("dense-packed", sdpa_mask)
    model.set_attn_implementation("dense-packed")
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
