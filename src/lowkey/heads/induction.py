"""Induction and echo heads, found on random tokens that are repeated four times (RazorAttention,
arXiv:2407.15891).

When a token comes again, an echo head attends to its earlier occurrences and an induction head to the tokens
right after them.
"""

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
from lowkey.heads.scores import HeadScores
from lowkey.models import families
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.storage.attention_recording import AttentionRecordingLayer

# How many tokens behind an earlier occurrence of the token a head of each kind attends.
ECHOES = {"induction": 1, "echo": 0}
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
    """Measure how much each query head echoes or induces. No text is needed.

    A case is a block of random tokens, repeated four times. Its value for a head is the mean attention, over
    the tokens of the last repetition, that the head pays to their earlier occurrences (`echo`) or to the
    tokens right after those (`induction`).

    Args:
        model: the model, attached.
        tokenizer: its tokenizer, for the size of the vocabulary and the beginning-of-text token.
        kind: `echo` or `induction`.
        cases: number of random blocks.
        context: length of a case in tokens, at most.
        seed: seed of the random tokens.
        progress: shows progress over cases.
        work: folder in which every case is saved, so that the same call can resume.

    Returns:
        Scores with values (cases, layers, query heads) in [0, 1].

    Raises:
        LowkeyError: an unknown kind, fewer than 1 case, or a context that the model is too short for.
    """
    longest = families.max_positions(model) or context
    if kind not in ECHOES or cases < 1 or not 4 * REPEATS < context <= longest:
        raise LowkeyError(
            f"kind {kind!r}, cases {cases}, context {context}: give {' or '.join(ECHOES)}, at least 1 case "
            f"and a context of {4 * REPEATS + 1} to {longest} tokens"
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
        measure = partial(_values, model, torch.tensor(start), block, ECHOES[kind])
        value = measured.tensor(f"{kind}, case {number}", (len(shape.compressible), shape.heads), measure)
        values += [] if value is None else [value]
    measured.write()
    return HeadScores(
        task="repetition",
        values=torch.stack(values),
        layers=shape.compressible,
        kv_heads=shape.kv_heads,
        **known,
    )


def _values(model: PreTrainedModel, start: Tensor, block: Tensor, behind: int) -> Tensor:
    """Attention of the last repetition of one block.

    Args:
        model: the model, attached.
        start: ids that come before the block.
        block: ids (n).
        behind: how many tokens behind an earlier occurrence the attended token stands.

    Returns:
        Mean attention (layers, query heads), over the queries of the last repetition.
    """
    recorders = {i: AttentionRecordingLayer() for i in families.geometry(model).compressible}
    cache = cache_of(model, recorders.__getitem__)
    ids = torch.cat([start, block.repeat(REPEATS)]).unsqueeze(0).to(device_of(model))
    # `before`: tokens up to the last repetition, whose queries are the ones that count
    size, before = len(block), len(start) + len(block) * (REPEATS - 1)
    model(ids[:, :before], past_key_values=cache, logits_to_keep=1)
    total = torch.zeros(1)
    # One token at a time, because a recorder holds the weights of the newest step only.
    for i in range(size - behind):
        model(ids[:, before + i : before + i + 1], past_key_values=cache)
        # the places in the earlier repetitions that a head of this kind attends to
        at = torch.arange(len(start) + i + behind, before, size)
        total = total + torch.stack(
            [layer.weights[0].flatten(0, 1)[:, at].sum(1).cpu() for layer in recorders.values()]
        )
    return total.double() / (size - behind)
