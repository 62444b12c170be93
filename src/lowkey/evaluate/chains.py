"""Accuracy of long answers: chains of look-ups, written by sampling over a compressed cache.

The context is read and evicted from before the question, so that every look-up is made over what was kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.intervals import paired_bootstrap
from lowkey.core.progress import Progress, silent
from lowkey.core.seeds import seed_of
from lowkey.core.types import device_of
from lowkey.evaluate.asking import Once, anew
from lowkey.evaluate.settings import Setting
from lowkey.heads.chains import Chain, stopping_tokens
from lowkey.heads.writing_chains import sample_answers


def measure_chains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    chains: Sequence[Chain],
    *,
    samples: int = 8,
    temperature: float = 1.0,
    most: int = 32,
    at_once: int = 8,
    seed: int = 0,
    progress: Progress = silent,
    once: Once = anew,
) -> dict[str, list[dict[str, Any]]]:
    """Let every setting answer every case several times.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared.
        chains: the cases.
        samples: answers to a case.
        temperature: of sampling; 0 takes the likeliest token.
        most: most tokens of an answer.
        at_once: cases whose answers are written at once, if their prompts and questions are of one length.
        seed: of sampling, the same for all settings.
        progress: shows progress.
        once: gives an earlier measurement of the same name, or measures.

    Returns:
        By setting, for each case: `right`, `links` (right look-ups before the first mistake), `tokens` and
        `over` (whether the answer did not end), each a list over the samples; and `held`, bytes of its row
        when the answer began.
    """
    stops = stopping_tokens(tokenizer, model.config.get_text_config().vocab_size)
    groups: list[list[Chain]] = []
    for chain in chains:
        like = groups[-1][0] if groups else None
        fits = like and (len(like.prompt), like.question) == (len(chain.prompt), chain.question)
        if fits and len(groups[-1]) < at_once:
            groups[-1].append(chain)
        else:
            groups.append([chain])
    found: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in settings}
    todo = [(setting, i) for setting in settings for i in range(len(groups))]
    for setting, i in progress(todo, lambda unit: f"chains, {unit[0].name}"):
        drawn = seed_of(seed, "answers", i)
        write = partial(
            _answered, model, tokenizer, setting, groups[i], samples, temperature, most, drawn, stops
        )
        found[setting.name] += once(f"chains {i} {setting.name}", write)
    return found


@torch.no_grad()
def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    group: list[Chain],
    samples: int,
    temperature: float,
    most: int,
    seed: int,
    stops: torch.Tensor,
) -> list[dict[str, Any]]:
    """Measurements of some cases of one length under one setting."""
    cache, question = setting.make(), group[0].question
    ids = torch.tensor([chain.prompt for chain in group], device=device_of(model))
    model(ids[:, :-question], past_key_values=cache, logits_to_keep=1)
    logits = torch.empty(0)
    # one token after the other, as an answer is written: the window moves with each
    for i in range(question, 0, -1):
        step = ids[:, ids.shape[1] - i : ids.shape[1] - i + 1]
        logits = model(step, past_key_values=cache).logits[:, -1]
    held = cache.nbytes() / len(group)
    cache.batch_repeat_interleave(samples)
    logits = logits.repeat_interleave(samples, 0)
    answers = sample_answers(model, cache, logits, most, temperature, seed, stops)
    written = answers.texts(tokenizer)
    cases = []
    for i, chain in enumerate(group):
        own = slice(i * samples, (i + 1) * samples)
        cases.append(
            {
                "right": [chain.right(said) for said in written[own]],
                "links": [chain.links(said) for said in written[own]],
                "tokens": answers.lengths[own].tolist(),
                "over": (~answers.ended[own]).tolist(),
                "held": held,
            }
        )
    return cases


def summary_of_chains(
    measured: dict[str, list[dict[str, Any]]], reference: str, draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Means of what `measure_chains` found, with intervals.

    Args:
        measured: by setting.
        reference: the setting that the others are compared with, case by case.
        draws: of the bootstrap, over cases.
        seed: of the bootstrap.

    Returns:
        By setting: `accuracy`, `links`, `tokens`, `over_length`, `held`, and the difference of its accuracy
        from the reference's with its 95 % interval, `difference`.
    """
    right = {name: [statistics.fmean(case["right"]) for case in cases] for name, cases in measured.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, cases in measured.items():
        means = {
            key: statistics.fmean(statistics.fmean(case[key]) for case in cases)
            for key in ("links", "tokens", "over")
        }
        rows[name] = {
            "accuracy": statistics.fmean(right[name]),
            "links": means["links"],
            "tokens": means["tokens"],
            "over_length": means["over"],
            "held": statistics.fmean(case["held"] for case in cases),
            "difference": list(paired_bootstrap(right[name], right[reference], draws, seed)),
        }
    return rows
