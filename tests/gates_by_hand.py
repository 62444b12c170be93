"""The gate of Fast KVzip by its definition, and what it sees: the outputs of a model's own projections."""

from __future__ import annotations

from contextlib import contextmanager

import torch


def gate_scores(gate, x):
    """The softmax of each small query over its own key and 16 sinks, by token, in fp64: (h, t)."""
    gate, x = {name: t.double() for name, t in gate.items()}, x.double()
    heads, groups = gate["bias"].shape

    def normal(y, weight):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    rows = []
    for j in range(heads):
        k = normal(x @ gate["key"][j].T + gate["key_bias"][j], gate["key_norm"])
        shares = []
        for g in range(groups):
            q = normal(x @ gate["query"][j, g].T + gate["query_bias"][j, g], gate["query_norm"])
            own = (q * k).sum(-1) / 4 + gate["bias"][j, g]
            logits = torch.cat([own[:, None], q @ gate["sinks"][j].T / 4], 1)
            shares.append(logits.softmax(1)[:, 0])
        rows.append(torch.stack(shares).mean(0))
    return torch.stack(rows)


@contextmanager
def projected(model):
    """By layer, a list of what its projections give in each call: queries, keys and values (b, t, z)."""
    seen, handles = [[] for _ in model.model.layers], []
    for layer, log in zip(model.model.layers, seen, strict=True):
        block, parts = layer.self_attn, []

        def keep(module, x, out, parts=parts, log=log):
            parts.append(out)
            if len(parts) == 3:
                log.append(torch.cat(parts, -1))
                parts.clear()

        handles += [p.register_forward_hook(keep) for p in (block.q_proj, block.k_proj, block.v_proj)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
