"""Trains the gates of `chunk-gate` through the frozen model (after KV-Efficient VLA, arXiv:2509.21354)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.backends.segment import softcapped
from lowkey.cache.cache import LowkeyCache, cache_of
from lowkey.core import files, optimizer_state
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.seeds import seed_of
from lowkey.core.types import device_of
from lowkey.heads.learning import Learning
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.models.families import Rope
from lowkey.models.weights import only_trainable
from lowkey.ops.chunk_gate import STATE_WIDTH, gate_sizes, gated_chunks
from lowkey.ops.rope import rotate, unrotate
from lowkey.ops.schedule import warmup_cosine
from lowkey.policies.chunks import LARGEST_CHUNK, ChunkGate
from lowkey.policies.gates import Gates
from lowkey.probes.model_probe import kl_divergence
from lowkey.storage.base import StockLayer, StockSlidingLayer, StoringLayer

GATES_FILE = "training"  # of the work folder
RISING_SHARE = 0.1  # share of the steps in which the rate rises
GATE_AT_START = 2.0  # bias of the gate's logit: all chunks count almost in full


@dataclass(frozen=True)
class ChunkGateTraining(Checked):
    """How the gates of `chunk-gate` are trained.

    The last `continuation` tokens of a window are read over a cache of what comes before: the first `sinks`
    tokens and the newest `recent` ones as they are, all others as rows of chunks.

    Args:
        chunk: tokens of a chunk (default 16).
        keep: share of the chunks that are to stay (default 0.5).
        sinks: first tokens that are never in a chunk (default 4).
        recent: newest tokens before the continuation that are in no chunk, at least (default 64).
        continuation: tokens whose predictions are compared (default 64).
        steps: training steps (default 200).
        batch: windows per step (default 1).
        lr: peak learning rate of AdamW (default 1e-3). It falls to 0 by a cosine.
        penalty: factor of |mean gate - keep| in the loss, averaged over layers and heads (default 0.1).
        hard: share of the steps, at the end, in which only the chunks of the largest gates are seen, as in
            use; the gradient is that of the soft gates (default 0.5).
        seed: of everything random (default 0).
        save_every: steps between two saves into the work folder (default 25).
    """

    chunk: int = option(16, at_least=1, at_most=LARGEST_CHUNK)
    keep: float = option(0.5, above=0, at_most=1)
    sinks: int = option(4, at_least=0, at_most=2**24)
    recent: int = option(64, at_least=0, at_most=2**24)
    continuation: int = option(64, at_least=2, at_most=2**20)
    steps: int = option(200, at_least=1, at_most=10**7)
    batch: int = option(1, at_least=1, at_most=4096)
    lr: float = option(1e-3, above=0, at_most=1000)
    penalty: float = option(0.1, at_least=0, at_most=1000)
    hard: float = option(0.5, at_least=0, at_most=1)
    seed: int = option(0, at_least=0)
    save_every: int = option(25, at_least=1)

    def chunks(self, context: int) -> int:
        """How many chunks have left the window of a context of so many tokens."""
        return max(0, context - self.sinks - self.recent) // self.chunk


@dataclass(frozen=True)
class ReadContext:
    """What a layer knows of the context of a window.

    Args:
        means: mean keys, before their rotation, and mean values of its chunks (h, m, d) each, in fp32.
        kept: rotated keys and values (h, n, d) of the tokens that stay as they are.
    """

    means: tuple[Tensor, Tensor]
    kept: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, rope: Rope, training: ChunkGateTraining) -> ReadContext:
        """From rotated keys and values (h, t, d) of a whole context."""
        first, chunks = training.sinks, training.chunks(keys.shape[1])
        last = first + chunks * training.chunk
        cos, sin = rope(torch.arange(keys.shape[1], device=keys.device).unsqueeze(0), keys)
        plain = unrotate(keys.float(), cos[0], sin[0])
        means = (x[:, first:last].float().unflatten(1, (chunks, -1)).mean(2) for x in (plain, values))
        kept = (torch.cat([x[:, :first], x[:, last:]], 1) for x in (keys, values))
        return cls((next(means), next(means)), (next(kept), next(kept)))


class GatedContextLayer(StoringLayer):
    """A cache layer that answers one call over a context whose chunks are gated; differentiable in the gate.

    Args:
        context: what was read.
        tokens: how many that were.
        rope: the layer's rotary embedding.
        gate: the tensors of `gated_chunks`.
        training: how chunks lie, and how many are to stay.
        hard: whether only the chunks of the largest gates are seen.

    Attributes, after the call:
        gates: (h, m), between 0 and 1.
    """

    gates: Tensor

    def __init__(
        self,
        context: ReadContext,
        tokens: int,
        rope: Rope,
        gate: Mapping[str, Tensor],
        training: ChunkGateTraining,
        hard: bool,
    ) -> None:
        super().__init__()
        self.context, self.rope, self.gate, self.training, self.hard = context, rope, gate, training, hard
        self.seen = tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """None: what was read belongs to the training."""
        return {}

    def predicted_nbytes(self) -> int:
        """0: no tokens are held."""
        return 0

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Attention over the kept tokens, the rows of chunks and the new tokens; see `StoringLayer.attend`.

        A row weighs `tokens of a chunk * gate * exp(score)`, so that a gate of 0 removes it smoothly.
        """
        mean_k, mean_v = (x.unsqueeze(0) for x in self.context.means)
        state = mean_k.new_zeros(*mean_k.shape[:2], 2 * STATE_WIDTH)
        rows_k, rows_v, logits, _ = gated_chunks(mean_k, mean_v, state, self.gate)
        self.gates = logits[0].sigmoid()
        weights = self.training.chunk * self._straight_through(self.gates)
        count, size = mean_k.shape[2], self.training.chunk
        centres = self.training.sinks + size * torch.arange(count, device=keys.device) + (size - 1) // 2
        cos, sin = self.rope(centres.unsqueeze(0), keys)
        rows_k = rotate(rows_k, cos, sin)
        kept_k, kept_v = (x.unsqueeze(0).float() for x in self.context.kept)
        query, t, kept = call.query.float(), keys.shape[2], kept_k.shape[2]
        all_k = torch.cat([rows_k, kept_k, keys.float()], 2).unsqueeze(2)
        all_v = torch.cat([rows_v, kept_v, values.float()], 2).unsqueeze(2)
        scores = softcapped(query @ all_k.mT * call.scaling, call.softcap)
        seen = torch.ones(t, all_k.shape[3], dtype=torch.bool, device=keys.device).tril(count + kept)
        scores = scores.masked_fill(~seen, -torch.inf)
        shares = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        factors = torch.cat([weights, weights.new_ones(weights.shape[0], kept + t)], 1)
        shares = shares * factors[:, None, None]
        out = (shares @ all_v) / shares.sum(-1, keepdim=True)
        return out.to(values.dtype)

    def _straight_through(self, gates: Tensor) -> Tensor:
        """The gates (h, m); with `hard`, 1 for the largest and 0 for the others, with the gates' gradient."""
        if not self.hard:
            return gates
        most = math.ceil(self.training.keep * gates.shape[1] - 1e-9)
        chosen = torch.zeros_like(gates).scatter(1, gates.detach().topk(most, 1).indices, 1.0)
        return chosen + gates - gates.detach()


class ChunkGatesInTraining:
    """The gates of all layers in training, step by step.

    Args:
        model: the model, attached and frozen.
        rows: ids (n, t) of the windows.
        training: how to train.

    Attributes:
        parameters: what is trained, by slot of the layer and name.
        losses: the KL divergence of every step done, in nats per token.
        between_steps: whether no step is half done, so that the state may be saved.
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor, training: ChunkGateTraining) -> None:
        self.model, self.rows, self.training = model, rows, training
        self.layers = families.geometry(model).compressible
        self.ropes = [families.rope(model, i) for i in self.layers]
        self.context = rows.shape[1] - training.continuation
        self.read: dict[int, tuple[list[Any], Tensor]] = {}
        self.losses: list[float] = []
        self.between_steps = True
        contexts = self.window(0)[0]
        own = [contexts[i] for i in self.layers]
        # the gate reads numbers of about unit size; what it learns is folded into its maps at the end
        self.sizes = [tuple(float(x.square().mean().sqrt().clamp_min(1e-6)) for x in c.means) for c in own]
        self.centres = [torch.cat([x.mean(1) for x in c.means], -1) for c in own]
        self.parameters = {
            f"{slot}.{name}": t.requires_grad_()
            for slot in range(len(self.layers))
            for name, t in self._initial(slot).items()
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=training.lr, weight_decay=0.0)

    def _initial(self, slot: int) -> dict[str, Tensor]:
        """What is trained of one gate, before the first step: the rows of chunks are the means."""
        sizes = gate_sizes(*families.head_sizes(self.model)[:3:2])
        generator = torch.Generator().manual_seed(seed_of(self.training.seed, "gate", slot))
        found = {name: torch.zeros(size) for name, size in sizes.items() if name != "centre"}
        for name in ("lstm.in", "lstm.state", "keys.in", "values.in", "gate.weight"):
            bound = 1 / math.sqrt(sizes[name][-1])
            found[name] = (2 * torch.rand(sizes[name], generator=generator) - 1) * bound
        found["gate.bias"] = torch.full(sizes["gate.bias"], GATE_AT_START)
        device = device_of(families.decoder_layers(self.model)[self.layers[slot]])
        return {name: t.to(device) for name, t in found.items()}

    def gate(self, slot: int) -> dict[str, Tensor]:
        """The gate of a layer as `gated_chunks` reads it, with sizes folded into its maps."""
        own = {
            name.partition(".")[2]: t
            for name, t in self.parameters.items()
            if name.partition(".")[0] == str(slot)
        }
        size_k, size_v = self.sizes[slot]
        width = own["keys.out"].shape[0]
        scale = own["lstm.in"].new_tensor([1 / size_k] * width + [1 / size_v] * width)
        folded = {name: own[name] * scale for name in ("lstm.in", "keys.in", "values.in")}
        folded |= {f"keys.{part}": own[f"keys.{part}"] * size_k for part in ("out", "out_bias")}
        folded |= {f"values.{part}": own[f"values.{part}"] * size_v for part in ("out", "out_bias")}
        return own | folded | {"centre": self.centres[slot]}

    @torch.no_grad()
    def window(self, n: int) -> tuple[list[Any], Tensor]:
        """(what every layer knows of the context of window n, logits (1, q, V) of its continuation)."""
        if n in self.read:
            return self.read[n]
        ids = self.rows[n : n + 1].to(device_of(self.model))
        cache = cache_of(self.model, lambda i: StockLayer())
        self.model(ids[:, : self.context], past_key_values=cache, logits_to_keep=1)
        contexts: list[Any] = []
        for i, layer in enumerate(cache.layers):
            held: Any = layer
            keys, values = held.keys[0], held.values[0]
            if i in self.layers:
                contexts.append(ReadContext.of(keys, values, self.ropes[self.layers.index(i)], self.training))
            else:
                contexts.append((keys.clone(), values.clone()))
        logits = self.model(ids[:, self.context :], past_key_values=cache).logits
        self.read[n] = contexts, logits
        return self.read[n]

    def cache(self, contexts: list[Any], hard: bool) -> tuple[LowkeyCache, list[GatedContextLayer]]:
        """A cache for one call over these contexts, and its layers that are gated."""
        gated = {
            i: GatedContextLayer(
                contexts[i], self.context, self.ropes[slot], self.gate(slot), self.training, hard
            )
            for slot, i in enumerate(self.layers)
        }
        cache = cache_of(self.model, gated.__getitem__)
        for layer, context in zip(cache.layers, contexts, strict=True):
            if isinstance(layer, StockSlidingLayer):
                keys, values = context
                layer.update(keys.unsqueeze(0), values.unsqueeze(0))
                layer.cumulative_length = self.context
        return cache, list(gated.values())

    def divergence(self, n: int, hard: bool) -> tuple[Tensor, Tensor]:
        """(KL of the continuation of window n in nats per token, mean |mean gate - keep|)."""
        contexts, original = self.window(n)
        cache, gated = self.cache(contexts, hard)
        ids = self.rows[n : n + 1, self.context :].to(device_of(self.model))
        kl = kl_divergence(self.model(ids, past_key_values=cache).logits, original)
        shares = torch.stack([layer.gates.mean(1).to(kl.device) for layer in gated])
        return kl, (shares - self.training.keep).abs().mean()

    def step(self, n: int) -> None:
        """Take step n, counted from 0. Raises: LowkeyError if the loss or its gradient is not finite."""
        s = self.training
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * warmup_cosine(n, s.steps, RISING_SHARE)
        hard = n >= s.steps * (1 - s.hard)
        generator = torch.Generator().manual_seed(seed_of(s.seed, n))
        self.optimizer.zero_grad()
        total = 0.0
        for window in torch.randint(len(self.rows), (s.batch,), generator=generator).tolist():
            kl, distance = self.divergence(window, hard)
            ((kl + s.penalty * distance) / s.batch).backward()
            total += float(kl.detach()) / s.batch
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise LowkeyError(
                f"lr {s.lr:g}: loss {total:g} and gradient {float(norm):g} of step {n + 1} must be "
                "finite; give a smaller lr"
            )
        self.between_steps = False
        self.optimizer.step()
        self.losses.append(total)
        self.between_steps = True

    def run(self, folder: Path | None, progress: Progress) -> None:
        """Take all steps that are left, and save every few steps and when interrupted."""
        left = range(len(self.losses), self.training.steps)
        try:
            for n in progress(left, "training gates", len(left)):
                self.step(n)
                if (n + 1) % self.training.save_every == 0 or n == left[-1]:
                    self.save(folder)
        except KeyboardInterrupt:
            self.save(folder)
            raise

    def save(self, folder: Path | None) -> None:
        """Save the state behind a step; in the middle of one nothing is saved."""
        if folder is None or not self.between_steps:
            return
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= optimizer_state.tensors_of(self.optimizer)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        files.write_work(folder, GATES_FILE, tensors)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Restore what `save` saved. Raises: LowkeyError if it does not fit."""
        losses = tensors.get("losses")
        if losses is None or losses.dtype != torch.float64 or losses.ndim != 1:
            raise files.damaged_work(folder, "losses are missing")
        if len(losses) > self.training.steps:
            raise files.damaged_work(folder, "losses are not those of its steps")
        for name, p in self.parameters.items():
            p.copy_(files.checked_tensor(tensors, f"parameter.{name}", p, folder))
        optimizer_state.fill_state(self.optimizer, tensors, str(folder))
        self.losses = losses.tolist()


def train_chunk_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpus: str | None = None,
    windows: int = 32,
    context: int = 512,
    seed: int = 0,
    training: ChunkGateTraining | None = None,
    progress: Progress = silent,
    work: Path | None = None,
) -> Gates:
    """Train one gate for each layer, so that the model says over gated chunks what it says over all tokens.

    The loss is KL(full || gated) of the next-token distributions of a window's continuation, and a penalty
    that holds the mean gate at `keep`. All windows that were read stay in memory, without the tokens of their
    chunks.

    Args:
        model: the model, attached; it stays as it is.
        tokenizer: its tokenizer.
        corpus: the text; None for the embedded one.
        windows: how many windows of it are read at most.
        context: tokens of a window, the continuation included.
        seed: of the choice of windows.
        training: how to train; None for the defaults, in which a short window has less that stays as it is.
        progress: shows progress over steps.
        work: a folder to save into, and to resume from, to the same gates.

    Raises:
        LowkeyError: if the text is too short, a window has no chunk, or unfinished work is damaged.
    """
    if training is None:
        whole = ChunkGateTraining()
        fitting = min(64, max(2, context // 4))
        training = ChunkGateTraining(continuation=fitting, recent=fitting) if fitting < 64 else whole
    own = {"training": {name: x for name, x in asdict(training).items() if name != "save_every"}}
    job = Learning.of(ChunkGate.learns, model, tokenizer, corpus, windows, context, seed, work, own)
    length = job.rows.shape[1]
    if training.chunks(length - training.continuation) < 1:
        raise LowkeyError(
            f"context {length}: has no chunk of {training.chunk} tokens beside {training.sinks} sinks, "
            f"{training.recent} recent tokens and a continuation of {training.continuation}; give a longer "
            "one"
        )
    with only_trainable([], model), torch.enable_grad():
        state = ChunkGatesInTraining(model, job.rows, training)
        if job.folder is not None and (saved := files.read_work(job.folder, GATES_FILE)) is not None:
            state.restore(saved, job.folder)
        state.run(job.folder, progress)
    few = max(1, training.steps // 10)
    kl = [sum(part) / len(part) for part in (state.losses[:few], state.losses[-few:])]
    layers = tuple(
        {name: t.detach().cpu().contiguous() for name, t in state.gate(slot).items()}
        for slot in range(len(state.layers))
    )
    found = job.gates(layers)
    found.settings["kl_of_first_and_last_steps"] = kl
    return found
