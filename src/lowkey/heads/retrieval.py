"""Which attention heads retrieve: the head scores of HeadKV (arXiv:2410.19258) and of its baseline
(arXiv:2404.15574).

A model answers needle tasks. Where its heads attend while it writes a right answer becomes one number per
case and query head. Scores are of one model: even between the two models of the paper their ranks hardly
agree. So a file of scores holds a fingerprint of its model and is refused for others.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of
from lowkey.core import text
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.heads.needles import NEEDLE_TASKS, Case, Haystack, draw_case
from lowkey.heads.scores import HeadScores
from lowkey.models import families
from lowkey.models.attention_interface import attached
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.storage.attention_recording import AttentionRecordingLayer

LEAST_CASES = 10  # solved cases; fewer say nothing about heads

Accept = Literal["exact", "f1"]
ACCEPTS: tuple[Accept, ...] = ("exact", "f1")
Score = Callable[[Tensor, Case, int], Tensor]


# -- the score of one decoding step


def exact_copy(weights: Tensor, case: Case, token: int) -> Tensor:
    """1 / len(needle) if the most attended position lies in the needle and holds the token just written; else
    0.

    Args:
        weights: attention weights (H, s) of one step over all tokens seen.
        case: the case.
        token: the token that the model just wrote.

    Returns:
        Scores (H).

    Source: arXiv:2404.15574.
    """
    at = [i for start, stop in case.needle for i in range(start, stop)]
    copied = torch.tensor([i for i in at if case.prompt[i] == token], dtype=torch.long, device=weights.device)
    return torch.isin(weights.argmax(-1), copied).double() / len(at)


def top_mass(weights: Tensor, case: Case, token: int) -> Tensor:
    """Attention on the right answer c2 among the N = len(c2) most attended positions, divided by N.

    Args:
        weights: attention weights (H, s) of one step over all tokens seen.
        case: the case.
        token: the token that the model just wrote; it does not matter here.

    Returns:
        Scores (H).

    Source: arXiv:2410.19258. The published code takes the sentence that holds the answer for c2, and divides
    by the answer's length once more.
    """
    start, stop = case.right
    weight, at = weights.topk(stop - start, dim=-1)
    return (weight * ((at >= start) & (at < stop))).sum(-1).double() / (stop - start)


def all_mass(weights: Tensor, case: Case, token: int) -> Tensor:
    """All attention on the right answer c2, divided by len(c2): `top_mass` without the restriction to top
    positions.

    Args:
        weights: attention weights (H, s) of one step over all tokens seen.
        case: the case.
        token: the token that the model just wrote; it does not matter here.

    Returns:
        Scores (H).
    """
    start, stop = case.right
    return weights[:, start:stop].sum(-1).double() / (stop - start)


@dataclass(frozen=True)
class Kind:
    """A kind of head score.

    Args:
        summary: one line for the command line.
        score: the score of one step.
        tasks: names of the tasks it is measured on: the first that the model can solve is taken.
    """

    summary: str
    score: Score
    tasks: tuple[str, ...]


SCORE_KINDS: dict[str, Kind] = {
    "copy": Kind("exact copies out of the needle (HeadKV-R)", exact_copy, ("recall",)),
    "r2": Kind(
        "top attention on the right one of several answers (HeadKV-R2)", top_mass, ("comparison", "facts")
    ),
    "er": Kind("the score of r2 on the needles of copy", top_mass, ("recall",)),
    "mass": Kind("all attention on the right one of several answers", all_mass, ("comparison", "facts")),
}


# -- estimation


@dataclass(frozen=True)
class _Job:
    """What stays the same for all cases of an estimation."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    score: Score
    accept: Accept
    layers: tuple[int, ...]

    def values(self, case: Case) -> Tensor | None:
        """Let the model answer a case.

        Returns:
            Scores (layers, H), summed over the steps of the answer; None if the answer is wrong.
        """
        recorders = {i: AttentionRecordingLayer() for i in self.layers}
        cache = cache_of(self.model, recorders.__getitem__)
        ids = torch.tensor([case.prompt], device=device_of(self.model))
        # all but the last token: a recorder holds the weights of one-token steps alone
        self.model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        total, written, token = torch.zeros(1), [], ids[:, -1:]
        for _ in case.answer:
            token = self.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(int(token))
            recorded = (layer.weights[0].flatten(0, 1) for layer in recorders.values())
            total = total + torch.stack(
                [self.score(weights, case, written[-1]).cpu() for weights in recorded]
            )
            if self._is_over(written, case):
                break
        return total if self._is_right(written, case) else None

    def _is_over(self, written: list[int], case: Case) -> bool:
        """Whether no further token matters."""
        if self.accept == "exact":
            return written != case.answer[: len(written)]
        return written[-1] == self.tokenizer.eos_token_id or "\n" in self.tokenizer.decode(written[-1:])

    def _is_right(self, written: list[int], case: Case) -> bool:
        """Whether the answer counts as right."""
        if self.accept == "exact":
            return written == case.answer
        answer, expected = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in (written, case.answer)
        )
        return f1(answer, expected) > 0.5


def f1(answer: str, expected: str) -> float:
    """F1 of the words of two texts, without case, punctuation and articles, as SQuAD defines it."""
    a, b = (_words(s) for s in (answer, expected))
    shared = sum((a & b).values())
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def _words(answer: str) -> Counter[str]:
    """How often each word occurs, without case, punctuation and articles."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", plain).split())


@torch.no_grad()
def estimate_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str = "r2",
    task: str | None = None,
    haystack: str | None = None,
    cases: int = 100,
    context: int = 1024,
    lengths: Sequence[int] | None = None,
    depths: int = 10,
    seed: int = 0,
    accept: Accept = "exact",
    progress: Progress = silent,
    work: Path | None = None,
) -> HeadScores:
    """Score every query head of the full-attention layers on needle cases.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        kind: kind of score, a name of `SCORE_KINDS`.
        task: name of a needle task; None takes the first task of the kind that the model can solve.
        haystack: the text; None for the embedded one.
        cases: number of cases.
        context: length of the longest cases in tokens.
        lengths: lengths of cases in tokens; None for five, from a fifth of `context` up to it.
        depths: number of places of the needle. Cases are spread over lengths, depths and forms of the
            question.
        seed: seed of the cases.
        accept: which answers count: `exact`, or `f1` above 0.5 as in the published code.
        progress: shows progress over cases.
        work: folder in which the scores of every case are saved, so that the same call can resume.

    Returns:
        Scores of the cases that were answered right.

    Raises:
        LowkeyError: fewer than 10 cases are answered right; an unknown name; a context that the model or the
            text is too short for; or a model that is not attached.
    """
    sizes = tuple(lengths) if lengths is not None else tuple(round(context * i / 5) for i in range(1, 6))
    _check_request(model, kind, task, cases, sizes, depths, accept)
    hay = Haystack(tokenizer, haystack if haystack is not None else text.embedded_text("calibration"))
    text.check_ids(ids := torch.tensor(hay.ids), model)
    job = _Job(model, tokenizer, SCORE_KINDS[kind].score, accept, families.geometry(model).compressible)
    known: dict[str, Any] = {
        "model": model.config._name_or_path,
        "model_sha256": model_fingerprint(model),
        "data_sha256": data_fingerprint(ids),
        "seed": seed,
        "settings": {"lengths": list(sizes), "depths": depths, "accept": accept},
    }
    measured = Measured(work, {**known, "kind": kind, "drawn": cases})
    for name in [task] if task else SCORE_KINDS[kind].tasks:
        drawn = _cases(name, hay, cases, sizes, depths, seed)
        solved = _solve(job, progress(drawn, f"{kind} on {name}", cases), cases, name, measured)
        if len(solved) >= LEAST_CASES:
            break
    else:
        measured.forget()
        raise LowkeyError(
            f"task {name!r}: {len(solved)} of {cases} cases answered right, scores need {LEAST_CASES}; "
            f"give another task ({', '.join(NEEDLE_TASKS)}), more cases, a shorter context or another model"
        )
    return HeadScores(
        kind=kind,
        task=name,
        values=torch.stack(solved),
        layers=job.layers,
        kv_heads=families.geometry(model).kv_heads,
        drawn=cases,
        **known,
    )


def _check_request(
    model: PreTrainedModel,
    kind: str,
    task: str | None,
    cases: int,
    lengths: tuple[int, ...],
    depths: int,
    accept: str,
) -> None:
    """Refuse what cannot work before anything is read."""
    for name, value, known in (
        ("kind", kind, SCORE_KINDS),
        ("task", task, NEEDLE_TASKS),
        ("accept", accept, ACCEPTS),
    ):
        if value is not None and value not in known:
            raise LowkeyError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    if not attached(model):
        raise LowkeyError("model is not attached: call lowkey.attach(model) before estimate_heads")
    if cases < LEAST_CASES or depths < 1 or not lengths:
        raise LowkeyError(
            f"cases {cases}, depths {depths}: scores need {LEAST_CASES} cases, one depth and one length at "
            "least; give more"
        )
    if (longest := families.max_positions(model)) is not None and max(lengths) > longest:
        raise LowkeyError(
            f"context {max(lengths)}: the model reads {longest} tokens at most; give a shorter context"
        )


def _cases(
    task: str, hay: Haystack, count: int, lengths: tuple[int, ...], depths: int, seed: int
) -> list[Case]:
    """`count` cases, spread evenly over the grid of lengths and depths, the shortest first.

    The content of a case depends on its number and the seed alone. Forms of the question take turns, in each
    row of the grid in another order, so that a form does not always meet the same depths.
    """
    places = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    grid = list(product(sorted(lengths), places))
    chosen = [
        (*grid[i * len(grid) // count], (i + i // depths) % NEEDLE_TASKS[task].forms) for i in range(count)
    ]
    try:
        return [
            draw_case(NEEDLE_TASKS[task], hay, *at, random.Random(f"{seed} {i}"))
            for i, at in enumerate(chosen)
        ]
    except LowkeyError as error:
        raise LowkeyError(f"task {task!r}, lengths {', '.join(map(str, lengths))}: {error}") from None


def _solve(job: _Job, cases: Iterable[Case], count: int, task: str, measured: Measured) -> list[Tensor]:
    """The scores of the cases that are answered right.

    It stops as soon as too few cases remain to reach the minimum, or if none of the shortest fifth is solved.
    """
    solved, shape = list[Tensor](), (len(job.layers), families.geometry(job.model).heads)
    for number, case in enumerate(cases, 1):
        values = measured.tensor(f"{task}, case {number}", shape, partial(job.values, case))
        solved += [] if values is None else [values]
        if len(solved) + count - number < LEAST_CASES or (
            not solved and number >= max(LEAST_CASES, count // 5)
        ):
            break
    measured.write()
    return solved
