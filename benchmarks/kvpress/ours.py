"""lowkey's side, run by compare.py in lowkey's environment.

python benchmarks/kvpress/ours.py JOB.json OUT
python benchmarks/kvpress/ours.py JOB.json OUT --context 0 2
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measuring import measure
from torch import Tensor

import lowkey
from lowkey.catalog import make_policy
from lowkey.models.loading import load


class Ours:
    """lowkey over a model."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = load(name, "float32", "cpu")
        self.config = self.model.config

    def read(self, row: dict[str, Any], ids: Tensor) -> Any:
        """See `measuring.Side`."""
        if not row:
            cache = lowkey.make_cache(self.model)
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            return cache
        policy = make_policy(row["policy"], row["budget"], {k: str(v) for k, v in row["options"].items()})
        cache = lowkey.make_cache(self.model, policy=policy)
        lowkey.prefill(self.model, self.tokenizer, cache, ids)
        cache.freeze()  # a question evicts nothing
        return cache

    def kept(self, row: dict[str, Any], ids: Tensor) -> tuple[Any, Tensor, float]:
        """See `measuring.Side`."""
        begun = time.perf_counter()
        cache = self.read(row, ids)
        seconds = time.perf_counter() - begun
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        if row.get("channels"):
            return cache, torch.stack([self._channels(layer) for layer in cache.layers]), seconds
        mask = torch.ones(layers, heads, ids.shape[1], dtype=torch.bool)
        for layer in range(layers) if row else ():
            mask[layer] = False
            for head, positions in enumerate(cache.kept_positions(layer)):
                mask[layer, head, positions] = True
        if row:
            assert cache.nbytes() == cache.predicted_nbytes()
        return cache, mask, seconds

    def _channels(self, layer: Any) -> Tensor:
        """The key channels (h, d) that the newest pruning left."""
        chosen = layer.kept_channels[0, -1]
        return torch.zeros(len(chosen), self.config.head_dim, dtype=torch.bool).scatter(
            1, chosen.long(), True
        )

    def fork(self, cache: Any) -> Any:
        """See `measuring.Side`."""
        return cache.branch()

    def whole(self, cache: Any) -> Any:
        """See `measuring.Side`."""
        return cache

    def drop(self, fork: Any) -> None:
        """See `measuring.Side`: a branch goes with its name."""

    def forward(self, fork: Any, ids: Tensor, start: int, keep: int) -> Tensor:
        """See `measuring.Side`. The cache knows the position."""
        logits: Tensor = self.model(ids, past_key_values=fork, logits_to_keep=keep).logits[0]
        return logits

    def cleared(self) -> int:
        """See `measuring.Side`: nothing lies outside of the cache."""
        return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", nargs="+", type=int, help="numbers; all unless given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = json.loads(given.job.read_text())
    side = Ours(job["model"])
    measure(side, job["ours"], job, given.out, given.context)
