"""Scores of a model's query heads, and their file.

`retrieval` and `induction` make them; token allocators that treat heads differently need them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.fingerprint import check_model

HEADS_FORMAT, HEADS_FILE = 1, "head-scores"
BY_KIND = ("copy", "r2", "er", "mass", "induction", "echo", "reward", "distilled", "ablation")
# Kinds for which a KV head gets the score of the best query head of its group, and not their mean.
BY_BEST = ("induction", "echo")
SPLITS = 10  # random splits of the cases into halves
SIGNIFICANT_DIGITS = 6
# Types of the fields of a file, without the values.
SCORE_FIELDS = {
    **dict.fromkeys(("kind", "task", "model", "model_sha256", "data_sha256"), str),
    **dict.fromkeys(("kv_heads", "drawn", "seed"), int),
    **{"layers": list, "settings": dict},
}


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
        scores = groups.amax(-1) if self.kind in BY_BEST else groups.mean(-1)
        return scores / scores.sum()

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
        # (cases, layers h, g): the query heads of a KV head stay together
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
        summary = {
            "accepted": self.accepted,
            "split_half": round(self.split_half(), 4),
            "zero_heads": float((self.per_query_head() == 0).double().mean()),
            "top": [[i, j, round(share, 4)] for i, j, share in self.top()],
        }
        return {
            "format": HEADS_FORMAT,
            **{name: getattr(self, name) for name in SCORE_FIELDS},
            "layers": list(self.layers),
            **summary,
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
            raise refuse(f"field {name!r} is missing or not of type {kind.__name__}")
    if not all(type(i) is int and i >= 0 for i in meta["layers"]):
        raise refuse("field 'layers' holds something other than indices")
    try:
        values = torch.tensor(meta.get("values"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise refuse("field 'values' is not a table of numbers") from None
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
