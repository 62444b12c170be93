"""One decoder layer on recorded inputs: how much does its output change when its cache is compressed?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowkey.allocation.profile import Pair
from lowkey.core.head_groups import group_latents, rebuilt_heads
from lowkey.core.types import Factors, LayerBases, Layout, LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.attention_interface import Incoming
from lowkey.models.families import Rope
from lowkey.models.projections import projections
from lowkey.ops.commuting import rotated_moment
from lowkey.ops.rope import rotate, unrotate
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact
from lowkey.storage.reconstruction import KVTransform, ReconstructionLayer


@dataclass
class OneLayerCache:
    """Stands in for a transformers cache while one decoder layer runs alone.

    Args:
        layer: what the layer's keys and values pass through.
    """

    layer: KVTransform

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor] | tuple[Incoming, Incoming]:
        """Pass keys and values (b, h, t, d) through the transform; other arguments as in `Cache`."""
        return self.layer.update(keys, values)


@dataclass
class LowRankReconstruction:
    """Gives keys and values back as a low-rank cache layer would, for the stock attention that follows.

    The numbers are those of `CodedLayer` at about half its cost. The maps may differ from row to row: factors
    with a leading dimension hold one set per row of the batch.

    Args:
        factors: the layer's maps into and out of its latents.
        layout: whether keys are compressed before (`pre_rope`) or after (`post_rope`) their rotation.
        rope: the layer's rotary embedding.
    """

    factors: Factors
    layout: Layout
    rope: Rope

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (b, h, t, d) after they went into their latents and back."""
        f = self.factors
        # Factors group heads in an order of their own; attention needs them in the model's order again.
        if f.order is not None:
            keys, values = keys[:, f.order], values[:, f.order]
        keys, values = self._reconstruct_keys(keys), reconstruct(values, f.v_down, f.v_up, f.v_mean)
        if f.order is not None:
            keys, values = keys[:, f.order.argsort()], values[:, f.order.argsort()]
        return keys, values

    def _reconstruct_keys(self, keys: Tensor) -> Tensor:
        f = self.factors
        if self.layout == "post_rope":
            return reconstruct(keys, f.k_down, f.k_up, f.k_mean)
        # Keys come rotated. Windows start at position 0, so their positions are known.
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        return rotate(reconstruct(unrotate(keys, cos, sin), f.k_down, f.k_up, f.k_mean), cos, sin)


def reconstruct(x: Tensor, down: Tensor, up: Tensor, mean: Tensor | None) -> Tensor:
    """Map keys or values into their latents and back.

    Args:
        x: keys or values (b, h, s, d).
        down: (G|1, t d, t r), where t heads share one latent.
        up: (h|1, t r, d).
        mean: (h, d), subtracted before and added after; or None.

    Returns:
        The reconstruction (b, h, s, d).
    """
    if mean is None:
        return rebuilt_heads(group_latents(x, down), up)
    return rebuilt_heads(group_latents(x - mean.unsqueeze(1), down), up) + mean.unsqueeze(1)


def layer_in_fp32(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return a frozen copy of a decoder layer in fp32.

    Raises:
        LowkeyError: if weights are quantised or packed, since the copy would lose their scales.
    """
    block = families.decoder_layers(model)[layer]
    # `float()` would cast the packed integers and drop the scales that give them their values.
    for name, p in block.state_dict().items():
        if not weights.is_plain_weight(p):
            raise LowkeyError(
                f"model: {name} of layer {layer} is quantised or packed; calibrate on the weights as "
                "bfloat16 or wider"
            )
    return weights.standalone_copy(block).float().requires_grad_(False).eval()


@torch.no_grad()
def layer_outputs(
    model: PreTrainedModel,
    layer: int,
    block: nn.Module,
    hidden: Tensor,
    transform: KVTransform | None,
    batch: int,
) -> Tensor:
    """Return a decoder layer's outputs when its keys and values pass through a transform.

    Args:
        model: the model that the layer belongs to.
        layer: index of the layer in the model.
        block: the layer, or a copy of it.
        hidden: inputs (n, t, D).
        transform: what keys and values pass through; None for stock attention.
        batch: windows per forward pass.

    Returns:
        Outputs (n, t, D) on the CPU.
    """
    device, cache = device_of(block), None if transform is None else OneLayerCache(transform)
    return torch.cat(
        [families.run_layer(model, layer, block, x.to(device), cache).cpu() for x in hidden.split(batch)]
    )


def relative_errors(out: Tensor, target: Tensor, exact: Exact) -> Tensor:
    """Return the mean over tokens of ||f_t - f~_t|| / ||f_t||, for layer outputs f and f~.

    This is not the relative error of the whole window (arXiv:2601.21686, Eq. 11-12). In a real model the
    outputs of a few tokens are a hundred times as large as the others (massive activations,
    arXiv:2402.17762), and only these would count. The first tokens are left out, since they see nothing but
    exact tokens. A token whose output is zero, as after a padding token's embedding, counts 0.

    Args:
        out: outputs f~ of the compressed layer (n, t, D).
        target: outputs f of the original layer (n, t, D).
        exact: the tokens that every query sees exactly.

    Returns:
        One error per window, (n).
    """
    visible = exact.for_length(out.shape[1])
    # A window's first sinks + recent tokens have nothing else to attend to.
    error, size = (x[:, visible.sinks + visible.recent :].norm(dim=-1) for x in (out - target, target))
    return (error / size.masked_fill(size == 0, math.inf)).mean(1)


@dataclass
class LayerProbe:
    """One decoder layer in fp32 with its recorded inputs and its uncompressed outputs.

    Args:
        model: the model that the layer belongs to.
        index: index of the layer in the model.
        layout: whether keys are stored before or after their rotation.
        block: the copy of the layer.
        rope: the layer's rotary embedding.
        inputs: hidden states (n, t, D) of n windows.
        outputs: the layer's outputs (n, t, D) on them, uncompressed.
        held_out: how many of the last windows are for judging only.
        exact: the tokens that the cache will store as they are, as far as the windows hold any others.
    """

    model: PreTrainedModel
    index: int
    layout: Layout
    block: nn.Module
    rope: Rope
    inputs: Tensor
    outputs: Tensor
    held_out: int
    exact: Exact = NO_EXACT_TOKENS

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        index: int,
        layout: Layout,
        inputs: Tensor,
        held_out: int,
        batch: int = 4,
        exact: Exact = NO_EXACT_TOKENS,
    ) -> LayerProbe:
        """Copy a layer and run it on its inputs.

        Args:
            model: the model.
            index: index of the layer.
            layout: whether keys are stored before or after their rotation.
            inputs: hidden states (n, t, D).
            held_out: how many of the last windows are for judging only.
            batch: windows per forward pass.
            exact: the tokens that the cache will store as they are.

        Raises:
            LowkeyError: if the layer's weights are quantised or packed.
        """
        block = layer_in_fp32(model, index)
        outputs = layer_outputs(model, index, block, inputs, None, batch)
        # In windows too short to hold any compressed token, all tokens count as compressed.
        visible = exact.for_length(inputs.shape[1])
        rope = families.rope(model, index)
        return cls(model, index, layout, block, rope, inputs, outputs, held_out, visible)

    @property
    def training_count(self) -> int:
        """How many windows, from the first one on, a method may fit on."""
        return len(self.inputs) - self.held_out

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head the model rotates; they are the first ones."""
        return self.rope_tables(1)[0].shape[-1]

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of the first positions, each (positions, rotary_dim) on the CPU."""
        device = device_of(self.block)
        # The second argument of a rotary module only says dtype and device.
        cos, sin = self.rope(
            torch.arange(positions, device=device).unsqueeze(0), torch.empty(0, device=device)
        )
        return cos[0, 0].cpu(), sin[0, 0].cpu()

    def white_moments(self, layout: Layout, option: str, remedy: str) -> tuple[Tensor, Tensor]:
        """Return the second moments that keys and values would have if the attention's inputs were white.

        These are the Gram matrices of W_K and W_V: what the weights alone say. Under `post_rope` the moment
        of the rotated keys is averaged over the positions of a window.

        Args:
            layout: whether the moment of keys is that before or after their rotation.
            option: the option that asks for it, for the error message.
            remedy: what to do instead, for the error message.

        Returns:
            Joint moments (h d, h d) of keys and of values, in fp64.

        Raises:
            LowkeyError: if the model normalises its keys, which are then not linear in its weights.
        """
        p = projections(self.model, self.index)
        if p.normed:
            raise LowkeyError(
                f"{option}: this model norms its keys after their projection, so that they are not linear in "
                f"its weights; {remedy}"
            )
        keys, values = _gram(p.k, p.k_bias), _gram(p.v, p.v_bias)
        # The moment of unrotated keys does not say that of rotated ones; their joint moment does.
        if layout == "post_rope":
            keys = rotated_moment(keys, p.k.shape[1], *self.rope_tables(self.inputs.shape[1]))
        return keys, values

    def run(self, x: Tensor, transform: KVTransform) -> Tensor:
        """Return the layer's output (b, t, D) on inputs x (b, t, D), its keys and values transformed."""
        return families.run_layer(self.model, self.index, self.block, x, OneLayerCache(transform))

    def errors(self, windows: Tensor, factors: Factors) -> Tensor:
        """Return the relative error of each window when the layer is compressed; differentiable.

        Args:
            windows: indices of windows (b).
            factors: maps for all windows, or with a leading dimension b, one set for each.

        Returns:
            `relative_errors` of the windows, (b).
        """
        device = device_of(self.block)
        transform = LowRankReconstruction(factors, self.layout, self.rope)
        out = self.run(self.inputs[windows].to(device), ReconstructionLayer(transform, self.exact))
        return relative_errors(out, self.outputs[windows].to(device), self.exact)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the indices of all training windows once, in random order, `size` at a time."""
        yield from torch.randperm(self.training_count, generator=generator).split(size)

    @torch.no_grad()
    def held_out_error(self, factors: Factors, batch: int = 4) -> float:
        """Return the mean relative error over the held-out windows."""
        windows = torch.arange(self.training_count, len(self.inputs))
        return float(torch.cat([self.errors(w, factors) for w in windows.split(batch)]).mean())

    def errors_at(self, bases: LayerBases, pairs: list[Pair]) -> list[float]:
        """Return the held-out error at each pair (r_K, r_V), keys and values both compressed."""
        # fp32 on the layer's device, whatever the bases are in.
        like = torch.empty(0, device=device_of(self.block))
        return [self.held_out_error(bases.at(*pair).to(like)) for pair in pairs]

    def surface(self, bases: LayerBases, ranks_k: list[int], ranks_v: list[int]) -> list[list[float]]:
        """Return the held-out error at every (r_K, r_V): one row per rank of keys."""
        return [self.errors_at(bases, [(k, v) for v in ranks_v]) for k in ranks_k]


def _gram(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W W^T (h d, h d) in fp64 of weights (h, d, D).

    A bias (h, d) counts as the weight of one more input that is always 1.
    """
    rows = (weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)).double().flatten(0, 1)
    return rows @ rows.mT
