"""Bases of closed-form methods, fitted once, and the activations that they were fitted on."""

from __future__ import annotations

from functools import cache

import pico
import torch
from pico import HEAD_DIM, prompt
from torch import Tensor

import lowkey
from lowkey.calibration.statistics import gather_statistics
from lowkey.core.head_groups import side_by_side
from lowkey.methods import KQSVD, LoRC, Palu, ReCalKV
from lowkey.models.attention_interface import AttendingLayer, Incoming
from lowkey.ops.rope import rotate
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe

METHOD = {
    "kq-svd": KQSVD(),
    "kq-svd-averaged": KQSVD(outputs="averaged"),
    "kq-svd-weighted": KQSVD(weighting="outputs"),
    "kq-svd-4": KQSVD(group=4),
    "palu": Palu(),
    "palu-2": Palu(group=2),
    "lorc": LoRC(),
    "lorc-head": LoRC(scope="head"),
    "lorc-whitened": LoRC(whiten=True),
    "recalkv": ReCalKV(),
    "recalkv-2": ReCalKV(group=2),
}
MODELS = {
    "llama": {},
    "llama-mha": {},
    "llama-mqa": {},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {},
    "gemma2": {},
    "phi3-partial": {},
}
RANKS = [4, 8, 16]
WINDOWS, HELD, LENGTH = 8, 2, 20
ROWS = prompt(LENGTH, batch=WINDOWS)
LAYER = 1


@cache
def model_of(name: str):
    """Biases are random, norms too."""
    model = pico.build(name, **MODELS[name])
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("_proj.bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5, generator=generator)
    return lowkey.attach(model)


@cache
def statistics_of(name: str):
    """Calibration statistics of every layer, from the windows that are not held out."""
    return gather_statistics(model_of(name), ROWS[:-HELD].split(4))


@cache
def prepared(name: str, layout: str, layer: int = LAYER):
    """(statistics, probe) of one layer, as calibration makes them."""
    model = model_of(name)
    return statistics_of(name)[layer], LayerProbe.of(
        model, layer, layout, dict(layer_inputs(model, ROWS, 4))[layer], HELD
    )


@cache
def fitted(method: str, name: str, layout: str, layer: int = LAYER):
    """Bases of the method for one layer."""
    return METHOD[method].fit(*prepared(name, layout, layer), RANKS, 0)


class Recorder(AttendingLayer):
    """Keeps what a layer hands to its cache, and the query."""

    def update(self, keys, values):
        return (incoming := Incoming(self, keys, values)), incoming

    def attend(self, keys, values, call):
        self.keys, self.values, self.call = keys, values, call
        return torch.zeros_like(call.query[..., : values.shape[-1]])


@cache
def recorded(name: str, layout: str, layer: int = LAYER) -> dict[str, Tensor]:
    """(b, h, t, d) keys and values and (b, h, g, t, d) queries of the fitting windows, in fp64; keys and
    queries as the layout has them.
    """
    _, probe = prepared(name, layout, layer)
    seen = Recorder()
    with torch.no_grad():
        probe.run(probe.inputs[: probe.training_count], seen)
    keys, query = seen.keys, seen.call.query
    if layout == "pre_rope":
        cos, sin = probe.rope(torch.arange(LENGTH).unsqueeze(0), keys)
        keys, query = (
            rotate(x, cos if x is keys else cos.unsqueeze(1), -(sin if x is keys else sin.unsqueeze(1)))
            for x in (keys, query)
        )
    return {"keys": keys.double(), "values": seen.values.double(), "queries": query.double()}


def joint_rows(x: Tensor) -> Tensor:
    """(b, h, t, d) -> (b t, h d)"""
    return x.transpose(1, 2).flatten(0, 1).flatten(1)


def rebuilt(x: Tensor, basis, rank: int, order: Tensor | None = None) -> Tensor:
    """(b t, h d) through the maps of a rank, group by group; heads in their own order before and after."""
    down, up = (m.double() for m in basis.at(rank))
    h = x.shape[1] // HEAD_DIM
    order = torch.arange(h) if order is None else order
    heads = x.unflatten(1, (h, HEAD_DIM))[:, order]
    groups = heads.unflatten(1, (-1, basis.merge)).flatten(2)
    maps = (down @ side_by_side(up, basis.merge)).expand(groups.shape[1], -1, -1)
    out = torch.stack([groups[:, g] @ m for g, m in enumerate(maps)], 1)
    return out.unflatten(2, (basis.merge, HEAD_DIM)).flatten(1, 2)[:, order.argsort()].flatten(1)
