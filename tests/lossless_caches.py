"""Kinds of cache that give the logits of the stock model, and logits under masks of one's own."""

from __future__ import annotations

import dataclasses

import pico
import torch
from dynamic_plans import make_plan
from evicting_caches import HEADS

from lowkey.cache.cache import make_cache
from lowkey.policies import POLICIES
from lowkey.storage.exact import Exact


def whole_rank(model, layout="post_rope", **fields):
    """A plan of full rank, which loses nothing."""
    return pico.plan(model, 16, 16, layout=layout, **fields)


def cache_of(kind, model):
    """Kinds of cache that give stock logits, those of packed numbers but for their noise."""
    made = {
        "plain": lambda: make_cache(model, exact=Exact(3, 7)),
        "int8": lambda: make_cache(model, bits=8, exact=Exact(3)),
        "kivi8": lambda: make_cache(model, bits="kivi8", exact=Exact(3, 7)),
        "kivi8-plan": lambda: make_cache(
            model, whole_rank(model, "pre_rope"), bits="kivi8", exact=Exact(2, 0)
        ),
        "hadamard8": lambda: make_cache(model, bits="hadamard8", exact=Exact(3)),
        "plan": lambda: make_cache(model, whole_rank(model)),
        "plan-exact": lambda: make_cache(model, whole_rank(model, "pre_rope", sinks=3, recent=7)),
        "dynamic": lambda: make_cache(model, make_plan("llama", "post_rope", 0)),
        "dynamic-pre": lambda: make_cache(model, make_plan("llama", "pre_rope", 0)),
        "policy-plan": lambda: make_cache(model, whole_rank(model, "pre_rope"), POLICIES["ada-kv"]("100%")),
        "think": lambda: make_cache(model, policy=POLICIES["think"]("100%", channels=1.0)),
        "razor": lambda: make_cache(
            model, dataclasses.replace(whole_rank(model), heads=HEADS), POLICIES["razor"]("100%")
        ),
        "h2o": lambda: make_cache(model, policy=POLICIES["h2o"]("100%")),
        "matching": lambda: make_cache(
            model, policy=POLICIES["attention-matching"]("100%", queries="prompt")
        ),
    }
    return made[kind]()


KINDS = [
    "plain",
    "int8",
    "kivi8",
    "kivi8-plan",
    "hadamard8",
    "plan",
    "plan-exact",
    "dynamic",
    "dynamic-pre",
    "policy-plan",
    "think",
    "razor",
    "h2o",
    "matching",
]
NOISE = {"int8": 0.2, "kivi8": 0.2, "kivi8-plan": 0.2, "hadamard8": 0.2}


@torch.no_grad()
def stock_logits(ids, mask, name="llama", positions=None):
    """transformers' eager attention under the same mask, written as what is added to the scores."""
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return pico.stock(name)(ids, attention_mask=added, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def fed(model, ids, mask, cache, splits=(), positions=None):
    """Logits of `ids` in chunks of these sizes and the rest, under a mask (b, 1, t, t)."""
    out, start = [], 0
    for size in [*splits, ids.shape[1] - sum(splits)]:
        stop = start + size
        own = mask[:, :, start:stop, :stop]
        at = None if positions is None else positions[:, start:stop]
        out.append(
            model(ids[:, start:stop], attention_mask=own, position_ids=at, past_key_values=cache).logits
        )
        start = stop
    return torch.cat(out, 1)


def causal(n):
    """Causal mask (n, n)."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def documents(*sizes):
    """Mask under which packed documents of these sizes do not see each other."""
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (causal(sum(sizes)) & (number.unsqueeze(1) == number))[None, None]


def windowed(n, width):
    """Causal mask over the newest `width` tokens."""
    at = torch.arange(n)
    return (causal(n) & (at.unsqueeze(1) - at < width))[None, None]


MASKS = {
    "documents": documents(70, 41, 9),
    "window": windowed(120, 24),
    "last sees itself": documents(119, 1),
    "strangers": causal(120)
    .logical_and(torch.arange(120) % 7 != 3)
    .logical_or(torch.eye(120, dtype=torch.bool))[None, None],
}
