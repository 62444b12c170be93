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
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of
from lowkey.core import files, text
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.heads.needles import NEEDLE_TASKS, Case, Haystack, draw_case
from lowkey.models import families
from lowkey.models.attention_interface import attached
from lowkey.models.fingerprint import check_model, data_fingerprint, model_fingerprint
from lowkey.storage.attention_recording import AttentionRecordingLayer

HEADS_FORMAT, HEADS_FILE = 1, "head-scores"
LEAST_CASES = 10  # solved cases; fewer say nothing about heads
BY_KIND = ("copy", "r2", "er", "mass", "induction", "echo")
# Kinds for which a KV head gets the score of the best query head of its group, and not their mean.
BY_BEST = ("induction", "echo")
SPLITS = 10  # random splits of the cases into halves
SIGNIFICANT_DIGITS = 6
SCORE_FIELDS = {  # of the fields of a file, less the values
    **dict.fromkeys(("kind", "task", "model", "model_sha256", "data_sha256"), str),
    **dict.fromkeys(("kv_heads", "drawn", "seed"), int),
    **{"layers": list, "settings": dict},
}

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


# -- scores of a model, and their file


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of a model's query heads, one per case that the model answered right.

    Values are rounded as a file holds them, so that what is loaded equals what was saved.

    Args:
        kind: kind of score.
        task: name of the task.
        values: (cases, layers, H) in fp64, between 0 and 1, of the accepted cases; H query heads.
        layers: indices of the model's full-attention layers.
        kv_heads: number of KV heads, each shared by equally many query heads.
        drawn: number of cases that were asked.
        model: name of the model.
        model_sha256: fingerprint of its weights.
        data_sha256: fingerprint of the text.
        seed: seed of the cases.
        settings: how cases were drawn and accepted.

    Raises:
        LowkeyError: values of a wrong shape or range, or all 0.
    """

    kind: str
    task: str
    values: Tensor
    layers: tuple[int, ...]
    kv_heads: int
    drawn: int
    model: str
    model_sha256: str
    data_sha256: str
    seed: int
    settings: dict

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _rounded(self.values.double()))
        if flaw := _flaw(self):
            raise LowkeyError(
                f"head scores: values of shape {tuple(self.values.shape)} {flaw}; make them again"
            )

    @property
    def accepted(self) -> int:
        """Number of accepted cases."""
        return len(self.values)

    def per_query_head(self) -> Tensor:
        """Mean over the cases (layers, H)."""
        return self.values.mean(0)

    def per_kv_head(self) -> Tensor:
        """The share of each KV head (layers, h); all shares add up to 1.

        A KV head has the mean of its query heads, since the maximum would add up to more than there is. For
        `induction` and `echo` it has the maximum, by which the paper ranks heads (arXiv:2407.15891).
        """
        groups = self.per_query_head().unflatten(1, (self.kv_heads, -1))
        found = groups.amax(-1) if self.kind in BY_BEST else groups.mean(-1)
        return found / found.sum()

    def split_half(self) -> float:
        """How well two halves of the cases agree: Spearman's rank correlation of the query heads' scores.

        Returns:
            The mean over 10 random splits. Below 0.8 more cases are needed.
        """
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(self.accepted, generator=generator) for _ in range(SPLITS)]
        halves = [self.values[order].tensor_split(2) for order in orders]
        return sum(spearman(a.mean(0), b.mean(0)) for a, b in halves) / SPLITS if self.accepted > 1 else 0.0

    def shuffled(self, seed: int) -> HeadScores:
        """A control: the same values, dealt to other KV heads in whole groups, so that shares stay as uneven
        as they are.

        Args:
            seed: seed of the permutation.
        """
        groups = self.values.unflatten(2, (self.kv_heads, -1)).flatten(1, 2)
        order = torch.randperm(groups.shape[1], generator=torch.Generator().manual_seed(seed))
        dealt = groups[:, order].reshape(self.values.shape)
        return replace(self, values=dealt, settings={**self.settings, "shuffled": seed})

    def top(self, count: int = 5) -> list[tuple[int, int, float]]:
        """The KV heads of the highest shares: (layer, head, share), the highest first."""
        shares = self.per_kv_head().flatten()
        best = [int(i) for i in shares.argsort(descending=True, stable=True)[:count]]
        return [(self.layers[i // self.kv_heads], i % self.kv_heads, float(shares[i])) for i in best]

    def describe(self) -> dict:
        """All fields but the values, and a summary of the values, as JSON has them."""
        found = {
            "accepted": self.accepted,
            "split_half": round(self.split_half(), 4),
            "zero_heads": float((self.per_query_head() == 0).double().mean()),
            "top": [[i, j, round(share, 4)] for i, j, share in self.top()],
        }
        return {
            "format": HEADS_FORMAT,
            **{name: getattr(self, name) for name in SCORE_FIELDS},
            "layers": list(self.layers),
            **found,
        }

    def save(self, path: str | Path) -> None:
        """Write one JSON file, whole or not at all. A file of head scores that was there before is replaced.

        Raises:
            LowkeyError: the file cannot be written, or another file is there.
        """
        files.write_json(
            Path(path), {**self.describe(), "values": self.values.tolist()}, HEADS_FILE, indent=None
        )

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> HeadScores:
        """Read a file of head scores.

        Args:
            path: the file.
            model: the model that the scores must belong to; None accepts any.

        Raises:
            LowkeyError: no such file, another model's scores, a newer format, or damage: wrong shapes, NaN,
                negative numbers.
        """
        place = Path(path)
        if not place.is_file():
            raise LowkeyError(
                f"head scores {str(place)!r}: no such file; run `lowkey heads MODEL --kind r2 --out {place}` "
                f"(kinds: {', '.join(BY_KIND)})"
            )
        scores = _parse(
            files.read_json(place, "head scores", HEADS_FILE, HEADS_FORMAT), f"head scores {str(place)!r}"
        )
        if model is not None:
            scores.check(model)
        return scores

    def check(self, model: PreTrainedModel) -> None:
        """Check that the scores belong to this model.

        Raises:
            LowkeyError: its fingerprint or its shape differs.
        """
        shape = families.geometry(model)
        again = (
            f"run `lowkey heads {model.config._name_or_path or 'MODEL'} --kind {self.kind}` and pass its file"
        )
        check_model("file of head scores", self.model, self.model_sha256, model, again)
        if (self.layers, self.values.shape[2], self.kv_heads) != (
            shape.compressible,
            shape.heads,
            shape.kv_heads,
        ):
            raise LowkeyError(
                f"head scores do not cover the layers and heads of this model; the file is damaged: {again}"
            )


def _rounded(values: Tensor) -> Tensor:
    """Values with few significant digits, which keeps files small."""
    return torch.tensor(
        [float(f"{x:.{SIGNIFICANT_DIGITS}g}") for x in values.flatten().tolist()], dtype=torch.float64
    ).view(values.shape)


def _flaw(scores: HeadScores) -> str | None:
    """The rule that the values break, or None."""
    v = scores.values
    if v.ndim != 3 or not v.numel():
        return "must be (cases, layers, query heads), none of them 0"
    if v.shape[1] != len(scores.layers) or scores.kv_heads < 1 or v.shape[2] % scores.kv_heads:
        return f"do not fit {len(scores.layers)} layers with {scores.kv_heads} KV heads"
    if len(v) > scores.drawn:
        return f"are of more cases than the {scores.drawn} drawn"
    if not bool(((v >= 0) & (v <= 1)).all()):
        return "must lie between 0 and 1"
    return None if bool(v.any()) else "are all 0, so that no head stands out"


def _parse(meta: dict, where: str) -> HeadScores:
    """The scores of a file's content; `where` names the file in messages."""
    kind_or_default = meta.get("kind") if meta.get("kind") in BY_KIND else "r2"

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(
            f"{where}: {rule}; it is damaged or not one of ours: run `lowkey heads MODEL --kind "
            f"{kind_or_default} --out` anew"
        )

    for name, kind in SCORE_FIELDS.items():
        if type(meta.get(name)) is not kind:
            raise refuse(f"field {name!r} is missing or no {kind.__name__}")
    if not all(type(i) is int and i >= 0 for i in meta["layers"]):
        raise refuse("field 'layers' holds something else than indices")
    try:
        values = torch.tensor(meta.get("values"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise refuse("field 'values' is no table of numbers") from None
    try:
        return HeadScores(
            values=values, **{name: meta[name] for name in SCORE_FIELDS} | {"layers": tuple(meta["layers"])}
        )
    except LowkeyError as error:
        raise LowkeyError(f"{where}: {error}") from None


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tensors of one shape. Equal values share their mean rank.

    Returns:
        The correlation; 0 if all values of one tensor are equal.
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Ranks of all values, flattened; equal values share their mean rank."""
    _, group, counts = x.flatten().unique(return_inverse=True, return_counts=True)
    # `counts` values share the ranks up to their cumulative count, the mean of which is (counts - 1) / 2
    # lower.
    return (counts.cumsum(0) - (counts - 1) / 2).double()[group]


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
        found = _solve(job, progress(drawn, f"{kind} on {name}", cases), cases, name, measured)
        if len(found) >= LEAST_CASES:
            break
    else:
        raise LowkeyError(
            f"task {name!r}: {len(found)} of {cases} cases answered right, scores need {LEAST_CASES}; "
            f"give another task ({', '.join(NEEDLE_TASKS)}), more cases, a shorter context or another model"
        )
    return HeadScores(
        kind=kind,
        task=name,
        values=torch.stack(found),
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
            f"cases {cases}, depths {depths}: scores need {LEAST_CASES} cases, one depth and one length at least; "
            "give more"
        )
    if (longest := families.positions(model)) is not None and max(lengths) > longest:
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
    found, shape = list[Tensor](), (len(job.layers), families.geometry(job.model).heads)
    for number, case in enumerate(cases, 1):
        values = measured.tensor(f"{task}, case {number}", shape, partial(job.values, case))
        found += [] if values is None else [values]
        if len(found) + count - number < LEAST_CASES or (
            not found and number >= max(LEAST_CASES, count // 5)
        ):
            break
    measured.write()
    return found
