"""Hidden states on their way through a model, one decoder layer at a time, some layers compressed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowkey import families
from lowkey.probe import OneLayerCache, Taking
from lowkey.types import device_of


@torch.no_grad()
def first_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Tensor:
    """What the first decoder layer reads for the ids (n, t): (n, t, D) in fp32 on the CPU."""
    device = device_of(model)
    found = (model(x.to(device), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[0] for x in rows.split(batch))
    return torch.cat([x.float().cpu() for x in found])


def layer_in_full(model: PreTrainedModel, layer: int) -> nn.Module:
    """A copy of a decoder layer in fp32."""
    return copy.deepcopy(families.decoder_layers(model)[layer]).float().requires_grad_(False).eval()


@torch.no_grad()
def passed(model: PreTrainedModel, layer: int, block: nn.Module, hidden: Tensor, storage: Taking | None, batch: int) -> Tensor:
    """The outputs (n, t, D) of `block`, a decoder layer in fp32, on inputs of the same shape, keys and values through `storage`."""
    device, cache = device_of(block), None if storage is None else OneLayerCache(storage)
    return torch.cat([families.run_layer(model, layer, block, x.to(device), cache).cpu() for x in hidden.split(batch)])
