"""Echo and induction heads, found on random tokens repeated four times (RazorAttention, arXiv:2407.15891)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.heads.retrieval import HeadScores
from lowkey.models import families
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.storage.attention_recording import AttentionRecordingLayer

ECHOES = {"induction": 1, "echo": 0}  # how far behind an earlier equal token a head of the kind looks
REPEATS = 4


@torch.no_grad()
def estimate_echo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str,
    cases: int = 4,
    context: int = 1024,
    seed: int = 0,
    progress: Progress = silent,
    work: Path | None = None,
) -> HeadScores:
    """Per case and query head, the mean attention from the tokens of the last repetition to their earlier
    equals (`echo`) or to the tokens right after these (`induction`). No text is needed. A case has at most
    `context` tokens.
    work: a folder to save every case in, from which the same call goes on.

    Errors: LowkeyError for an unknown kind, fewer than 1 case, or a context that the model is too short for.
    """
    longest = families.positions(model) or context
    if kind not in ECHOES or cases < 1 or not 4 * REPEATS < context <= longest:
        raise LowkeyError(
            f"kind {kind!r}, cases {cases}, context {context}: give {' or '.join(ECHOES)}, at least 1 case "
            "and a context of "
            f"{4 * REPEATS + 1} to {longest} tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = (context - len(start)) // REPEATS
    blocks = torch.randint(len(tokenizer), (cases, size), generator=generator)
    known: dict[str, Any] = {
        "kind": kind,
        "drawn": cases,
        "model": model.config._name_or_path,
        "model_sha256": model_fingerprint(model),
        "data_sha256": data_fingerprint(blocks),
        "seed": seed,
        "settings": {"block": size, "repeats": REPEATS},
    }
    measured, shape, values = Measured(work, known), families.geometry(model), list[Tensor]()
    for number, block in enumerate(progress(blocks, kind), 1):
        look = partial(_values, model, torch.tensor(start), block, ECHOES[kind])
        found = measured.tensor(f"{kind}, case {number}", (len(shape.compressible), shape.heads), look)
        values += [] if found is None else [found]
    measured.write()
    return HeadScores(
        task="repetition",
        values=torch.stack(values),
        layers=shape.compressible,
        kv_heads=shape.kv_heads,
        **known,
    )


def _values(model: PreTrainedModel, start: Tensor, block: Tensor, behind: int) -> Tensor:
    """(layers, H) of one block (n) of ids."""
    watching = {i: AttentionRecordingLayer() for i in families.geometry(model).compressible}
    cache = cache_of(model, watching.__getitem__)
    ids = torch.cat([start, block.repeat(REPEATS)]).unsqueeze(0).to(device_of(model))
    size, before = len(block), len(start) + len(block) * (REPEATS - 1)
    model(ids[:, :before], past_key_values=cache, logits_to_keep=1)
    total = torch.zeros(1)
    for i in range(size - behind):
        model(ids[:, before + i : before + i + 1], past_key_values=cache)
        at = torch.arange(len(start) + i + behind, before, size)
        total = total + torch.stack(
            [layer.weights[0].flatten(0, 1)[:, at].sum(1).cpu() for layer in watching.values()]
        )
    return total.double() / (size - behind)
