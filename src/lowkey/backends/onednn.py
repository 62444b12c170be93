"""Products of matrices by oneDNN, and attention by such products, for CPUs on which MKL is slow.

torch's own products and its fused attention call MKL, which does not use AVX-512 on AMD's processors and then
takes twice as long as oneDNN. On Intel's there is nothing to gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends.segment import Part, merge_seen

MOST_THREADS = 8  # more of them would wait for one another, since products are formed one by one
# Queries and tokens whose scores are formed at once: 2 MiB stay in the CPU's cache. One divides the other.
QUERIES_AT_ONCE, TOKENS_AT_ONCE = 256, 2048
FEWEST_SCORES = 2**16  # of a head


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """The products of all rows of two matrices, left (m, d) and right (n, d), both in fp32: (m, n)."""
    if not multiplies_faster(left, right):
        return left @ right.mT
    # it takes hundreds of times as long over rows that do not lie side by side
    return torch.ops.mkldnn._linear_pointwise(left.contiguous(), right.contiguous(), None, "none", [], "")


def multiplies_faster(*operands: Tensor) -> bool:
    """Whether oneDNN forms products of these in fp32 faster than MKL, and nobody asks for their gradients."""
    if any(x.device.type != "cpu" or x.dtype == torch.float64 for x in operands):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return False
    if not torch.backends.mkldnn.is_available() or torch.get_num_threads() > MOST_THREADS:
        return False
    cpu = torch.cpu.get_capabilities()
    return "AMD" in cpu.get("cpu_name", "") and cpu.get("avx512_f", False)


def attends_faster(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` beats torch's fused kernel for these, which it does not for a few scores."""
    return query.shape[2] * keys.shape[2] >= FEWEST_SCORES and multiplies_faster(query, keys, values)


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool) -> Part:
    """Attention in fp32, with its log-sum-exp.

    Args:
        query: (b, H, t, d), of H / G query heads for each stored head.
        keys: (b, G, s, d).
        values: (b, G, s, width).
        scaling: what scores are multiplied with.
        causal: whether the i-th query sees the first i + 1 tokens only.

    Returns:
        (output (b, H, t, width), log-sum-exp (b, H, t)).
    """
    heads, stored = query.shape[1], keys.shape[1]
    # the queries of all heads that meet the same keys may be taken together if they all see all of them
    grouped = query.unflatten(1, (stored, heads // stored))
    grouped = grouped if causal else grouped.flatten(2, 3).unsqueeze(2)
    parts = [
        _attend_head(q.float() * scaling, k.float(), v.float(), causal)
        for of_keys, k, v in zip(grouped.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), strict=True)
        for q in of_keys
    ]
    out, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return out.view(*query.shape[:3], -1), lse.view(query.shape[:3])


def _attend_head(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
    """Attention of scaled queries (t, d) over the tokens (s, d) of one head: (t, width) and (t)."""
    columns = [x.mT.contiguous() for x in values.split(TOKENS_AT_ONCE)]
    later = torch.ones(QUERIES_AT_ONCE, QUERIES_AT_ONCE, dtype=torch.bool).triu(1)
    rows = []
    for start in range(0, len(query), QUERIES_AT_ONCE):
        some = query[start : start + QUERIES_AT_ONCE]
        seen = start + len(some) if causal else len(keys)
        part = None
        for first, v in zip(range(0, seen, TOKENS_AT_ONCE), columns, strict=False):
            scores = row_products(some, keys[first : min(seen, first + TOKENS_AT_ONCE)])
            if causal and first + TOKENS_AT_ONCE > start:  # the block ends with the queries' own tokens
                scores[:, start - first :].masked_fill_(later[: len(some), : len(some)], -torch.inf)
            highest = scores.amax(1, keepdim=True)
            total = scores.sub_(highest).exp_().sum(1, keepdim=True)
            out = row_products(scores, v[:, : scores.shape[1]]).div_(total)
            new = out, (highest + total.log_()).squeeze(1)
            part = new if part is None else merge_seen(part, new)
        rows.append(part)
    out, lse = (torch.cat(x) for x in zip(*rows, strict=True))
    return out, lse
