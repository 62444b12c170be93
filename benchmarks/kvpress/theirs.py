"""kvpress's side, run by compare.py in kvpress's own environment.

PYTHON theirs.py JOB.json OUT
PYTHON theirs.py JOB.json OUT --context 0 2
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from measuring import measure
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


class Theirs:
    """kvpress over a model, as its pipeline uses it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = self.model.model.layers

    def read(self, row: dict[str, Any], ids: Tensor) -> Any:
        """See `measuring.Side`. The model runs without its head, as in kvpress's pipeline."""
        cache = DynamicCache()
        self.model.config.name_or_path = row.get("folder") or self.folder
        with self.made(row["press"])(self.model) if row else nullcontext():
            self.model.model(input_ids=ids, past_key_values=cache)
        return cache

    def kept(self, row: dict[str, Any], ids: Tensor) -> tuple[Any, Tensor, float]:
        """See `measuring.Side`. What is kept is found by comparing keys, since presses do not tell."""
        whole: dict[int, Tensor] = {}

        def note(module: Any, arguments: Any, kwargs: Any, output: Any) -> None:
            # a clone: ThinK writes into the keys; KVzip's later passes are not noted
            whole.setdefault(
                module.layer_idx, kwargs["past_key_values"].layers[module.layer_idx].keys.clone()
            )

        hooks = [x.self_attn.register_forward_hook(note, with_kwargs=True) for x in self.layers]
        begun = time.perf_counter()
        cache = self.read(row, ids)
        seconds = time.perf_counter() - begun
        for hook in hooks:
            hook.remove()
        kept = torch.stack([self._kept(i, whole[i][0], cache) for i in range(len(self.layers))])
        return cache, kept, seconds

    def _kept(self, index: int, whole: Tensor, cache: Any) -> Tensor:
        """Tokens (h, t) or channels (h, d) of a layer, given its keys (h, t, d) before the press."""
        keys = cache.layers[index].keys[0]
        mask = torch.ones(whole.shape[:2], dtype=torch.bool)
        masked = getattr(self.layers[index].self_attn, "masked_key_indices", None)
        if masked is not None:
            mask[masked[1], masked[2]] = False
        elif keys.shape == whole.shape:
            changed = (keys != whole).any(1)
            return ~changed if bool(changed.any()) else mask
        else:
            mask[:] = False
            for head in range(len(keys)):
                place = {x.numpy().tobytes(): i for i, x in enumerate(whole[head])}
                mask[head, [place[x.numpy().tobytes()] for x in keys[head]]] = True
        return mask

    def fork(self, cache: Any) -> Any:
        """See `measuring.Side`: the cache itself; `drop` cuts it to its length again."""
        return cache, [layer.keys.shape[2] for layer in cache.layers]

    whole = fork

    def drop(self, fork: Any) -> None:
        """See `measuring.Side`; as `_remove_answer_from_cache` of kvpress's pipeline."""
        for layer, length in zip(fork[0].layers, fork[1], strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def forward(self, fork: Any, ids: Tensor, start: int, keep: int) -> Tensor:
        """See `measuring.Side`.

        transformers makes one mask for all layers, by the length of the first, so a call of several tokens
        fails over layers of different lengths. Their tokens are given one by one, which needs no mask.
        """
        if ids.shape[1] > 1 and len({layer.keys.shape[2] for layer in fork[0].layers}) > 1:
            said = [self.forward(fork, ids[:, i : i + 1], start + i, 1) for i in range(ids.shape[1])]
            return torch.cat(said[-keep:])
        positions = torch.arange(start, start + ids.shape[1]).unsqueeze(0)
        out = self.model(input_ids=ids, past_key_values=fork[0], position_ids=positions, logits_to_keep=keep)
        return out.logits[0]

    def cleared(self) -> int:
        """See `measuring.Side`: indices that masks leave on the model's modules."""
        outside = 0
        for layer in self.layers:
            for part in getattr(layer.self_attn, "masked_key_indices", None) or ():
                outside += part.untyped_storage().nbytes()
            layer.self_attn.masked_key_indices = None
        return outside

    def made(self, spec: dict[str, Any]) -> Any:
        """A press from its name, its options and the press that it wraps."""
        inner = {"press": self.made(spec["inner"])} if "inner" in spec else {}
        return getattr(kvpress, spec["name"])(**inner, **spec.get("options", {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", nargs="+", type=int, help="numbers; all unless given")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    job = json.loads(given.job.read_text())
    side = Theirs(job["folder"])
    measure(side, job["theirs"], job, given.out, given.context)
