"""Second moments of keys, values, queries and inputs, gathered in one pass that keeps no activations."""

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

Sums = dict[int, dict[str, Tensor]]  # by layer and by field of LayerStatistics
BATCHES_BETWEEN_SAVES = 16  # of an unfinished pass
STATISTICS_FILE = "statistics"  # name of the unfinished pass in the work folder


def gather_statistics(
    model: PreTrainedModel, batches: Iterable[Tensor], work: Path | None = None, sinks: int = 0
) -> dict[int, LayerStatistics]:
    """Sum the second moments of every compressible layer over batches of text.

    Args:
        model: an attached model.
        batches: token ids (b, t) each, unpadded.
        work: a folder to save into every few batches and to resume from. The caller vouches that it belongs
            to this very job.
        sinks: how many first tokens of each row do not count.

    Returns:
        Statistics by layer.

    Raises:
        LowkeyError: if the saved pass is damaged or that of another model.
    """
    sums, done = _load(work, model)
    for count, ids in enumerate(batches):
        if count < done:
            continue
        _add(sums, _observe(model, ids.to(device_of(model)), sinks))
        # Saving every batch would take longer than the batch.
        if work is not None and (count + 1) % BATCHES_BETWEEN_SAVES == 0:
            _save(work, sums, count + 1)
    return {i: _statistics(layer) for i, layer in sums.items()}


@torch.no_grad()
def _observe(model: PreTrainedModel, ids: Tensor, sinks: int) -> Sums:
    """Return the sums over one batch of ids (b, t)."""
    layers = {
        i: SecondMomentLayer(families.rope(model, i), sinks) for i in families.geometry(model).compressible
    }
    # The layers sum what passes through them; the cache itself holds no tokens.
    cache = cache_of(model, layers.__getitem__)
    hidden = model(ids, past_key_values=cache, output_hidden_states=True, logits_to_keep=1).hidden_states
    for i, layer in layers.items():
        x = families.attention_input(model, i, hidden[i])[:, sinks:].float().flatten(0, 1)
        layer.sums["inputs"] = (x.mT @ x).double().cpu()
        layer.sums["tokens"] = torch.tensor(len(x), dtype=torch.long)
    return {i: layer.sums for i, layer in layers.items()}


def _add(total: Sums, new: Sums) -> None:
    for i, layer in new.items():
        known = total.setdefault(i, {})
        for name, moment in layer.items():
            known[name] = known[name] + moment if name in known else moment


def _statistics(sums: dict[str, Tensor]) -> LayerStatistics:
    """Return the statistics of one layer; means are divided by the number of tokens, moments stay sums."""
    tokens = int(sums["tokens"])
    moments = {
        name: s / tokens if name.endswith("_mean") else s for name, s in sums.items() if name != "tokens"
    }
    return LayerStatistics(tokens, **moments)


def _save(work: Path, sums: Sums, done: int) -> None:
    tensors = {f"{i}.{name}": t for i, layer in sums.items() for name, t in layer.items()}
    files.write_work(work, STATISTICS_FILE, tensors | {"done": torch.tensor(done)})


def _load(work: Path | None, model: PreTrainedModel) -> tuple[Sums, int]:
    """Return the saved sums and how many batches are in them; nothing and 0 if there are none."""
    tensors = files.read_work(work, STATISTICS_FILE)
    if work is None or tensors is None:
        return {}, 0
    done = int(files.checked_tensor(tensors, "done", torch.tensor(0), work))
    expected = {
        (i, name): t for i in families.geometry(model).compressible for name, t in _empty(model).items()
    }
    # Names, shapes and dtypes must be exactly those that this model gives.
    if done < 1 or set(tensors) != {*(f"{i}.{name}" for i, name in expected), "done"}:
        raise files.damaged_work(work, "statistics are not those of this model's layers")
    sums: Sums = {}
    for (i, name), like in expected.items():
        sums.setdefault(i, {})[name] = files.checked_tensor(tensors, f"{i}.{name}", like, work)
    return sums, done


def _empty(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return tensors without numbers that have the shapes and dtypes of one layer's sums."""
    shape = families.geometry(model)
    width, head_dim = shape.kv_heads * shape.head_dim, shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("keys_pre", "keys_post", "values"), (width, width)),
        **dict.fromkeys(("queries_pre", "queries_post"), (shape.kv_heads, head_dim, head_dim)),
        **dict.fromkeys(("keys_pre_mean", "keys_post_mean", "values_mean"), (width,)),
        "inputs": (shape.hidden, shape.hidden),
    }
    empty = {name: torch.empty(size, dtype=torch.float64, device="meta") for name, size in sizes.items()}
    return empty | {"tokens": torch.empty((), dtype=torch.long, device="meta")}
