"""The whole model with the keys and values of some layers rebuilt as a compressed cache would give them;
differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowkey.allocation.profile import Pair
from lowkey.core.progress import Progress
from lowkey.core.types import Factors, LayerBases, Layout, device_of
from lowkey.models import families
from lowkey.probes.layer_probe import LowRankReconstruction
from lowkey.storage.base import StockLayer, StockSlidingLayer
from lowkey.storage.exact import NOTHING, Exact
from lowkey.storage.reconstruction import KVTransform, ReconstructionLayer


def logits(
    model: PreTrainedModel, ids: Tensor, storages: dict[int, KVTransform], exact: Exact = NOTHING
) -> Tensor:
    """Next-token logits (b, t, vocabulary) of unpadded ids, every layer that is named through its storage but
    for exact tokens.
    """
    config = model.config.get_text_config()
    full = families.geometry(model).compressible
    layers: list[Any] = [
        StockLayer() if i in full else StockSlidingLayer(config.sliding_window)
        for i in range(len(families.layer_types(config)))
    ]
    for i, storage in storages.items():
        layers[i] = ReconstructionLayer(storage, exact)
    return model(ids, past_key_values=Cache(layers=layers)).logits


def storages(model: PreTrainedModel, factors: dict[int, Factors], layout: Layout) -> dict[int, KVTransform]:
    return {i: LowRankReconstruction(f, layout, families.rope(model, i)) for i, f in factors.items()}


@torch.no_grad()
def loss(
    model: PreTrainedModel,
    rows: Tensor,
    found: dict[int, KVTransform],
    batch: int = 4,
    exact: Exact = NOTHING,
) -> float:
    """Mean cross-entropy per token of ids (n, t), in nats."""
    losses = [
        float(next_token_loss(logits(model, x, found, exact), x)) * len(x)
        for x in rows.to(device_of(model)).split(batch)
    ]
    return sum(losses) / len(rows)


def next_token_loss(scores: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(found: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(original || found) of next-token distributions per token, from logits (b, t, V) over a temperature."""
    found, original = ((x.float() / temperature).log_softmax(-1).flatten(0, 1) for x in (found, original))
    return kl_div(found, original, log_target=True, reduction="batchmean")


def loss_increases(
    model: PreTrainedModel,
    rows: Tensor,
    bases: dict[int, LayerBases],
    pairs: dict[int, list[Pair]],
    layout: Layout,
    progress: Progress,
    exact: Exact = NOTHING,
) -> dict[int, list[float]]:
    """For every layer and pair (r_K, r_V), how much the cross-entropy grows when that layer alone is
    compressed, at least 0.
    """
    whole = loss(model, rows, {})

    def grown(i: int, k: int, v: int) -> float:
        return max(
            0.0,
            loss(model, rows, storages(model, {i: bases[i].at(k, v).to(like(model))}, layout), exact=exact)
            - whole,
        )

    return {i: [grown(i, *pair) for pair in pairs[i]] for i in progress(list(pairs), "one layer at a time")}


def like(model: PreTrainedModel) -> Tensor:
    """An empty fp32 tensor where the model is."""
    return torch.empty(0, device=device_of(model))
