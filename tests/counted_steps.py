"""Steps of decoding over every kind of cache, with their operations and their looks at values counted."""

from __future__ import annotations

import copy
from functools import cache, partial

import pico
import torch
from cache_kinds import KINDS, agree, evicting, planned
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import lowkey

PROMPT, STEPS = 80, 40  # more steps than two rooms, and more tokens than a block of 32
MORE_OPERATIONS = 30  # of a layer, beyond those of transformers' own cache and attention
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "nonzero", "unique"}

# latents of four heads together, wide enough for the kernel; the others are of narrower ones
LATENTS = {
    f"latents-{layout}-{bits}": partial(
        lambda layout, bits, m: lowkey.make_cache(
            m,
            planned(
                m,
                factors={i: pico.merged_factors(4, 5, 9, 4, 4, seed=i) for i in range(pico.LAYERS)},
                orthonormal=False,
                sinks=3,
                recent=5,
                layout=layout,
            ),
            bits=bits,
        ),
        layout,
        bits,
    )
    for layout in ("post_rope", "pre_rope")
    for bits in (None, "kivi2")
}

# between selections, which come with every eighth step
SELECTING = {"every-8": lambda m: lowkey.make_cache(m, policy=evicting("h2o", every=8))}
# steps that take more operations than the bar, and how many
LIMITS = {
    # without a window, a token is encoded and packed in its own step
    "plan-4": 78,
    "razor-4": 78,
    # exact mean tokens, or rows of chunks, beside latents
    "plan-razor": 32,
    "plan-chunk-gate": 32,
    "plan-chunk-mean": 32,
    # besides, a gate chooses its rank
    "dynamic": 50,
    "dynamic-pre": 49,
}


NOT_PLAIN = {  # kinds whose third step looks at values, and why
    "every-global": "evicts in the third step",
    "every-matching": "evicts in the third step",
    "every-hadamard4": "evicts in the third step",
    "mixed-every": "evicts in the third step",
}
# of steps that evict: looks at values and operations beyond stock, per layer
EVICTING = {"every-global": (7, 435), "every-hadamard4": (8, 683), "mixed-every": (9, 943)}
# those, and one whose third step makes room
MANY_OPERATIONS = (*NOT_PLAIN, "every")


class Counted(TorchDispatchMode):
    """Counts the operations of a call."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes where Python reads the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def fed(model, cache, ids, pads=None):
    """Logits of `ids`; with `pads`, behind as much padding on the left as they say."""
    if pads is None:
        with torch.no_grad():
            return model(ids, past_key_values=cache).logits
    return pico.feed(model, ids, cache, pads=pads)


def filled(kind, name, pads=None):
    """A model and a cache that holds a prompt of PROMPT tokens in two rows, or in one for each of `pads`."""
    model = pico.attached(name)
    cache = (KINDS | LATENTS | SELECTING)[kind](model)
    ids = pico.prompt(PROMPT, batch=len(pads or [0, 0]))
    if cache.origin and cache.origin.policy_in_use and cache.origin.policy_in_use.needs_second_pass:
        mask = None if pads is None else pico.padding(pads, PROMPT)[0]
        lowkey.prefill(model, pico.tokenizer(), cache, ids, attention_mask=mask)
    else:
        fed(model, cache, ids, pads)
    return model, cache


def steps(model, cache, count, seed=3, pads=None):
    """Logits of so many steps, with the bytes checked at each."""
    out = []
    for ids in pico.prompt(count, batch=len(pads or [0, 0]), seed=seed).split(1, 1):
        out.append(fed(model, cache, ids, pads))
        agree(cache, len(out))
    return torch.cat(out, 1)


@cache
def _with_sdpa():
    """The stock model with transformers' fastest attention."""
    model = copy.deepcopy(pico.stock("llama"))
    model.set_attn_implementation("sdpa")
    return model


def _stock_step(counting, pads):
    """A step of transformers' own cache and attention, counted."""
    model, rows = _with_sdpa(), len(pads or [0])
    past = DynamicCache(config=model.config)
    fed(model, past, pico.prompt(PROMPT, rows), pads)
    with counting:
        fed(model, past, pico.prompt(1, rows), pads)
    return counting


def operations_of_stock(pads=None):
    """The operations of a step of transformers' own cache and attention."""
    return _stock_step(Counted(), pads).operations


def reads_of_stock(pads=None):
    """The looks at values in such a step."""
    return _stock_step(Reads(), pads).found
