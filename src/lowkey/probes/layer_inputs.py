"""Hidden states on their way through a model, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.types import device_of
from lowkey.models import families
from lowkey.probes.layer_probe import passed


@torch.no_grad()
def first_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Tensor:
    """What the first decoder layer reads for the ids (n, t): (n, t, D) in fp32 on the CPU."""
    device = device_of(model)
    found = (
        model(x.to(device), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[0]
        for x in rows.split(batch)
    )
    return torch.cat([x.float().cpu() for x in found])


def layer_inputs(model: PreTrainedModel, rows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(layer, its inputs (n, t, D) in fp32 on the CPU) by the uncompressed model, one layer at a time."""
    hidden = first_inputs(model, rows, batch)
    for i, block in enumerate(families.decoder_layers(model)):
        yield i, hidden
        hidden = passed(model, i, block, hidden.to(model.dtype), None, batch).float()
