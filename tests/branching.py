"""Caches of every kind that have read a prompt, and what is said of their continuations."""

from __future__ import annotations

import pico
import torch
from cache_kinds import KINDS
from pico import attached, feed, padding

import lowkey


def filled(kind, name, ids, pads=None):
    """A cache of this kind that has read a prompt, in the way that its policy wants."""
    model, cache = attached(name), KINDS[kind](attached(name))
    pads = pads or [0] * len(ids)
    if cache.origin and cache.origin.policy and cache.origin.policy.needs_second_pass:
        lowkey.prefill(model, pico.tokenizer(), cache, ids, attention_mask=padding(pads, ids.shape[1])[0])
    else:
        feed(model, ids, cache, pads)
    return cache


def close(found, wanted, tolerance=2e-3):
    """Sums in another order may round an integer the other way."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < tolerance


def beams_by_hand(model, ids, cache, width, new):
    """The best of so many beams of `new` tokens, each of which goes on over a copy of the cache."""
    beams = [(0.0, [], cache, ids[:, -1:])]
    for _ in range(new):
        found = []
        for score, tokens, past, last in beams:
            logits = feed(model, last, past)[0, -1].log_softmax(-1)
            found += [
                (score + float(logits[i]), [*tokens, i], past) for i in logits.topk(width).indices.tolist()
            ]
        best = sorted(found, key=lambda one: -one[0])[:width]
        beams = [(score, tokens, past.branch(), torch.tensor([tokens[-1:]])) for score, tokens, past in best]
    return torch.tensor([beams[0][1]])
