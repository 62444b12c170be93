"""A decoder layer on its recorded inputs: how much does the whole layer's output change when its cache is
compressed?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowkey.allocation.profile import Pair
from lowkey.core.head_groups import merged, rebuilt_heads
from lowkey.core.types import Factors, LayerBases, Layout, LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.attention_interface import Incoming
from lowkey.models.families import Rope
from lowkey.ops.commuting import rotated_moment
from lowkey.ops.rope import rotate, unrotate
from lowkey.storage.exact import NOTHING, Exact
from lowkey.storage.reconstruction import KVTransform, ReconstructionLayer


@dataclass
class OneLayerCache:
    """Stands in for a cache while one layer runs alone."""

    layer: KVTransform

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        return self.layer.update(keys, values)


@dataclass
class LowRankReconstruction:
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
        return rebuilt_heads(merged(x, down), up)
    return rebuilt_heads(merged(x - mean.unsqueeze(1), down), up) + mean.unsqueeze(1)


def layer_in_fp32(model: PreTrainedModel, layer: int) -> nn.Module:
    """A copy of a decoder layer in fp32. Errors: LowkeyError for quantised or packed weights, whose scales
    that would not take along.
    """
    block = families.decoder_layers(model)[layer]
    for name, p in block.state_dict().items():
        if not weights.in_full(p):
            raise LowkeyError(
                f"model: {name} of layer {layer} is quantised or packed; calibrate on the weights as "
                "bfloat16 or wider"
            )
    return weights.copied(block).float().requires_grad_(False).eval()


@torch.no_grad()
def passed(
    model: PreTrainedModel,
    layer: int,
    block: nn.Module,
    hidden: Tensor,
    storage: KVTransform | None,
    batch: int,
) -> Tensor:
    """The outputs (n, t, D) on the CPU of `block`, a decoder layer, on inputs of the same shape, keys and
    values through `storage`.
    """
    device, cache = device_of(block), None if storage is None else OneLayerCache(storage)
    return torch.cat(
        [families.run_layer(model, layer, block, x.to(device), cache).cpu() for x in hidden.split(batch)]
    )


def relative_errors(out: Tensor, target: Tensor, exact: Exact) -> Tensor:
    """(n): the mean over tokens of ||f_t - f~_t|| / ||f_t||, of layer outputs (n, t, D).

    Not the relative error of the whole window (arXiv:2601.21686, Eq. 11-12): in a real model a few tokens
    have outputs a hundred times as large as the others (massive activations, arXiv:2402.17762) and would be
    all that counts. The first tokens, which see nothing but exact tokens, are left out. Where the output is
    zero, as after a padding token's embedding, nothing is relative to it: that counts 0.
    """
    first = exact.visible(out.shape[1])
    away, size = (x[:, first.sinks + first.recent :].norm(dim=-1) for x in (out - target, target))
    return (away / size.masked_fill(size == 0, math.inf)).mean(1)


def _white(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(h d, h d) in fp64 from weights (h, d, D); a bias (h, d) counts as the weight of one more input, always
    1.
    """
    rows = (weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)).double().flatten(0, 1)
    return rows @ rows.mT


@dataclass
class LayerProbe:
    """One layer in fp32, its inputs and its uncompressed outputs (n, t, D); the last `held` windows are for
    judging only.
    """

    model: PreTrainedModel
    index: int
    layout: Layout
    block: nn.Module
    rope: Rope
    inputs: Tensor
    outputs: Tensor
    held: int
    exact: Exact = NOTHING

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        index: int,
        layout: Layout,
        inputs: Tensor,
        held: int,
        batch: int = 4,
        exact: Exact = NOTHING,
    ) -> LayerProbe:
        """exact: the tokens that the cache will keep as they are, as far as the windows show any other."""
        block = layer_in_fp32(model, index)
        outputs, shown = passed(model, index, block, inputs, None, batch), exact.visible(inputs.shape[1])
        return cls(model, index, layout, block, families.rope(model, index), inputs, outputs, held, shown)

    @property
    def training(self) -> int:
        """How many windows a method may fit on."""
        return len(self.inputs) - self.held

    @property
    def rotary(self) -> int:
        """How many channels of a head the model rotates, the first ones."""
        return self.turns(1)[0].shape[-1]

    def turns(self, positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (s, p) on the CPU, of the first positions."""
        device = device_of(self.block)
        cos, sin = self.rope(
            torch.arange(positions, device=device).unsqueeze(0), torch.empty(0, device=device)
        )
        return cos[0, 0].cpu(), sin[0, 0].cpu()

    def white_moments(self, layout: Layout, asked: str, remedy: str) -> tuple[Tensor, Tensor]:
        """(h d, h d) in fp64 of keys and of values if the attention's inputs were white: what the weights
        alone say.

        Rotated keys (`post_rope`): in the mean over the positions of a window. asked, remedy: for the
        refusal.
        Errors: LowkeyError for a model that norms its keys.
        """
        p = families.projections(self.model, self.index)
        if p.normed:
            why = (
                "this model norms its keys after their projection, so that they are not linear in its weights"
            )
            raise LowkeyError(f"{asked}: {why}; {remedy}")
        keys, values = _white(p.k, p.k_bias), _white(p.v, p.v_bias)
        if layout == "post_rope":
            keys = rotated_moment(keys, p.k.shape[1], *self.turns(self.inputs.shape[1]))
        return keys, values

    def run(self, x: Tensor, storage: KVTransform) -> Tensor:
        """The layer's output (b, t, D) on inputs (b, t, D) when keys and values pass through `storage`."""
        return families.run_layer(self.model, self.index, self.block, x, OneLayerCache(storage))

    def errors(self, windows: Tensor, factors: Factors) -> Tensor:
        """`relative_errors` of each window; differentiable.

        factors: the same for all windows, or with a leading dimension, one set for each.
        """
        device = device_of(self.block)
        out = self.run(
            self.inputs[windows].to(device),
            ReconstructionLayer(LowRankReconstruction(factors, self.layout, self.rope), self.exact),
        )
        return relative_errors(out, self.outputs[windows].to(device), self.exact)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The fitting windows once, in random order."""
        yield from torch.randperm(self.training, generator=generator).split(size)

    @torch.no_grad()
    def held_error(self, factors: Factors, batch: int = 4) -> float:
        """The mean of `errors` over the held-out windows."""
        windows = torch.arange(self.training, len(self.inputs))
        return float(torch.cat([self.errors(w, factors) for w in windows.split(batch)]).mean())

    def errors_at(self, bases: LayerBases, pairs: list[Pair]) -> list[float]:
        """Held-out error at each pair (r_K, r_V), both compressed."""
        like = torch.empty(0, device=device_of(self.block))
        return [self.held_error(bases.at(*pair).to(like)) for pair in pairs]

    def surface(self, bases: LayerBases, ranks_k: list[int], ranks_v: list[int]) -> list[list[float]]:
        """The error-rank surface: held-out error for every pair (r_K, r_V), both compressed."""
        return [self.errors_at(bases, [(k, v) for v in ranks_v]) for k in ranks_k]
