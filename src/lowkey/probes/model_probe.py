"""The whole model with the keys and values of some layers compressed; differentiable."""

from __future__ import annotations

from collections.abc import Mapping
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
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact
from lowkey.storage.reconstruction import KVTransform, ReconstructionLayer


def logits(
    model: PreTrainedModel, ids: Tensor, transforms: Mapping[int, KVTransform], exact: Exact = NO_EXACT_TOKENS
) -> Tensor:
    """Return next-token logits when some layers' keys and values pass through a transform.

    Args:
        model: an attached model.
        ids: token ids (b, t), unpadded.
        transforms: by layer, what its keys and values pass through. Other layers are uncompressed.
        exact: the tokens that a query sees uncompressed.

    Returns:
        Logits (b, t, vocabulary).
    """
    config = model.config.get_text_config()
    full_attention = families.geometry(model).compressible
    # Layers with a sliding window are never compressed, but their cache must slide as usual.
    layers: list[Any] = [
        StockLayer() if i in full_attention else StockSlidingLayer(config.sliding_window)
        for i in range(len(families.layer_types(config)))
    ]
    for i, transform in transforms.items():
        layers[i] = ReconstructionLayer(transform, exact)
    return model(ids, past_key_values=Cache(layers=layers)).logits


def reconstructions(
    model: PreTrainedModel, factors: dict[int, Factors], layout: Layout
) -> dict[int, LowRankReconstruction]:
    """Return the low-rank reconstruction of every layer that has factors."""
    return {i: LowRankReconstruction(f, layout, families.rope(model, i)) for i, f in factors.items()}


@torch.no_grad()
def loss(
    model: PreTrainedModel,
    rows: Tensor,
    transforms: Mapping[int, KVTransform],
    batch: int = 4,
    exact: Exact = NO_EXACT_TOKENS,
) -> float:
    """Return the mean next-token cross-entropy in nats of ids (n, t); other arguments as in `logits`."""
    # weighted by windows, since the last batch may be smaller
    losses = [
        float(next_token_loss(logits(model, ids, transforms, exact), ids)) * len(ids)
        for ids in rows.to(device_of(model)).split(batch)
    ]
    return sum(losses) / len(rows)


def next_token_loss(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits (b, t, V) against the ids (b, t) one position later."""
    return cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def kl_divergence(compressed: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(original || compressed) per token in nats, from logits (b, t, V) over a temperature."""
    compressed, original = (
        (x.float() / temperature).log_softmax(-1).flatten(0, 1) for x in (compressed, original)
    )
    return kl_div(compressed, original, log_target=True, reduction="batchmean")


def loss_increases(
    model: PreTrainedModel,
    rows: Tensor,
    bases: dict[int, LayerBases],
    pairs: dict[int, list[Pair]],
    layout: Layout,
    progress: Progress,
    exact: Exact = NO_EXACT_TOKENS,
) -> dict[int, list[float]]:
    """Measure by how much the cross-entropy increases when one layer alone is compressed.

    Args:
        model: an attached model.
        rows: token ids (n, t).
        bases: bases by layer.
        pairs: by layer, the pairs (r_K, r_V) to measure.
        layout: whether keys are compressed before or after their rotation.
        progress: shows how far the measurement is.
        exact: the tokens that a query sees uncompressed.

    Returns:
        By layer, one number per pair, in nats per token and at least 0.
    """
    # Without transforms every layer is the stock one, so this is the loss of the full cache.
    uncompressed = loss(model, rows, {})
    like = torch.empty(0, device=device_of(model))

    def increase(i: int, pair: Pair) -> float:
        factors = bases[i].at(*pair).to(like)
        compressed = loss(model, rows, reconstructions(model, {i: factors}, layout), exact=exact)
        return max(0.0, compressed - uncompressed)  # a loss below that of the full cache is chance

    return {i: [increase(i, pair) for pair in pairs[i]] for i in progress(list(pairs), "one layer at a time")}
