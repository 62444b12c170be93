"""Calls of a model that fail, and what a cache holds before and after them."""

from __future__ import annotations

import contextlib
import copy
from functools import cache, partial

import torch
from pico import attached

LENGTH = 30


@cache
def twice_as_wide(name):
    """The model in double precision."""
    return copy.deepcopy(attached(name)).double()


@torch.no_grad()
def call(model, cache, ids, **options):
    """Logits of `ids` over the cache."""
    return model(ids, past_key_values=cache, **options).logits


def raising(*_, **__):
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupting(module):
    """Ctrl-C before the module runs."""
    handle = module.register_forward_pre_hook(raising)
    try:
        yield
    finally:
        handle.remove()


def cut(part, layer, model, cache, ids):
    """Ends a forward pass before this part of the decoder layer."""
    with interrupting(getattr(model.get_decoder().layers[layer], part)):
        call(model, cache, ids)


def cut_inside(layer, model, cache, ids):
    """Ends it within our own attention, after the layer has stored the tokens."""
    own = cache.layers[layer]
    attend, own.attend = own.attend, lambda *args: (attend(*args), raising())
    try:
        call(model, cache, ids)
    finally:
        vars(own).pop("attend", None)


FAILURES = {
    "positions that jump": lambda m, c, x: call(
        m, c, x, position_ids=torch.arange(90, 90 + x.shape[1])[None]
    ),
    "float mask": lambda m, c, x: call(
        m, c, x, attention_mask=torch.zeros(1, 1, x.shape[1], LENGTH + x.shape[1])
    ),
    "weights wanted": lambda m, c, x: call(m, c, x, output_attentions=True),
    "another batch size": lambda m, c, x: call(m, c, x.repeat(3, 1)),
    "another dtype": lambda m, c, x: call(twice_as_wide(m.config.model_type), c, x),
    "a mask too short": lambda m, c, x: call(
        m, c, x, attention_mask=torch.ones(1, 1, x.shape[1], 3, dtype=torch.bool)
    ),
    "interrupt in layer 0": partial(cut, "mlp", 0),
    "interrupt in layer 1": partial(cut, "mlp", 1),
    "interrupt before layer 2": partial(cut, "self_attn", 2),
    "interrupt in the first attention": partial(cut_inside, 0),
    "interrupt in the last attention": partial(cut_inside, 2),
}
NOT_REFUSED = {  # what stock layers take, and what is not theirs
    "stock": [
        "positions that jump",
        "float mask",
        "interrupt in the first attention",
        "interrupt in the last attention",
    ],
}


def state(cache):
    """Everything that each layer holds, in copies and without free slots for further steps."""
    for layer in cache.layers:
        layer.make_compact()
    return [{name: t.clone() for name, t in layer.tensors().items()} for layer in cache.layers]


def same(a, b):
    """Whether two states hold equal tensors."""
    return all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)
    )
