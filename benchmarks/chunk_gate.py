"""What a trained gate over chunks is worth (after KV-Efficient VLA), beside controls with as many rows.

    python benchmarks/chunk_gate.py text MODEL OUT.json       # KL of what follows a context, and recall
    python benchmarks/chunk_gate.py patrol MODEL OUT.json     # actions of a model that was trained on patrols

The model of patrols comes from `python benchmarks/chunk_gate.py write TEXT.jsonl` and `lowkey pretrain
recipes/patrol.toml --set data.path=TEXT.jsonl`. Gates are trained anew with every seed. Every setting reads a
context exactly, evicts once, and is scored on what follows. Resumable: a seed that is in OUT.json is not run
again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.cache.cache import LowkeyCache
from lowkey.catalog import make_policy
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.evaluate.actions import Patrol, draw_patrols, encoded, rights
from lowkey.evaluate.recall import answered, draw_episodes
from lowkey.evaluate.settings import Setting, evicted
from lowkey.heads.chunk_gate import ChunkGatesInTraining, ChunkGateTraining
from lowkey.models.fingerprint import model_fingerprint
from lowkey.models.loading import load
from lowkey.models.weights import only_trainable
from lowkey.policies.chunks import ChunkGate
from lowkey.policies.gates import Gates
from lowkey.probes.model_probe import kl_divergence

# row of the table: policy and its options
COMPARED: dict[str, tuple[str, dict[str, str]]] = {
    "window only": ("streamingllm", {}),
    "mean of all chunks": ("chunk-mean", {"keep": "1.0"}),
    "mean of the newest chunks": ("chunk-mean", {}),
    "mean of random chunks": ("chunk-mean", {"choose": "random"}),
    "trained gate": ("chunk-gate", {}),
    "trained gate, plain means": ("chunk-gate", {}),
    "trained means of all chunks": ("chunk-gate", {"keep": "1.0"}),
    "random tokens": ("random", {}),
    "snapkv": ("snapkv", {}),
}
PLAIN = "trained gate, plain means"
BY_SEED = (
    "mean of random chunks",
    *(name for name in COMPARED if name.startswith("trained")),
    "random tokens",
)
Measure = Callable[[Setting], dict]

app = typer.Typer(add_completion=False)


@app.command()
def write(out: Path, episodes: int = 6000, sites: int = 4, steps: int = 60, seed: int = 0) -> None:
    """Write episodes to train a model on, one JSON record each."""
    drawn = draw_patrols(episodes, seed, Patrol(sites, steps))
    out.write_text("".join(json.dumps({"text": episode.text}) + "\n" for episode in drawn))


@app.command(name="text")
def on_text(
    model: str,
    out: Path,
    seeds: int = 3,
    budgets: str = "25%,12.5%",
    context: int = 256,
    windows: int = 8,
    cases: int = 12,
    steps: int = 200,
    chunk: int = 8,
    keep: float = 0.5,
    recent: int = 40,
    training_windows: int = 24,
    continuation: int = 64,
    form: str = "plain",
) -> None:
    """KL of what follows a context from the full cache's, in nats per token, and recall."""
    loaded, tokenizer = load(model, "auto", "cpu")
    told = ChunkGateTraining(chunk=chunk, keep=keep, recent=recent, continuation=continuation, steps=steps)
    held_out = text.encode(tokenizer, text.embedded_text("evaluation"), loaded)
    rows = text.sample_windows(held_out, tokenizer, context + continuation, windows, 0, "data")
    episodes = draw_episodes(tokenizer, held_out.tolist(), context, cases, 0, form) if cases else []
    learnt_from = text.encode(tokenizer, text.embedded_text("calibration"), loaded)
    references = [full_logits(loaded, row[None], context) for row in rows]

    def measure(setting: Setting) -> dict:
        found = [
            compared(loaded, setting, row[None], full) for row, full in zip(rows, references, strict=True)
        ]
        kl, kept, _ = zip(*found, strict=True)
        right = [answered(loaded, tokenizer, setting, episode, form, True)["right"] for episode in episodes]
        return {"kl": kl, "kept": statistics.fmean(kept), "right": right}

    def sampled(seed: int) -> Tensor:
        return text.sample_windows(
            learnt_from, tokenizer, context + continuation, training_windows, seed, "data"
        )

    every(loaded, out, told, seeds, budgets, context, sampled, measure)


@app.command()
def patrol(
    model: str,
    out: Path,
    seeds: int = 3,
    budgets: str = "25%,12.5%",
    context: int = 128,
    episodes: int = 40,
    steps: int = 200,
    chunk: int = 6,
    keep: float = 0.5,
    recent: int = 16,
    training_windows: int = 64,
    sites: int = 4,
    length: int = 60,
) -> None:
    """Share of actions that are the expert's, by the kind of memory that they need."""
    loaded, tokenizer = load(model, "auto", "cpu")
    task = Patrol(sites, length)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False)

    drawn = draw_patrols(episodes, 10**6, task)
    cases = [(*encoded(e, encode, start), e.kinds) for e in drawn]
    references = [full_logits(loaded, torch.tensor([ids]), context) for ids, _, _ in cases]
    told = ChunkGateTraining(
        chunk=chunk,
        keep=keep,
        recent=recent,
        continuation=len(cases[0][0]) - context,
        steps=steps,
        batch=2,
        lr=3e-3,
    )

    def actions(said: list[Tensor]) -> dict[str, list[int]]:
        """By kind of action, how many are right and how many there are, given logits of each case."""
        found: dict[str, list[bool]] = {}
        for (ids, first, kinds), logits in zip(cases, said, strict=True):
            for kind, right in rights(logits, torch.tensor(ids), first, kinds, tokenizer).items():
                found.setdefault(kind, []).extend(right)
        return {kind: [sum(right), len(right)] for kind, right in found.items()}

    def measure(setting: Setting) -> dict:
        pairs = zip(cases, references, strict=True)
        found = [compared(loaded, setting, torch.tensor(case[0])[None], full) for case, full in pairs]
        kl, kept, said = zip(*found, strict=True)
        return {"kl": kl, "kept": statistics.fmean(kept), "actions": actions(list(said))}

    def sampled(seed: int) -> Tensor:
        """Whole episodes, so that a window begins as the model has seen it in training."""
        made = draw_patrols(training_windows, 2 * 10**6 + seed, task)
        return torch.tensor([encoded(e, encode, start)[0] for e in made])

    print("full cache", actions([logits[0] for logits in references]), flush=True)
    every(loaded, out, told, seeds, budgets, context, sampled, measure)


def every(
    model: PreTrainedModel,
    out: Path,
    told: ChunkGateTraining,
    seeds: int,
    budgets: str,
    context: int,
    sampled: Callable[[int], Tensor],
    measure: Measure,
) -> None:
    """Measure all settings with every seed, and write the file after each seed."""
    found = json.loads(out.read_text()) if out.exists() else {"format": 1, "context": context, "rows": []}
    found["training"] = {name: x for name, x in asdict(told).items() if name != "seed"}
    for seed in range(seeds):
        if any(row["seed"] == seed for row in found["rows"]):
            continue
        begun = time.process_time()
        gates, kl = trained(model, sampled(seed), replace(told, seed=seed), out.parent / f"{out.stem}-{seed}")
        trainings = {"cpu_seconds": round(time.process_time() - begun, 1), "kl": kl}
        for label, budget, setting in settings_of(model, budgets.split(","), context, told, seed, gates):
            row = {"setting": label, "budget": budget, "seed": seed, **measure(setting)}
            print(seed, budget, label, f"{statistics.fmean(row['kl']):.4f}", f"{row['kept']:.1f}", flush=True)
            found["rows"].append(row)
        found.setdefault("trainings", []).append(trainings)
        files.write_text(out, json.dumps(found) + "\n", ours=True)


def trained(
    model: PreTrainedModel, rows: Tensor, told: ChunkGateTraining, folder: Path
) -> tuple[Gates, list[float]]:
    """Gates, and the KL divergence of each step of their training."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_trainable([], model), torch.enable_grad():
        training = ChunkGatesInTraining(model, rows, told)
        if (saved := files.read_work(folder, "training")) is not None:
            training.restore(saved, folder)
        training.run(folder, bars)
    layers = tuple(
        {name: t.detach().cpu().contiguous() for name, t in training.gate(slot).items()}
        for slot in range(len(training.layers))
    )
    return Gates(ChunkGate.learns, layers, "", model_fingerprint(model), {}), training.losses


def settings_of(
    model: PreTrainedModel,
    budgets: list[str],
    context: int,
    told: ChunkGateTraining,
    seed: int,
    gates: Gates,
) -> Iterator[tuple[str, str, Setting]]:
    """(label, budget, setting) of all that is compared; what depends on no seed comes with seed 0 alone."""
    zeros = tuple(
        {n: torch.zeros_like(t) if n.endswith((".out", ".out_bias")) else t for n, t in own.items()}
        for own in gates.layers
    )
    for budget in budgets:
        for label, (name, options) in COMPARED.items():
            if seed and label not in BY_SEED:
                continue
            given = {"sinks": str(told.sinks), **options}
            if name.startswith("chunk"):
                given = {"chunk": str(told.chunk), "keep": str(told.keep), **given}
            if name == "random" or options.get("choose") == "random":
                given["seed"] = str(seed)
            own = {ChunkGate.learns: replace(gates, layers=zeros) if label == PLAIN else gates}
            yield label, budget, evicted(model, make_policy(name, budget, given), name, context, gates=own)


@torch.no_grad()
def full_logits(model: PreTrainedModel, ids: Tensor, context: int) -> Tensor:
    """Logits (1, t, V) of what follows a context, over the full cache, of ids (1, context + t)."""
    return model(ids).logits[:, context:].clone()


@torch.no_grad()
def compared(
    model: PreTrainedModel, setting: Setting, ids: Tensor, full: Tensor
) -> tuple[float, float, Tensor]:
    """(KL(full || setting) per token of what follows a context, rows kept per head, logits (t, V)).

    Args:
        model: the model, attached.
        setting: how the context is held.
        ids: (1, context + t), the context and what follows.
        full: (1, t, V), what the full cache says.
    """
    cache: LowkeyCache = setting.make()
    context = ids.shape[1] - full.shape[1]
    cache.exact_prefill(True)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    cache.exact_prefill(False)
    cache.freeze()
    rows = [len(p) for i in range(len(cache.evicting)) for p in cache.kept_positions(i)]
    said = model(ids[:, context:], past_key_values=cache).logits
    return float(kl_divergence(said, full)), statistics.fmean(rows), said[0]


if __name__ == "__main__":
    app()
