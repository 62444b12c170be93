"""What both sides run, each in its own environment: the same texts, questions and measurements.

Imports nothing but torch and safetensors. A side says how it reads a context and how it continues (`Side`);
everything that is measured is measured here, by the same code.
"""

from __future__ import annotations

import gc
import json
import time
import types
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

STEPS = 16  # of decoding that are timed
NOT_FOLLOWED = (
    type,
    types.ModuleType,
    torch.nn.Module,
    weakref.ReferenceType,
    types.CodeType,
    types.FrameType,
    types.FunctionType,
    torch.dtype,
    torch.device,
)


class Side(Protocol):
    """One library with a model."""

    def read(self, row: dict[str, Any], ids: Tensor) -> Any:
        """A cache that has read ids (1, t) and kept what the row says; an empty row keeps everything."""

    def kept(self, row: dict[str, Any], ids: Tensor) -> tuple[Any, Tensor, float]:
        """As `read`; which tokens (layers, h, t), or key channels (layers, h, d), are kept; and the seconds
        that reading took.
        """

    def fork(self, cache: Any) -> Any:
        """The cache to ask one question over."""

    def whole(self, cache: Any) -> Any:
        """The cache to go on with for good."""

    def drop(self, fork: Any) -> None:
        """Forget a question."""

    def forward(self, fork: Any, ids: Tensor, start: int, keep: int) -> Tensor:
        """Logits (keep, vocabulary) of the last of the ids (1, n); the first is at position `start`."""

    def cleared(self) -> int:
        """Bytes that the row left outside of the cache; they are forgotten."""


@torch.no_grad()
def measure(
    side: Side,
    rows: dict[str, dict[str, Any]],
    job: dict[str, Any],
    out: Path,
    contexts: list[int] | None = None,
) -> None:
    """Measure every row on every context, and go on where an earlier run stopped.

    The rows of a context follow one another in one process, the full cache among them, so that their times
    can be compared.

    Args:
        side: the library.
        rows: what to measure, by name; an empty row is the full cache.
        job: `contexts`, each with `ids` and `asked` (ids of a question and of its answer); `ends`, ids that
            end an answer; `most`, the longest answer.
        contexts: numbers of the contexts; None for all.
        out: folder for results.jsonl and, for each row and context, a mask of what was kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "results.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {(r["row"], r["context"]) for r in map(json.loads, lines)}
    side.read({}, torch.tensor([job["contexts"][0]["ids"]]))  # what is done only once is not timed
    for number, context in enumerate(job["contexts"]):
        ids = torch.tensor([context["ids"]])
        left = [name for name in rows if (name, number) not in done]
        if not left or (contexts and number not in contexts):
            continue
        # the full cache of this process, for the times of its rows
        whole, _, seconds = side.kept({}, ids)
        full = {"full_prefill": seconds, "full_steps": steps(side, whole, ids)}
        for name in left:
            row = rows[name]
            cache, kept, seconds = side.kept(row, ids)
            result = {"row": name, "context": number, "held": reachable(cache), "prefill": seconds, **full}
            result |= {**asked(side, cache, context, job), "steps": steps(side, cache, ids)}
            result["outside"] = side.cleared()
            save_file({"kept": kept.to(torch.uint8)}, out / f"{number}-{name.replace(' ', '_')}.safetensors")
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")


def steps(side: Side, cache: Any, ids: Tensor) -> list[float]:
    """Seconds of each of a few steps of decoding behind the context, which end the use of the cache."""
    whole, seconds = side.whole(cache), []
    for step in range(STEPS):
        begun = time.perf_counter()
        side.forward(whole, ids[:, step : step + 1], ids.shape[1] + step, 1)
        seconds.append(time.perf_counter() - begun)
    return seconds


def asked(side: Side, cache: Any, context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Every question over the cache: nats per token of the right answer, the likeliest token at each of its
    places and behind it, and what greedy writing gives.
    """
    nats, best, texts = [], [], []
    for question, answer in context["asked"]:
        start, ids = len(context["ids"]), torch.tensor([question + answer])
        fork = side.fork(cache)
        said = side.forward(fork, ids, start, len(answer) + 1).float().log_softmax(-1)
        side.drop(fork)
        nats.append(float(-said[:-1].gather(1, torch.tensor(answer)[:, None]).mean()))
        best.append(said.argmax(-1).tolist())
        fork, written = side.fork(cache), []
        new, start = torch.tensor([question]), start
        while len(written) < job["most"]:
            token = int(side.forward(fork, new, start, 1)[-1].argmax())
            if token in job["ends"]:
                break
            written.append(token)
            start, new = start + new.shape[1], torch.tensor([[token]])
        side.drop(fork)
        texts.append(written)
    return {"nats": nats, "best": best, "texts": texts}


def reachable(root: object) -> int:
    """Bytes of the distinct storages behind all tensors that an object reaches, but not through modules."""
    found: dict[int, int] = {}
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, NOT_FOLLOWED):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:
            todo += gc.get_referents(item)
    return sum(found.values())
