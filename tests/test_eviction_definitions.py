"""What a whole cache keeps, against the policy's definition written out by hand from the attention of transformers' own eager model."""

from __future__ import annotations

import pico
import pytest
import torch
from pico import attached, prompt, stock

import lowkey
from lowkey.loading import make_policy

LAYERS, HEADS, GROUP = 3, 4, 2


def kept_by(model, name, ids, budget, heads=None, **options):
    """Per row: {(layer, head, position)} after `lowkey.prefill`."""
    chosen = make_policy(name, budget, {k: str(v) for k, v in options.items()}).fitted(heads or {})
    cache = lowkey.make_cache(model, policy=chosen)
    lowkey.prefill(model, pico.tokenizer(), cache, ids)
    return [
        {(i, j, p) for i in range(LAYERS) for j, at in enumerate(cache.kept_positions(i, row)) for p in at.tolist()}
        for row in range(len(ids))
    ]


def highest(scores, count):
    """The places of the `count` highest scores (layers, heads, tokens)."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
    s = scores.shape[2]
    return {(i // s // HEADS, i // s % HEADS, i % s) for i in order}


@torch.no_grad()
def eager(ids):
    """Attention (layers, H, t, t) in double precision."""
    return torch.stack([a[0] for a in stock("llama")(ids, output_attentions=True).attentions]).double()


# -- KVzip


def asked_for(ids, start, chunk, bridge, request):
    return torch.cat([ids, request, ids[:, max(0, start - bridge) : start + chunk]], 1)


@pytest.mark.parametrize("softmax", ["piece", "context"])
def test_kvzip_keeps_what_repeating_each_piece_looks_at_most(softmax):
    """Every piece is asked for and repeated behind the whole context; a token's score is the largest weight that any repeated token or the
    request gives it, in any query head of its KV head, once weights are shares of the sinks, the piece and the repetition alone."""
    ids, chunk, bridge, sinks, n = prompt(70, batch=2), 30, 4, 3, 70
    kept = kept_by(attached("llama"), "kvzip", ids, "30%", chunk=chunk, bridge=bridge, sinks=sinks, recent=0, softmax=softmax)
    request = pico.tokenizer()("\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False, return_tensors="pt").input_ids
    for row in range(2):
        scores = torch.zeros(LAYERS, HEADS, n, dtype=torch.float64)
        for start in range(0, n, chunk):
            weights = eager(asked_for(ids[row : row + 1], start, chunk, bridge, request))[:, :, n:]
            met = [p for p in range(n) if p < sinks or start <= p < start + chunk or softmax == "context"]
            share = weights[..., met] / (weights[..., met].sum(-1) + weights[..., n:].sum(-1)).unsqueeze(-1)
            top = share.amax(2).unflatten(1, (HEADS, GROUP)).amax(2)
            scores[..., met] = scores[..., met].maximum(top)
        scores[..., :sinks] = torch.inf
        assert kept[row] == highest(scores, round(0.3 * n * LAYERS * HEADS))
