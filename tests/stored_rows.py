"""Rows as packings hold them, and attention over them in loops in fp64."""

from __future__ import annotations

import torch

from lowkey.ops.ragged import starts_of
from lowkey.storage.packing import PerChannel, PerToken, Unpacked
from lowkey.storage.rows import pack_rows, stored_in_rows

PACKINGS = {
    "plain": Unpacked(),
    **{f"token{n}": PerToken(n) for n in (8, 4, 2)},
    **{f"channel{n}": PerChannel(n) for n in (8, 4, 2)},
}


def draw(lengths, latents, width, dtype, seed):
    """(n, a, r), seeded, with a channel that is much larger than the others."""
    x = torch.randn(sum(lengths), latents, width, generator=torch.Generator().manual_seed(seed))
    x[..., width // 2] *= 8
    return x.to(dtype)


def ragged(name, x, lengths):
    """(what is stored of these rows, the numbers (n, a, r) in fp64 that it stands for)."""
    packing, starts = PACKINGS[name], starts_of(torch.tensor(lengths, dtype=torch.long))
    parts = pack_rows(packing, x, starts)
    side = stored_in_rows(packing, parts, x.shape[2], starts)
    return side, by_hand(packing, parts, x.shape[2], lengths)


def by_hand(packing, parts, width, lengths):
    """The numbers that packed rows stand for, number by number."""
    if len(parts) == 1:
        return parts[0].double()
    codes, scale, low = (p.double() if p.is_floating_point() else p.long() for p in parts)
    per = 8 // packing.bits
    digits = torch.stack([codes >> (packing.bits * i) & (2**packing.bits - 1) for i in range(per)], -1)
    digits = digits.flatten(-2).double()
    if packing.block == 1:
        size = digits.shape[-1] // scale.shape[-1]
        group = torch.arange(digits.shape[-1]) // size
        return (digits * scale[..., group] + low[..., group])[..., :width]
    blocks = (digits * scale + low).movedim(3, 1)  # (blocks, 32, a, r)
    out, at = [], 0
    for n in lengths:
        count = -(-n // packing.block)
        out.append(blocks[at : at + count].flatten(0, 1)[:n])
        at += count
    return torch.cat(out)


def loops(query, keys, values, starts, scaling, softcap=None, mask=None):
    """The definition, in fp64: query (R, m, r), keys (n, r), values (n, v); mask (R', t, s)."""
    out = torch.zeros(*query.shape[:2], values.shape[1], dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    for i in range(len(query)):
        begin, end = int(starts[i]), int(starts[i + 1])
        for j in range(query.shape[1]):
            seen = torch.ones(end - begin, dtype=torch.bool)
            if mask is not None:
                seen = mask[i // (len(query) // len(mask)), j % mask.shape[1], : end - begin]
            if not seen.any():
                continue
            scores = keys[begin:end][seen].double() @ query[i, j].double() * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[i, j], lse[i, j] = scores.softmax(0) @ values[begin:end][seen].double(), scores.logsumexp(0)
    return out, lse


def check(backend, how, lengths, m, widths, dtype, softcap=None, mask=None, rounding=0.0):
    """Attention over one of two latents of each row, within what fp32 sums leave.

    rounding: of a query that a backend takes in the dtype of the keys.
    """
    sides, numbers = [], []
    for i, (name, width) in enumerate(zip(how, widths, strict=True)):
        side, exact = ragged(name, draw(lengths, 2, width, dtype, i), lengths)
        sides.append(side.sliced(i, 2))  # keys from the first latent, values from the second
        numbers.append(exact[:, i])
    starts = starts_of(torch.tensor(lengths, dtype=torch.long))
    query = torch.randn(len(lengths), m, widths[0], generator=torch.Generator().manual_seed(7))
    query = query.to(dtype).float() if rounding else query
    scaling = 0.5 * widths[0] ** -0.5
    out, lse = backend.stored_rows(query, *sides, starts.diff(), scaling, softcap, mask)
    wanted, total = loops(query, *numbers, starts, scaling, softcap, mask)
    assert out.dtype == lse.dtype == torch.float32 and out.shape == wanted.shape
    assert torch.allclose(
        out.double(), wanted, atol=max(3e-5, rounding) * float(wanted.abs().max().clamp_min(1))
    )
    assert torch.equal(lse.isinf(), total.isinf())
    assert torch.allclose(lse.double()[~lse.isinf()], total[~total.isinf()], atol=max(5e-5, rounding))
    return out
