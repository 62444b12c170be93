"""Hidden states on their way through a model, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.types import device_of
from lowkey.models import families
from lowkey.probes.layer_probe import layer_outputs


@torch.no_grad()
def first_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Tensor:
    """Return what the first decoder layer reads.

    Args:
        model: the model.
        rows: token ids (n, t), unpadded.
        batch: rows per forward pass.

    Returns:
        Hidden states (n, t, D) in fp32 on the CPU.
    """
    device = device_of(model)
    states = (
        model(ids.to(device), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[0]
        for ids in rows.split(batch)
    )
    return torch.cat([x.float().cpu() for x in states])


def layer_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Yield every decoder layer's inputs in the uncompressed model.

    The inputs of one layer are held at a time: layer i computes those of layer i + 1.

    Args:
        model: the model.
        rows: token ids (n, t), unpadded.
        batch: rows per forward pass.

    Yields:
        (layer, its inputs (n, t, D) in fp32 on the CPU).
    """
    hidden = first_inputs(model, rows, batch)
    # Kept in fp32 on the CPU between layers, but each layer runs in the model's dtype as in a real pass.
    for i, block in enumerate(families.decoder_layers(model)):
        yield i, hidden
        hidden = layer_outputs(model, i, block, hidden.to(model.dtype), None, batch).float()
