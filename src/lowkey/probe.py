"""A decoder layer on its recorded inputs: how much does the whole layer's output change when its cache is compressed?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowkey import families
from lowkey.families import Rope
from lowkey.merging import merged, split
from lowkey.ops.rope import rotate, unrotate
from lowkey.seam import Incoming
from lowkey.types import Factors, LayerBases, Layout, device_of


class Taking(Protocol):
    """What one layer's keys and values (b, h, t, d) can be handed to."""

    def update(self, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        """What the attention function gets in their place."""
        ...


@dataclass
class OneLayerCache:
    """Stands in for a cache while one layer runs alone."""

    layer: Taking

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        return self.layer.update(keys, values)


@dataclass
class Rebuilt:
    """Keys and values as a low-rank layer would give them back; the attention that follows is the stock one.

    The same numbers as through `CodedLayer`, at about half its cost, and the maps may differ from row to row.
    """

    factors: Factors
    layout: Layout
    rope: Rope

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        f = self.factors
        if f.order is not None:
            keys, values = keys[:, f.order], values[:, f.order]
        keys, values = self._keys(keys), rebuilt(values, f.v_down, f.v_up, f.v_mean)
        if f.order is not None:
            keys, values = keys[:, f.order.argsort()], values[:, f.order.argsort()]
        return keys, values

    def _keys(self, keys: Tensor) -> Tensor:
        f = self.factors
        if self.layout == "post_rope":
            return rebuilt(keys, f.k_down, f.k_up, f.k_mean)
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        return rotate(rebuilt(unrotate(keys, cos, sin), f.k_down, f.k_up, f.k_mean), cos, sin)


def rebuilt(x: Tensor, down: Tensor, up: Tensor, mean: Tensor | None) -> Tensor:
    """(b, h, s, d) there and back."""
    if mean is None:
        return split(merged(x, down), up)
    return split(merged(x - mean.unsqueeze(1), down), up) + mean.unsqueeze(1)


@dataclass
class Probe:
    """One layer in fp32, its inputs and its uncompressed outputs (n, t, D); the last `held` windows are for judging only."""

    model: PreTrainedModel
    index: int
    layout: Layout
    block: nn.Module
    rope: Rope
    inputs: Tensor
    outputs: Tensor
    held: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, index: int, layout: Layout, inputs: Tensor, held: int, batch: int = 4) -> Probe:
        block = copy.deepcopy(families.decoder_layers(model)[index]).float().requires_grad_(False).eval()
        device = device_of(block)
        outputs = torch.cat([families.run_layer(model, index, block, x.to(device), None).cpu() for x in inputs.split(batch)])
        return cls(model, index, layout, block, families.rope(model, index), inputs, outputs, held)

    @property
    def training(self) -> int:
        """How many windows a method may fit on."""
        return len(self.inputs) - self.held

    def run(self, x: Tensor, storage: Taking) -> Tensor:
        """The layer's output (b, t, D) on inputs (b, t, D) when keys and values pass through `storage`."""
        return families.run_layer(self.model, self.index, self.block, x, OneLayerCache(storage))

    def errors(self, windows: Tensor, factors: Factors) -> Tensor:
        """||f - f~||_F / ||f||_F of each window (arXiv:2601.21686, Eq. 11-12); differentiable.

        factors: the same for all windows, or with a leading dimension, one set for each.
        """
        device = device_of(self.block)
        out = self.run(self.inputs[windows].to(device), Rebuilt(factors, self.layout, self.rope))
        target = self.outputs[windows].to(device)
        return (out - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The fitting windows once, in random order."""
        yield from torch.randperm(self.training, generator=generator).split(size)

    @torch.no_grad()
    def held_error(self, factors: Factors, batch: int = 4) -> float:
        """The mean of `errors` over the held-out windows."""
        windows = torch.arange(self.training, len(self.inputs))
        return float(torch.cat([self.errors(w, factors) for w in windows.split(batch)]).mean())

    def surface(self, bases: LayerBases, ranks_k: list[int], ranks_v: list[int]) -> list[list[float]]:
        """The error-rank surface: held-out error for every pair (r_K, r_V), both compressed."""
        device = device_of(self.block)
        like = torch.empty(0, device=device)
        return [[self.held_error(bases.at(k, v).to(like)) for v in ranks_v] for k in ranks_k]
