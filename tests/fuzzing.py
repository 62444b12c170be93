"""A seeded mutator of files, and small artefacts of every kind with what loads them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from pico import attached, feed, prompt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowkey
from lowkey.calibration import layer_checkpoint
from lowkey.calibration.calibrate import Sample
from lowkey.calibration.dynamic import DynamicPlan, make_dynamic_plan
from lowkey.calibration.statistics import gather_statistics
from lowkey.core import files, optimizer_state
from lowkey.core.files.reading import CHECKSUM, KIND, digest, json_digest, tensor_marks
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

HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-320,
        "",
        "x",
        "0",
        "1",
        "\ud800",
        "a\nb",
    ),
    *([], {}, [[]], [0], [-1, 10**9], {"a": 1}, "x" * 5000, [[[[1]]]], float("nan"), float("inf")),
]
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.int16,
)


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


# -- mutations


def damaged_bytes(data: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(data) + 1)
    stop = min(len(data), at + r.choice([1, 1, 8, 100]))
    kind = r.randrange(7)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << r.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + r.randbytes(stop - at) + data[stop:]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data + r.choice([b"\0", b" ", b"}", data[:100], r.randbytes(10)])
    if kind == 4:
        return data[:at] + data[stop:]
    if kind == 5:
        return data[:at] + data[at:stop] * 2 + data[stop:]
    return r.choice(
        [b"", b"{", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\0" * 64, b"null", b"1" * 6000, b"NaN"]
    )


def damaged_json(text: str, r: random.Random, vouched: bool) -> str:
    """One place of the tree is something else; vouched: with a checksum that fits."""
    value = json.loads(text)
    places = [p for p in _places(value) if not (vouched and p == (CHECKSUM,))]
    place = r.choice(places)
    inside = value
    for name in place[:-1]:
        inside = inside[name]
    kind, last = r.randrange(4), place[-1]
    if kind == 0 and isinstance(inside, dict):
        del inside[last]
    elif kind == 1 and isinstance(inside[last], int | float) and not isinstance(inside[last], bool):
        inside[last] = r.choice(
            [inside[last] + 1, inside[last] - 1, -inside[last], inside[last] * 1.5, 2 * inside[last]]
        )
    elif kind == 2 and isinstance(inside[last], list):
        inside[last] = r.choice(
            [inside[last][:-1], inside[last] * 2, inside[last][::-1], [*inside[last], r.choice(HOSTILE)]]
        )
    else:
        inside[last] = r.choice(HOSTILE)
    if vouched:
        value[CHECKSUM] = json_digest(value)
    written = json.dumps(value)
    return written.replace("{", '{"format": 1, "format": 1, ', 1) if r.random() < 0.02 else written


def _places(value: object, path: tuple = ()) -> list[tuple]:
    pairs = (
        value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    )
    return [place for name, inside in pairs for place in [(*path, name), *_places(inside, (*path, name))]]


def damaged_tensors(found: dict[str, Tensor], r: random.Random) -> dict[str, Tensor]:
    name = r.choice(sorted(found))
    t, kind = found[name], r.randrange(11)
    if kind == 0:
        found.pop(name)
    elif kind == 1:
        found[r.choice([f"{name}x", "7.keys", "x", f"0.{name}"])] = (
            found.pop(name) if r.random() < 0.5 else t.clone()
        )
    elif kind == 2:
        found[name] = t.to(r.choice(DTYPES))
    elif kind == 3:
        found[name] = t.flatten()
    elif kind == 4:
        found[name] = t.unsqueeze(0)
    elif kind == 5 and t.ndim:
        dim = r.randrange(t.ndim)
        found[name] = t.narrow(dim, 0, max(0, t.shape[dim] - 1)) if t.shape[dim] else t
    elif kind == 6 and t.ndim:
        found[name] = torch.cat([t, t], r.randrange(t.ndim))
    elif kind == 7 and t.ndim > 1:
        found[name] = t.transpose(0, r.randrange(1, t.ndim))
    elif kind == 8:
        found[name] = t.new_zeros(r.choice([(), (0,), (1,), (1, 1), (2, 2, 2, 2)]))
    elif t.numel():
        flat = t.flatten().clone()
        at = r.randrange(flat.numel())
        wild = [0, 1, -1, 2**31, -(2**31), 2**62, 10**6, float("nan"), float("inf"), 1e30, -5.0]
        flat[at] = _value(r.choice(wild), t.dtype) if kind == 9 else flat[r.randrange(flat.numel())]
        found[name] = flat.view(t.shape)
    return {name: t.contiguous().clone() for name, t in found.items()}


def _value(wild: float, dtype: torch.dtype) -> float:
    if dtype == torch.bool or dtype.is_floating_point:
        return wild
    info = torch.iinfo(dtype)
    return max(info.min, min(info.max, int(wild))) if wild == wild and abs(wild) < 2**70 else info.max


def mutate(artefact: Artefact, r: random.Random) -> tuple[Callable[[], None], bool, str]:
    """One file becomes something else. Returns what puts it back, whether checksums fit, and what was done."""
    file = r.choice(artefact.files())
    before, vouched = {file: file.read_bytes()}, False
    kind = r.random()
    if kind < 0.02:
        return _special(file, before[file], r), False, f"{file.name}: special"
    if file.suffix == ".json" and kind < 0.75 and len(before[file]) < 2**20:
        vouched = kind < 0.5
        file.write_text(damaged_json(before[file].decode(), r, vouched))
    elif file.name in artefact.tensors and kind < 0.75:
        vouched, told = True, artefact.tensors[file.name]
        changed, (marked, _) = damaged_tensors(load_copy(file), r), tensor_marks(file, "file")
        save_file(changed, file, metadata={KIND: f"{marked} {digest(changed)}"})
        if told is not None:
            about = file.with_name(told)
            before[about] = about.read_bytes()
            value = json.loads(before[about]) | {"tensors_sha256": digest(changed)}
            about.write_text(json.dumps(value | {CHECKSUM: json_digest(value)}))
    else:
        file.write_bytes(damaged_bytes(before[file], r))
    return (
        lambda: [p.write_bytes(data) for p, data in before.items()] and None,
        vouched,
        f"{file.name}: {'vouched' if vouched else 'plain'}",
    )


def load_copy(file: Path) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in load_file(file).items()}


def _special(file: Path, data: bytes, r: random.Random) -> Callable[[], None]:
    """What is no regular file, or one without end."""
    file.unlink()
    kind = r.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/dev/zero")
    elif kind == 3:
        file.symlink_to(file)
    elif kind == 4:
        with file.open("wb") as out:
            out.write(data)
            out.truncate(2**42)

    def back() -> None:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(data)

    return back


# -- artefacts


def _summary(tensors: dict[str, Tensor], about: object) -> str:
    return digest(tensors) + json.dumps(about, sort_keys=True, default=str)


def plan_meaning(folder: Path, name: str = "llama") -> str:
    plan = Plan.load(folder, attached(name))
    return _summary(
        {f"{i}.{n}": t for i, f in plan.factors.items() for n, t in vars(f).items() if t is not None},
        plan.describe(),
    )


def plan_used(folder: Path) -> None:
    model = attached("llama")
    with torch.no_grad():
        model(prompt(6, 1), past_key_values=lowkey.make_cache(model, plan=Plan.load(folder, model)))


def dynaplan_meaning(folder: Path) -> str:
    plan = DynamicPlan.load(folder, attached("llama"))
    maps = {f"{i}.{n}": t for i, f in plan.factors.items() for n, t in vars(f).items() if t is not None}
    return _summary(
        maps | {f"{i}.gate.{n}": t for i, g in plan.gates.items() for n, t in vars(g).items()},
        plan.describe(),
    )


def dynaplan_used(folder: Path) -> None:
    from lowkey.calibration.dynamic import make_dynamic_cache

    model = attached("llama")
    with torch.no_grad():
        model(prompt(6, 1), past_key_values=make_dynamic_cache(model, DynamicPlan.load(folder, model)))


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
    plan.save(root / "dynaplan")
    found["dynaplan"] = Artefact(
        root / "dynaplan", dynaplan_meaning, dynaplan_used, {"dynaplan.safetensors": "dynaplan.json"}
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
        '[model]\nhidden_size = 32\nbetas = [1, 2.5]\n[data]\npath = "x.txt"\n[training]\nlr = 1e-3\nseed = 3\n'
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
