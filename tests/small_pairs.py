"""Pairs of a pico model and a smaller one of the same tokens, and caches over them."""

from __future__ import annotations

from functools import cache

import pico
import torch

import lowkey
from lowkey.policies import POLICIES

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@cache
def small():
    """Shared: a smaller model, attached."""
    return lowkey.attach(pico.build("llama", **SHAPE))


@cache
def eager_small():
    """Shared: the same weights with transformers' own eager attention."""
    model = pico.build("llama", **SHAPE)
    model.set_attn_implementation("eager")
    return model


def guided(name="smallkv-tokens", budget="50%", beside=None, model=None, **options):
    """A cache of the llama model, or of another, beside the small one."""
    model = model or pico.attached("llama")
    policy = POLICIES[name](budget, **{"sinks": 2, "recent": 3, **options})
    return lowkey.make_cache(model, policy=policy, small=beside or small())


@torch.no_grad()
def read(cache, ids, splits, model=None):
    """Logits of `ids` in pieces, each read by both models."""
    model, out = model or pico.attached("llama"), []
    for piece in ids.split(splits, 1):
        with cache.reading(piece):
            out.append(model(piece, past_key_values=cache).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def attentions(model, ids):
    """(b, H, t, t) of each layer in fp64, by transformers' own eager attention."""
    return [layer.double() for layer in model(ids, output_attentions=True, use_cache=False).attentions]


def sets_of_most(attention, queries, share):
    """For each head (b, layers * H) the set of positions that the newest queries look at most, without the
    first 4 and the newest 16."""
    together, n = torch.cat(attention, 1), attention[0].shape[-1]
    found = []
    for row in together:
        found.append([])
        for head in row:
            got = head[-queries:].sum(0)
            middle = list(range(4, n - 16))
            count = min(len(middle), max(1, round(share * len(middle))))
            found[-1].append(set(sorted(middle, key=lambda j: -float(got[j]))[:count]))
    return found


def matched(own, others):
    """For each set of `own` the number of the first of `others` that overlaps most with it."""
    jaccard = [len(own & other) / max(1, len(own | other)) for other in others]
    return jaccard.index(max(jaccard))
