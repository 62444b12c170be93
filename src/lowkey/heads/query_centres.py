"""Centres of a model's queries before their rotation (TriAttention, arXiv:2604.04921)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of
from lowkey.core import files
from lowkey.core.progress import Progress, silent
from lowkey.core.types import device_of
from lowkey.heads.learning import Learning
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.ops.rope import unrotate
from lowkey.policies.gates import Gates
from lowkey.policies.triattention import TriAttention, pair_norms
from lowkey.storage.base import batch_positions
from lowkey.storage.second_moments import SecondMomentLayer

SINKS = 4  # first tokens of a window that do not count: their queries are unlike all others


class QueryCentreLayer(SecondMomentLayer):
    """A layer that sums queries before their rotation, and norms of their pairs. It stores no tokens."""

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Add the new queries to the sums and answer the call; see `StoringLayer.attend`."""
        positions = batch_positions(self.seen - keys.shape[2], call, keys.shape[0])
        cos, sin = (x.float().unsqueeze(1) for x in self.rope(positions, keys))
        queries = unrotate(call.query.float(), cos, sin)[:, :, :, self.sinks :]
        self._add("centre", queries.sum((0, 3)))
        self._add("norms", pair_norms(queries, cos.shape[-1]).sum((0, 3)))
        return self.answer(keys, values, call)


@torch.no_grad()
def estimate_query_centres(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpus: str | None = None,
    windows: int = 64,
    context: int = 1024,
    seed: int = 0,
    progress: Progress = silent,
    work: Path | None = None,
) -> Gates:
    """Measure the mean query of every query head before its rotation, and the mean norm of its pairs.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        corpus: the text; None for the embedded one.
        windows: how many windows of it are read.
        context: tokens of a window.
        seed: of the choice of windows.
        progress: shows progress over windows.
        work: a folder to save into after every window and to resume from.

    Returns:
        For each compressible layer `centre` (h, g, d) and `norms` (h, g, d - p / 2), with p rotated channels.

    Raises:
        LowkeyError: if the text is too short, or unfinished work is damaged.
    """
    own_settings = {"sinks": SINKS}
    job = Learning.of(
        TriAttention.learns, model, tokenizer, corpus, windows, context, seed, work, own_settings
    )
    rows, folder, layers = job.rows, job.folder, families.geometry(model).compressible
    found, done = _unfinished(job, model)
    for n in progress(range(done, len(rows)), "reading", len(rows) - done):
        own = {i: QueryCentreLayer(families.rope(model, i), SINKS) for i in layers}
        model(
            rows[n : n + 1].to(device_of(model)),
            past_key_values=cache_of(model, own.__getitem__),
            logits_to_keep=1,
        )
        for slot, i in enumerate(layers):
            for name, t in own[i].sums.items():
                found[f"{slot}.{name}"] = found.get(f"{slot}.{name}", 0) + t
        found["done"] = torch.tensor(n + 1)
        if folder is not None:
            files.write_work(folder, "gates", found)
    count = len(rows) * (rows.shape[1] - SINKS)
    means = tuple(
        {name: (found[f"{slot}.{name}"] / count).float() for name in ("centre", "norms")}
        for slot in range(len(layers))
    )
    return job.gates(means)


def _unfinished(job: Learning, model: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """Sums that a stopped call left, and how many windows are in them. Raises: LowkeyError if damaged."""
    sizes = TriAttention("100%").gate_shapes(*families.head_sizes(model))
    like = {
        f"{slot}.{name}": torch.empty(size, dtype=torch.float64, device="meta")
        for slot in range(len(families.geometry(model).compressible))
        for name, size in sizes.items()
    }
    found = job.unfinished("gates", {**like, "done": torch.tensor(0)})
    if found is None or job.folder is None:
        return {}, 0
    done = int(found.pop("done"))
    if not 1 <= done <= len(job.rows):
        raise files.damaged_work(job.folder, f"sums of {done} windows of {len(job.rows)}")
    return found, done
