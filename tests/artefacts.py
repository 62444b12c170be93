"""Small saved files of every kind, each with what loads it and what uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from dynamic_plans import former_folder
from pico import attached, feed, prompt
from torch import Tensor, nn

import lowkey
from lowkey.calibration import layer_checkpoint
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import make_dynamic_plan
from lowkey.calibration.statistics import gather_statistics
from lowkey.core import files, optimizer_state
from lowkey.core.files.reading import digest
from lowkey.core.types import LowkeyError
from lowkey.heads.scores import HeadScores
from lowkey.methods import PCA, CalibrationContext
from lowkey.methods.dynakv import GateTraining
from lowkey.plan.plan import Plan
from lowkey.policies import POLICIES
from lowkey.pretraining import checkpoint, corpus, log
from lowkey.pretraining.recipe import Data, Recipe
from lowkey.report import load_results
from lowkey.storage.exact import Exact


@dataclass
class Artefact:
    """load gives what the files mean; use does something with it, so that what is accepted is seen to work.
    tensors: the JSON that has the checksum of each tensor file, or nothing."""

    folder: Path
    load: Callable[[Path], object]
    use: Callable[[Path], object] | None = None
    tensors: dict[str, str | None] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of the files that are mutated; all when empty

    def files(self) -> list[Path]:
        found = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        return (
            [p for p in found if p.name in self.names]
            if self.names
            else [p for p in found if p.name not in ("README.md", files.MANIFEST)]
        )


def _summary(tensors: dict[str, Tensor], about: object) -> str:
    return digest(tensors) + json.dumps(about, sort_keys=True, default=str)


def plan_meaning(folder: Path, name: str = "llama") -> str:
    plan = Plan.load(folder, attached(name))
    maps = {f"{i}.{n}": t for i, f in plan.factors.items() for n, t in vars(f).items() if t is not None}
    gates = plan.token_ranks.gates if plan.token_ranks else {}
    return _summary(
        maps | {f"{i}.gate.{n}": t for i, g in gates.items() for n, t in vars(g).items()}, plan.describe()
    )


def plan_used(folder: Path) -> None:
    model = attached("llama")
    with torch.no_grad():
        model(prompt(6, 1), past_key_values=lowkey.make_cache(model, plan=Plan.load(folder, model)))


def cache_meaning(folder: Path, model: Any) -> str:
    cache = lowkey.load_cache(folder, model)
    held = {}
    for i, layer in enumerate(cache.layers):
        held |= {f"{i}.{n}": t for n, t in layer.tensors().items()}
    numbers = [[int(getattr(layer, n)) for n in getattr(layer, "numbers", ())] for layer in cache.layers]
    return _summary(
        held,
        [
            numbers,
            cache.get_seq_length(),
            str(cache.origin.policy),
            str(cache.origin.exact),
            cache.origin.bits,
        ],
    )


def cache_used(folder: Path, model: Any) -> None:
    cache = lowkey.load_cache(folder, model)
    rows = {
        len(t)
        for layer in cache.layers
        for n, t in layer.tensors().items()
        if n in ("offset", "recent_k", "tail_k") or t.ndim == 4
    }
    seen = int(cache.get_seq_length())
    if seen < 400 and len(rows) == 1:
        ids, at = prompt(2, rows.pop(), seed=9), torch.arange(seen, seen + 2)
        offset = next(
            (layer.offset for layer in cache.layers if hasattr(layer, "offset")),
            torch.zeros(1, 1, dtype=torch.long),
        )
        with torch.no_grad():
            for i in range(2):
                mask = (torch.arange(seen + i + 1) >= offset.clamp_min(0)).long().expand(len(ids), -1)
                model(
                    ids[:, i : i + 1],
                    attention_mask=mask,
                    position_ids=(at[i : i + 1] - offset),
                    past_key_values=cache,
                )


def build(root: Path) -> dict[str, Artefact]:
    model = attached("llama")
    found: dict[str, Artefact] = {}
    pico.plan(model, sinks=2, recent=3).save(root / "plan")
    found["plan"] = Artefact(root / "plan", plan_meaning, plan_used, {"plan.safetensors": "plan.json"})
    merged = {i: pico.merged_factors(4, 6, 9, 2, 4, seed=i) for i in range(3)}
    pico.plan(model, factors=merged, orthonormal=False, heads={"r2": [[0.1] * 4] * 3}).save(root / "merged")
    found["merged"] = Artefact(root / "merged", plan_meaning, plan_used, {"plan.safetensors": "plan.json"})
    found |= _caches(root / "caches") | _jobs(root) | _single(root) | _training(root)
    plan = make_dynamic_plan(
        model, pico.tokenizer(), pico_text(), sample=Sample(4, 16), training=GateTraining(steps=1, hidden=4)
    )
    plan.save(root / "levels")
    found["levels"] = Artefact(root / "levels", plan_meaning, plan_used, {"plan.safetensors": "plan.json"})
    found["dynaplan"] = Artefact(
        former_folder(root / "dynaplan", plan),
        plan_meaning,
        plan_used,
        {"dynaplan.safetensors": "dynaplan.json"},
    )
    return found


def pico_text() -> str:
    return "the quick brown fox jumps over the lazy dog and runs away from it " * 40


def _caches(root: Path) -> dict[str, Artefact]:
    from variants import build as own

    model, plan = attached("llama"), pico.plan(attached("llama"), 6, 4)
    every = {
        "stock": (model, {}),
        "sliding": (attached("gemma2"), {}),
        "snapkv": (model, {"policy": POLICIES["snapkv"]("30%", recent=2, sinks=1)}),
        "h2o": (model, {"policy": POLICIES["h2o"]("30%", recent=2, sinks=1, every=3)}),
        "razor": (model, {"policy": POLICIES["razor"]("50%", recent=2, sinks=1)}),
        "think": (model, {"policy": POLICIES["think"]("50%", recent=2, sinks=1)}),
        "planned": (model, {"plan": plan, "exact": Exact(2, 5)}),
        "evicted": (model, {"plan": plan, "policy": POLICIES["tova"]("30%", recent=2, sinks=1)}),
        "int4": (model, {"bits": "int4"}),
        "kivi2": (model, {"bits": "kivi2"}),
        "own": (lowkey.attach(own("mla", num_hidden_layers=2)), {}),
    }
    found = {}
    for name, (m, how) in every.items():
        if name == "razor":
            how["policy"] = how["policy"].with_head_scores(
                {"echo": [[0.9, 0.1, 0.2, 0.3]] * 3, "induction": [[0.1, 0.9, 0.2, 0.3]] * 3}
            )
        cache = lowkey.make_cache(m, **how)
        ids = prompt(44, 2) % m.config.vocab_size
        feed(m, ids[:, :40], cache, [3, 0])
        feed(m, ids[:, 40:], cache, [3, 0], [1] * 4)
        cache.save(root / name)
        load = lambda folder, m=m: cache_meaning(folder, m)  # noqa: E731
        use = lambda folder, m=m: cache_used(folder, m)  # noqa: E731
        found[f"cache {name}"] = Artefact(
            root / name, load, use, {"cache.safetensors": "cache.json", "plan.safetensors": "plan.json"}
        )
    return found


def _jobs(root: Path) -> dict[str, Artefact]:
    """Unfinished work: a layer, statistics, gates."""
    model = attached("llama")
    work = files.job_folder(root / "work", {"a": [1, 2]})
    rows = prompt(24, 18)
    gather_statistics(model, list(rows.split(1)), work)
    context = CalibrationContext(model, rows[:4], 1, "post_rope", [8, 16], 0, 2)
    from lowkey.calibration.calibrate import fit_layers

    fit_layers(PCA(), context, work)

    def job(folder: Path) -> object:
        return str(files.job_folder(folder.parent, {"a": [1, 2]}))

    def layer(folder: Path) -> object:
        found = [layer_checkpoint.load_layer(folder, f"layer-{i}") for i in range(3)]
        if None in found:
            raise LowkeyError("one is missing, and would be fitted again")
        held = {
            f"{i}{side}{n}": t
            for i, f in enumerate(found)
            for side in ("keys", "values")
            for n, t in vars(getattr(f[0], side)).items()
            if isinstance(t, Tensor)
        }
        return _summary(held, [f[1] for f in found])

    def sums(folder: Path) -> object:
        found = gather_statistics(model, list(rows.split(1)), folder)
        return _summary(
            {f"{i}.{n}": torch.as_tensor(t) for i, s in found.items() for n, t in vars(s).items()}, None
        )

    every = {f"layer-{i}.safetensors": None for i in range(3)}
    return {
        "job": Artefact(work, job, names=("job.json",)),
        "layers": Artefact(work, layer, tensors=every, names=tuple(every)),
        "statistics": Artefact(
            work, sums, tensors={"statistics.safetensors": None}, names=("statistics.safetensors",)
        ),
    }


def _single(root: Path) -> dict[str, Artefact]:
    """Files by themselves, each in a folder of its own."""
    model = attached("llama")
    values = torch.rand(12, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    from lowkey.models.fingerprint import model_fingerprint

    scores = HeadScores(
        "copy", "recall", values, (0, 1, 2), 4, 40, "pico", model_fingerprint(model), "0", 7, {"a": 1}
    )
    (root / "heads").mkdir(parents=True)
    scores.save(root / "heads" / "heads.json")
    row = {
        "name": "full",
        "perplexity": 3.5,
        "bytes_held": 100,
        "bytes_full": 100,
        "kept_per_head": [[1.0, 2.0]],
    }
    result = {
        "format": 1,
        "model": "pico",
        "environment": {"data": {"sha256": "0", "name": "x"}},
        "rows": [row],
    }
    files.write_json(root / "result" / "r.json", result, "result")
    (root / "recipe").mkdir()
    (root / "recipe" / "r.toml").write_text(
        "[model]\nhidden_size = 32\nbetas = [1, 2.5]\n"
        '[data]\npath = "x.txt"\n[training]\nlr = 1e-3\nseed = 3\n'
    )
    (root / "log").mkdir()
    (root / "log" / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": i / 3}) + "\n" for i in range(5))
    )
    return {
        "heads": Artefact(root / "heads", lambda p: repr(vars(HeadScores.load(p / "heads.json", model)))),
        "result": Artefact(
            root / "result",
            lambda p: json.dumps(
                [{k: v for k, v in r.items() if k in result} for r in load_results([p / "r.json"])]
            ),
        ),
        "recipe": Artefact(root / "recipe", lambda p: repr(Recipe.read(p / "r.toml"))),
        "log": Artefact(root / "log", lambda p: repr(log.read_log(p / "log.jsonl"))),
    }


def _training(root: Path) -> dict[str, Artefact]:
    """Token files, and a checkpoint with its optimizer."""
    (root / "text.txt").write_text(pico_text())
    data = Data(path=str(root / "text.txt"), vocab_size=260, held_out=0.1)
    corpus.prepare(data, root / "tokens")
    (tokens,) = (root / "tokens").iterdir()

    def read_tokens(folder: Path) -> object:
        read = corpus._read(folder, None)
        return [
            read.fingerprint,
            *(
                None if s is None else (np.array(s.ids).tobytes(), s.starts.tolist(), s.text_bytes)
                for s in (read.training, read.held_out)
            ),
        ]

    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return net, optimizer

    net, optimizer = trained()
    about = {"losses": [1.5, 1.25], "norms": [1.0, 0.5], "validation": [], "seconds": 1.5, "logged": 2}
    checkpoint.save_checkpoint(root / "checkpoint" / "checkpoint.safetensors", net, [optimizer], about, True)

    def restored(folder: Path) -> object:
        net, optimizer = trained()
        found = checkpoint.restore_checkpoint(folder / "checkpoint.safetensors", net, [optimizer])
        return _summary(checkpoint.full_weights(net) | optimizer_state.tensors_of(optimizer), found)

    return {
        "tokens": Artefact(
            tokens,
            read_tokens,
            names=("about.json", "training.bin", "training.npy", "held_out.bin", "tokenizer.json"),
        ),
        "checkpoint": Artefact(root / "checkpoint", restored, tensors={"checkpoint.safetensors": None}),
    }
