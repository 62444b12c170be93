"""Trains the gates of Fast KVzip on the scores of KVzip (arXiv:2601.17668)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of, make_cache
from lowkey.cache.prefill import prefill
from lowkey.core import files
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import device_of
from lowkey.heads.learning import Learning
from lowkey.heads.told_facts import TOWNS, with_facts
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.ops.rope import unrotate
from lowkey.ops.sink_gate import sink_gate
from lowkey.policies.allocators import AtLeast
from lowkey.policies.fast_kvzip import FastKVzip, gate_inputs
from lowkey.policies.gates import Gates
from lowkey.policies.kvzip import KVzip
from lowkey.storage.base import batch_positions
from lowkey.storage.second_moments import SecondMomentLayer

Targets = list[tuple[Tensor, Tensor]]  # by layer: inputs (n, z) and KVzip's scores (n, h)
WARMUP = 50  # steps over which the published rate rises to half its value, before it jumps to the whole


@dataclass(frozen=True)
class FastKVzipTraining(Checked):
    """How gates are trained.

    Args:
        variant: `repaired` counts the bias once and starts the sinks apart. `published` counts it twice in
            training and once in use, and starts all sinks at 0, where they stay equal to one another.
        steps: training steps of each layer (default 1000; the paper has 5000).
        positions: tokens per step (default 1000, as in the paper).
        tokens: of each window, drawn at random, from which positions are drawn; it bounds the memory
            (default 256).
        facts: how many facts of another wording than those of any task are put between the sentences of each
            window (default 0, as in the paper).
        lr: learning rate of SGD with momentum 0.9, halved from half of the steps on and again from three
            quarters on (default 0.2).
        seed: of everything random (default 0).
    """

    variant: Literal["repaired", "published"] = "repaired"
    steps: int = option(1000, at_least=0, at_most=10**7)
    positions: int = option(1000, at_least=1, at_most=10**6)
    tokens: int = option(256, at_least=1, at_most=2**20)
    facts: int = option(0, at_least=0, at_most=len(TOWNS))
    lr: float = option(0.2, above=0, at_most=1000)
    seed: int = option(0, at_least=0)


class GateInputLayer(SecondMomentLayer):
    """A cache layer that stores no tokens, but remembers what a gate sees of them: `seen_inputs` (t, z)."""

    seen_inputs: Tensor

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Remember the new tokens and answer the call; see `StoringLayer.attend`."""
        positions = batch_positions(self.seen - keys.shape[2], call, keys.shape[0])
        cos, sin = (x.float() for x in self.rope(positions, keys))
        queries = unrotate(call.query.float(), cos.unsqueeze(1), sin.unsqueeze(1))
        self.seen_inputs = gate_inputs(queries, unrotate(keys.float(), cos, sin), values.float())[0]
        return self.answer(keys, values, call)


def train_fast_kvzip(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpus: str | None = None,
    windows: int = 64,
    context: int = 1024,
    seed: int = 0,
    training: FastKVzipTraining = FastKVzipTraining(),
    progress: Progress = silent,
    work: Path | None = None,
) -> Gates:
    """Train one gate for each layer, to give what KVzip's second pass gives.

    Args:
        model: the model, attached; it stays as it is.
        tokenizer: its tokenizer.
        corpus: the text; None for the embedded one.
        windows: how many windows of it KVzip scores.
        context: tokens of a window.
        seed: of the choice of windows.
        training: how to train.
        progress: shows progress over windows, and over layers.
        work: a folder to save into after every window and layer, and to resume from, to the same gates.

    Raises:
        LowkeyError: if the text is too short, or unfinished work is damaged.
    """
    own_settings = {"training": asdict(training)}
    job = Learning.of(FastKVzip.learns, model, tokenizer, corpus, windows, context, seed, work, own_settings)
    rows, folder = with_facts(job.rows, tokenizer, training.facts, training.seed), job.folder
    generator = torch.Generator().manual_seed(training.seed)
    chosen = [torch.randperm(rows.shape[1], generator=generator)[: training.tokens] for _ in rows]
    slots = range(len(families.geometry(model).compressible))
    sizes = FastKVzip("100%").gate_shapes(*families.head_sizes(model))
    heads, _, _, seen = sizes["query"]
    pieces = []
    for n in progress(range(len(rows)), "scoring by KVzip", len(rows)):
        count = len(chosen[n])
        x, scores = torch.empty(count, seen, dtype=model.dtype), torch.empty(count, heads)
        piece = job.unfinished(
            f"window-{n}", {f"{i}.{name}": t for i in slots for name, t in (("x", x), ("score", scores))}
        )
        if piece is None:
            piece = _scored(model, tokenizer, rows[n : n + 1], chosen[n])
            if folder is not None:
                files.write_work(folder, f"window-{n}", piece)
        elif folder is not None and any(
            bool(((t < 0) | (t > 1)).any()) for name, t in piece.items() if name.endswith("score")
        ):
            raise files.damaged_work(folder, f"scores of window {n} lie beyond 0 and 1")
        pieces.append(piece)
    gates = []
    for slot in progress(slots, "training gates", len(slots)):
        gate = job.unfinished(f"layer-{slot}", {name: torch.empty(size) for name, size in sizes.items()})
        if gate is None:
            inputs, targets = (torch.cat([p[f"{slot}.{name}"] for p in pieces]) for name in ("x", "score"))
            with torch.enable_grad():
                gate = fitted_gate(inputs.float(), targets, _initial(model, training, slot), training, slot)
            if folder is not None:
                files.write_work(folder, f"layer-{slot}", gate)
        gates.append(gate)
    return job.gates(tuple(gates))


@torch.no_grad()
def kvzip_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[Tensor]:
    """KVzip's scores (h, t) of a text (1, t) in every layer that evicts, by its second pass."""
    # a budget that holds all tokens would make no scores
    cache = make_cache(model, policy=KVzip(None, allocator=AtLeast(0.0)))
    prefill(model, tokenizer, cache, ids)
    # a weight may exceed 1 by a rounding
    return [layer.rows_scores.view(-1, ids.shape[1]).clamp(0, 1) for layer in cache.evicting]


@torch.no_grad()
def inputs_of_gates(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What gates see of a text (1, t) in every layer that evicts: (t, z) each."""
    own = {i: GateInputLayer(families.rope(model, i)) for i in families.geometry(model).compressible}
    model(ids, past_key_values=cache_of(model, own.__getitem__), logits_to_keep=1)
    return [layer.seen_inputs for layer in own.values()]


def _scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, chosen: Tensor
) -> dict[str, Tensor]:
    """Inputs in the model's dtype, and scores, of some tokens of a window (1, t)."""
    ids = ids.to(device_of(model))
    both = zip(inputs_of_gates(model, ids), kvzip_scores(model, tokenizer, ids), strict=True)
    found = {}
    for slot, (x, scores) in enumerate(both):
        found[f"{slot}.x"] = x[chosen].to(model.dtype).cpu()
        found[f"{slot}.score"] = scores[:, chosen].T.contiguous().float().cpu()
    return found


def _initial(model: PreTrainedModel, training: FastKVzipTraining, slot: int) -> dict[str, Tensor]:
    """A gate that was not trained yet."""
    sizes = FastKVzip("100%").gate_shapes(*families.head_sizes(model))
    generator = torch.Generator().manual_seed(training.seed + slot)
    gate = {name: torch.zeros(size) for name, size in sizes.items()}
    for name in ("query", "key"):
        bound = 1 / math.sqrt(sizes[name][-1])
        gate[name] = (2 * torch.rand(sizes[name], generator=generator) - 1) * bound
    for name in ("query_norm", "key_norm"):
        gate[name] = torch.ones(sizes[name])
    if training.variant == "repaired":
        gate["sinks"] = 0.1 * torch.randn(sizes["sinks"], generator=generator)
    return gate


def fitted_gate(
    inputs: Tensor, targets: Tensor, gate: dict[str, Tensor], training: FastKVzipTraining, slot: int = 0
) -> dict[str, Tensor]:
    """A gate that was trained on scores, by binary cross-entropy with soft targets, summed over heads.

    Args:
        inputs: (n, z), in fp32. They are divided by their root mean square, which the result has in its maps.
        targets: (n, h), between 0 and 1.
        gate: where to begin.
        training: how to train.
        slot: of the layer, so that every layer draws its own positions.
    """
    size = inputs.square().mean().sqrt().clamp_min(1e-12)
    inputs = inputs / size
    # as in the paper, keys have no bias; only converted gates need one
    trained = {name: t.clone().requires_grad_(name != "key_bias") for name, t in gate.items()}
    optimizer = torch.optim.SGD(
        [t for t in trained.values() if t.requires_grad], lr=training.lr, momentum=0.9
    )
    generator = torch.Generator().manual_seed(training.seed + slot)
    published = training.variant == "published"
    for step in range(training.steps):
        late = (step >= training.steps / 2) + (step >= 3 * training.steps / 4)
        # the published warm-up ends at half of the rate, and the next step has the whole
        early = 0.01 * step if published else (step + 1) / WARMUP
        optimizer.param_groups[0]["lr"] = training.lr * (early if step < WARMUP else 0.5**late)
        at = torch.randint(len(inputs), (min(training.positions, len(inputs)),), generator=generator)
        scores = sink_gate(inputs[at], trained, 2.0 if published else 1.0)
        loss = F.binary_cross_entropy(scores, targets[at], reduction="sum") / len(at)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = {name: t.detach() for name, t in trained.items()}
    return result | {name: result[name] / size for name in ("query", "key")}
