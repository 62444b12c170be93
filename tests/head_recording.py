"""Head scores made up for tests, and caches that record attention weights."""

from __future__ import annotations

import pico
import pytest
import torch

from lowkey.core.types import LowkeyError
from lowkey.heads.retrieval import estimate_heads
from lowkey.heads.scores import HeadScores
from lowkey.heads.writing_chains import ChainJob

TEXT = "It was a bright cold day in April, and the clocks were striking. " * 40


def scores(values, layers=None, kv_heads=2, **changes) -> HeadScores:
    """Head scores of these values (cases, layers, heads)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    given = {
        "kind": "r2",
        "task": "facts",
        "model": "m",
        "model_sha256": "0" * 64,
        "data_sha256": "1" * 64,
        "seed": 0,
        "settings": {},
    }
    given |= {
        "values": values,
        "layers": tuple(layers or range(values.shape[1])),
        "kv_heads": kv_heads,
        "drawn": 100,
    }
    return HeadScores(**given | changes)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform random numbers."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random_scores(cases=12, layers=3, heads=8, kv_heads=4, **changes) -> HeadScores:
    """Head scores of random values."""
    return scores(noise(cases, layers, heads), None, kv_heads, **changes)


def refused(call, *parts: str) -> None:
    """Assert that a call is refused in one line that has these parts."""
    with pytest.raises(LowkeyError, match=parts[-1]) as refusal:
        call()
    assert len(str(refusal.value).splitlines()) == 1 and all(
        part in str(refusal.value) for part in parts[:-1]
    )


def small(model, kind="r2", **changes) -> HeadScores:
    """Head scores of a pico model, estimated on ten short cases."""
    given = {"task": "facts", "haystack": TEXT, "cases": 10, "lengths": (200, 230), "depths": 3}
    return estimate_heads(model, pico.tokenizer(), kind=kind, **given | changes)


def let_chains_count(monkeypatch) -> None:
    """All cases of chains are solved from now on, and answers with even first tokens are right."""
    monkeypatch.setattr(
        ChainJob, "_solved", lambda self, progress: torch.ones(len(self.chains), dtype=torch.bool)
    )
    monkeypatch.setattr(
        ChainJob, "rewards", lambda self, chains, answers: (answers.ids[:, 0] % 2 == 0).float()
    )
