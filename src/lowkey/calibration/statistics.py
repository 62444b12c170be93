"""One streaming pass that keeps only second moments, never activations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.cache.cache import cache_of
from lowkey.core import files
from lowkey.core.types import LayerStatistics, device_of
from lowkey.models import families
from lowkey.storage.second_moments import SecondMomentLayer

Sums = dict[int, dict[str, Tensor]]
BATCHES_BETWEEN_SAVES = 16  # batches between two saves of a resumable pass


def gather_statistics(
    model: PreTrainedModel, batches: Iterable[Tensor], work: Path | None = None, sinks: int = 0
) -> dict[int, LayerStatistics]:
    """Second moments per compressible layer over `batches` of unpadded ids (b, t), but for the first `sinks`
    of each row.

    work: a folder to resume from and save into every few batches; the caller vouches that it belongs to this
    very job.
    """
    sums, done = _load(work, model)
    for count, ids in enumerate(batches):
        if count < done:
            continue
        _add(sums, _observe(model, ids.to(device_of(model)), sinks))
        if work is not None and (count + 1) % BATCHES_BETWEEN_SAVES == 0:
            _save(work, sums, count + 1)
    return {i: _statistics(layer) for i, layer in sums.items()}


@torch.no_grad()
def _observe(model: PreTrainedModel, ids: Tensor, sinks: int) -> Sums:
    layers = {
        i: SecondMomentLayer(families.rope(model, i), sinks) for i in families.geometry(model).compressible
    }
    cache = cache_of(model, layers.__getitem__)
    hidden = model(ids, past_key_values=cache, output_hidden_states=True, logits_to_keep=1).hidden_states
    for i, layer in layers.items():
        x = families.attention_input(model, i, hidden[i])[:, sinks:].float().flatten(0, 1)
        layer.sums["inputs"] = (x.mT @ x).double().cpu()
        layer.sums["tokens"] = torch.tensor(len(x), dtype=torch.long)
    return {i: layer.sums for i, layer in layers.items()}


def _add(total: Sums, new: Sums) -> None:
    for i, layer in new.items():
        old = total.setdefault(i, {})
        for name, moment in layer.items():
            old[name] = old[name] + moment if name in old else moment


def _statistics(sums: dict[str, Tensor]) -> LayerStatistics:
    tokens = int(sums["tokens"])
    moments = {
        name: s / tokens if name.endswith("_mean") else s for name, s in sums.items() if name != "tokens"
    }
    return LayerStatistics(tokens, **moments)


def _save(work: Path, sums: Sums, done: int) -> None:
    tensors = {f"{i}.{name}": t for i, layer in sums.items() for name, t in layer.items()}
    files.write_work(work, "statistics", tensors | {"done": torch.tensor(done)})


def _load(work: Path | None, model: PreTrainedModel) -> tuple[Sums, int]:
    tensors = files.read_work(work, "statistics")
    if work is None or tensors is None:
        return {}, 0
    done = int(files.checked_tensor(tensors, "done", torch.tensor(0), work))
    shapes = {
        f"{i}.{name}": t for i in families.geometry(model).compressible for name, t in _empty(model).items()
    }
    if done < 1 or set(tensors) != {*shapes, "done"}:
        raise files.damaged_work(work, "statistics are not those of this model's layers")
    sums: Sums = {}
    for key, like in shapes.items():
        layer, name = key.split(".", 1)
        sums.setdefault(int(layer), {})[name] = files.checked_tensor(tensors, key, like, work)
    return sums, done


def _empty(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is summed for a layer, without its numbers."""
    shape = families.geometry(model)
    wide = shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("keys_pre", "keys_post", "values"), (wide, wide))
    sizes |= dict.fromkeys(("queries_pre", "queries_post"), (shape.kv_heads, shape.head_dim, shape.head_dim))
    sizes |= dict.fromkeys(("keys_pre_mean", "keys_post_mean", "values_mean"), (wide,)) | {
        "inputs": (shape.hidden, shape.hidden)
    }
    found = {name: torch.empty(size, dtype=torch.float64, device="meta") for name, size in sizes.items()}
    return found | {"tokens": torch.empty((), dtype=torch.long, device="meta")}
