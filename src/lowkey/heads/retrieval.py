"""Which attention heads find things: the importance scores of HeadKV (arXiv:2410.19258) and of its baseline
(arXiv:2404.15574).

A model answers needle tasks; where its heads look while it writes a right answer becomes one number per case
and query head. Scores are of one model: between the two models of the paper their ranks hardly agree, so a
file is tied to its model's weights.
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
BY_BEST = ("induction", "echo")  # a KV head is as good as the best of its group
SPLITS = 10  # of the cases in two halves
SIGNIFICANT_DIGITS = 6  # of a number in a file
SCORE_FIELDS = {  # of the fields of a file, less the values
    **dict.fromkeys(("kind", "task", "model", "model_sha256", "data_sha256"), str),
    **dict.fromkeys(("kv_heads", "drawn", "seed"), int),
    **{"layers": list, "settings": dict},
}

Accept = Literal["exact", "f1"]
ACCEPTS: tuple[Accept, ...] = ("exact", "f1")
Score = Callable[[Tensor, Case, int], Tensor]


# -- one step: weights (H, s) over all tokens seen, the case, and the token that the model now writes -> (H,)


def exact_copy(weights: Tensor, case: Case, token: int) -> Tensor:
    """1/len(needle) when the most attended position lies in the needle and holds the token now written
    (arXiv:2404.15574).
    """
    at = [i for start, stop in case.needle for i in range(start, stop)]
    copied = torch.tensor([i for i in at if case.prompt[i] == token], dtype=torch.long, device=weights.device)
    return torch.isin(weights.argmax(-1), copied).double() / len(at)


def top_mass(weights: Tensor, case: Case, token: int) -> Tensor:
    """Of the N = len(c2) most attended positions, the weight of those inside the right answer c2, over N
    (arXiv:2410.19258).

    Which token is written does not matter. The published code takes the sentence that holds the answer for
    c2, and divides by the answer's length once more.
    """
    start, stop = case.right
    weight, at = weights.topk(stop - start, dim=-1)
    return (weight * ((at >= start) & (at < stop))).sum(-1).double() / (stop - start)


def all_mass(weights: Tensor, case: Case, token: int) -> Tensor:
    """`top_mass` without the top: all the weight on c2, over N."""
    start, stop = case.right
    return weights[:, start:stop].sum(-1).double() / (stop - start)


@dataclass(frozen=True)
class Kind:
    """A score, and the tasks that it is taken on: the first that the model can do."""

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


# -- the value


@dataclass(frozen=True, eq=False)
class HeadScores:
    """values (cases, layers, H) in fp64 of the accepted cases, rounded as a file holds them; `layers` are the
    indices of the model's full-attention layers, H its query heads, which `kv_heads` share in groups of equal
    size.

    drawn: how many cases were asked; settings: how they were drawn and accepted.
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
        return len(self.values)

    def per_query_head(self) -> Tensor:
        """Mean over the cases: (layers, H)."""
        return self.values.mean(0)

    def per_kv_head(self) -> Tensor:
        """The share of each KV head, (layers, h), adding up to 1: the mean of its group (the maximum would
        hand out more than there is), or the maximum where the paper ranks heads by it (`induction` and
        `echo`, arXiv:2407.15891), normalised afterwards."""
        groups = self.per_query_head().unflatten(1, (self.kv_heads, -1))
        found = groups.amax(-1) if self.kind in BY_BEST else groups.mean(-1)
        return found / found.sum()

    def split_half(self) -> float:
        """Spearman's rank correlation of the query heads' scores between two halves of the cases, mean of
        SPLITS random splits.

        0.8 and more is wanted; below that, ask more cases.
        """
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(self.accepted, generator=generator) for _ in range(SPLITS)]
        halves = [self.values[order].tensor_split(2) for order in orders]
        return sum(spearman(a.mean(0), b.mean(0)) for a, b in halves) / SPLITS if self.accepted > 1 else 0.0

    def shuffled(self, seed: int) -> HeadScores:
        """The control: the same values dealt to other KV heads, in whole groups, so that shares stay as
        uneven as they are.
        """
        groups = self.values.unflatten(2, (self.kv_heads, -1)).flatten(1, 2)
        order = torch.randperm(groups.shape[1], generator=torch.Generator().manual_seed(seed))
        dealt = groups[:, order].reshape(self.values.shape)
        return replace(self, values=dealt, settings={**self.settings, "shuffled": seed})

    def top(self, count: int = 5) -> list[tuple[int, int, float]]:
        """The KV heads with most weight: (layer, head, share), the largest first."""
        shares = self.per_kv_head().flatten()
        best = [int(i) for i in shares.argsort(descending=True, stable=True)[:count]]
        return [(self.layers[i // self.kv_heads], i % self.kv_heads, float(shares[i])) for i in best]

    def describe(self) -> dict:
        """Everything but the values, and what they are like."""
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
        """One JSON file, whole or not at all; one of lowkey's there before is replaced. Errors: LowkeyError
        when it cannot be written.
        """
        files.write_json(
            Path(path), {**self.describe(), "values": self.values.tolist()}, HEADS_FILE, indent=None
        )

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> HeadScores:
        """Read a file; with `model`, refuse it unless it was made for that model.

        Errors: LowkeyError for another model's scores, a newer format, a damaged file, wrong shapes, NaNs or
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
        """Refuse another model, by fingerprint and by shape. Errors: LowkeyError."""
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
    """To SIGNIFICANT_DIGITS significant digits, which keeps files small and what is loaded equal to what was saved."""
    return torch.tensor(
        [float(f"{x:.{SIGNIFICANT_DIGITS}g}") for x in values.flatten().tolist()], dtype=torch.float64
    ).view(values.shape)


def _flaw(scores: HeadScores) -> str | None:
    """The rule that the values break."""
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
    known = meta.get("kind") if meta.get("kind") in BY_KIND else "r2"

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(
            f"{where}: {rule}; it is damaged or not one of ours: run `lowkey heads MODEL --kind {known} "
            "--out` anew"
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
    """Rank correlation of two tensors of one shape; equal values share their mean rank. 0 when all values of
    one are equal.
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = x.flatten().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[group]


# -- estimation


@dataclass(frozen=True)
class _Job:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    score: Score
    accept: Accept
    layers: tuple[int, ...]

    def values(self, case: Case) -> Tensor | None:
        """(layers, H), summed over the steps of a right answer; None when the model does not give it."""
        watching = {i: AttentionRecordingLayer() for i in self.layers}
        cache = cache_of(self.model, watching.__getitem__)
        ids = torch.tensor([case.prompt], device=device_of(self.model))
        self.model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        total, written, token = torch.zeros(1), [], ids[:, -1:]
        for _ in case.answer:
            token = self.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(int(token))
            looks = (layer.weights[0].flatten(0, 1) for layer in watching.values())
            total = total + torch.stack([self.score(weights, case, written[-1]).cpu() for weights in looks])
            if self._over(written, case):
                break
        return total if self._right(written, case) else None

    def _over(self, written: list[int], case: Case) -> bool:
        """Nothing can follow that counts."""
        if self.accept == "exact":
            return written != case.answer[: len(written)]
        return written[-1] == self.tokenizer.eos_token_id or "\n" in self.tokenizer.decode(written[-1:])

    def _right(self, written: list[int], case: Case) -> bool:
        if self.accept == "exact":
            return written == case.answer
        said, wanted = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in (written, case.answer)
        )
        return f1(said, wanted) > 0.5


def f1(said: str, wanted: str) -> float:
    """SQuAD's F1 of words, without case, punctuation and articles."""
    a, b = (_words(s) for s in (said, wanted))
    shared = sum((a & b).values())
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def _words(said: str) -> Counter[str]:
    plain = said.lower().translate(str.maketrans("", "", string.punctuation))
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
    """Score every query head of the full-attention layers on `cases` needle cases.

    task: a key of NEEDLE_TASKS; None takes the first task of the kind that the model can do. haystack: a text (None:
    the embedded one).
    lengths: tokens of a case (None: five, a fifth of `context` and so on up to it), crossed with `depths`
    places of the needle and the forms of the task's question. accept: which answers count, `exact` or `f1`
    (above 0.5, as in the published code).
    work: a folder to save the scores of every case in, from which the same call goes on.
    Errors: LowkeyError when fewer than 10 cases are answered right, for an unknown name, a context that the
    model or the haystack is too short for, or a model that is not attached.
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
        measured.forget()
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
    """`count` cases spread evenly over the grid lengths x depths, shortest first; the forms of the question
    take turns, in every row of the grid another way round. What a case says depends on its number and the
    seed alone."""
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
    """The values of the cases answered right. Given up when none of the shortest fifth is, or too few are
    left.
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
