"""What lowkey's kernels do on a GPU: whether they are right, how fast they read, and what a step takes.

    python benchmarks/gpu.py [OUT.json] [--parts kernels,bandwidth,calibration,two-gpus,steps --minutes 8]
    python benchmarks/gpu.py --device cpu --toy

One JSON file holds everything, and is written again after every figure, so that a stopped run keeps what it
measured. The parts, in order:

- kernels: every stored form, against attention that is written out in fp64.
- bandwidth: bytes per second that a step of attention reads, launched one by one and as a CUDA graph, beside
  those of a plain sum over memory and of torch's FlashAttention over the whole cache.
- calibration: seconds and peak memory of a 1B-class model.
- two-gpus: the logits of a model that is spread over two GPUs, against those on one.
- steps: a decode step of random models of SmolLM2-135M's and Llama-3.2-1B's shapes over transformers' own
  cache (with FlashAttention where torch can take it) and over lowkey's.

Without a GPU the exit status is 2. It is 1 if a kernel is wrong or a figure could not be measured. `--device
cpu --toy` runs all parts at toy size in Triton's interpreter, which says nothing about speed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import numpy as np
import typer
from accelerate import dispatch_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowkey.backends import triton_gpu
from lowkey.backends.stored import Rebuilding, StepSegment
from lowkey.cache.cache import LowkeyCache, make_cache
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.catalog import make_policy
from lowkey.core import files
from lowkey.evaluate.machine import machine
from lowkey.evaluate.step_bench import StepTiming, step_bench
from lowkey.methods import KQSVD, PCA
from lowkey.models.attention_interface import attach
from lowkey.models.loading import load
from lowkey.ops.ragged import starts_of
from lowkey.storage.packing import PerChannel, PerToken, Unpacked
from lowkey.storage.rows import pack_rows, stored_in_rows

FORMAT = 1
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
PACKINGS = {"plain": Unpacked()}
PACKINGS |= {f"token{n}": PerToken(n) for n in (8, 4, 2)} | {f"channel{n}": PerChannel(n) for n in (8, 4, 2)}
PAIRS = (("plain", "plain"), *((f"token{n}", f"token{n}") for n in (8, 4, 2)))
PAIRS += tuple((f"channel{n}", f"token{n}") for n in (8, 4, 2))
# keys, values, dtype, channels, queries of a row, whether keys are rotated as they are read
FORMS = (
    *((keys, values, "bfloat16", 128, 4, False) for keys, values in PAIRS),
    ("plain", "plain", "float16", 64, 1, False),
    ("plain", "plain", "float32", 64, 8, False),
    ("plain", "plain", "bfloat16", 96, 3, False),
    ("plain", "plain", "bfloat16", 256, 2, False),
    ("channel2", "token2", "float16", 64, 3, False),
    ("plain", "plain", "bfloat16", 64, 4, True),
    ("token4", "token4", "float16", 64, 4, True),
    ("channel2", "token2", "bfloat16", 160, 4, True),
)
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}  # of the largest output
SETTINGS = ("full", "snapkv:10%", "int8", "int4", "kivi2", "rank:50%", "joint:50%", "joint:50%+kivi2")
PARTS = ("kernels", "bandwidth", "calibration", "two-gpus", "steps")  # the longest last
COLD = 2**29  # bytes of copies that take turns, more than any cache of a GPU


@dataclass
class Run:
    """Where and how large a run is, and what it has found.

    Args:
        device: `cuda` or `cpu`.
        toy: whether everything is small.
        until: the time, as `time.monotonic` has it, at which nothing new is begun.
        out: the file that is written again after every figure; None for none.
        found: what is written.
    """

    device: str
    toy: bool
    until: float
    out: Path | None
    found: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row to a part, print it, and write everything."""
        self.found.setdefault(part, []).append(row)
        print(part, *(f"{name}={_short(x)}" for name, x in row.items()), flush=True)
        if self.out is not None:
            files.write_json(self.out, self.found, "benchmark", ours=True)

    def measure(self, part: str, what: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Add what a call finds; what it failed with instead, or that there was no time."""
        if time.monotonic() > self.until:
            return self.add(part, what | {"skipped": "no time was left"})
        try:
            row = call()
        except Exception as error:  # one figure that cannot be had must not cost the others
            row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        self.add(part, what | row)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @property
    def failed(self) -> list[str]:
        """What went wrong, a line each."""
        rows = [(part, row) for part, rows in self.found.items() if isinstance(rows, list) for row in rows]
        return [f"{part}: {row}" for part, row in rows if "error" in row or row.get("right") is False]


def main(
    out: Annotated[Path, typer.Argument(help="where to write all figures")] = Path("gpu.json"),
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    toy: Annotated[bool, typer.Option(help="everything small")] = False,
    parts: Annotated[str, typer.Option(help="separated by commas")] = ",".join(PARTS),
    minutes: Annotated[float, typer.Option(help="after which nothing new is begun")] = 7.0,
) -> None:
    """Measure, write, and fail if something is wrong."""
    if problem := refusal(device, toy, parts.split(",")):
        typer.echo(problem, err=True)
        raise typer.Exit(2)
    run = Run(device, toy, time.monotonic() + 60 * minutes, out)
    run.found |= {"format": FORMAT, "environment": machine(device) | {"device": device, "toy": toy}}
    functions = {
        "kernels": kernels,
        "bandwidth": bandwidth,
        "steps": steps,
        "calibration": calibration,
        "two-gpus": two_gpus,
    }
    for part in parts.split(","):
        functions[part](run)
    for line in run.failed:
        typer.echo(line, err=True)
    print(f"written to {out}")
    if run.failed:
        raise typer.Exit(1)


def refusal(device: str, toy: bool, parts: list[str]) -> str | None:
    """Why a run cannot be, in one line; None if it can."""
    if device not in ("cuda", "cpu"):
        return f"device {device}: is no device; choose cuda, or cpu together with --toy"
    if device == "cuda" and not torch.cuda.is_available():
        return "device cuda: torch finds no GPU here; run this where one is, or try --device cpu --toy"
    if device == "cpu" and not toy:
        return "device cpu: Triton's interpreter takes hours at full size; add --toy"
    if unknown := [part for part in parts if part not in PARTS]:
        return f"parts {unknown[0]}: is none; choose from {', '.join(PARTS)}"
    return None


# -- kernels


def kernels(run: Run) -> None:
    """Every form against the definition."""
    for form in FORMS if not run.toy else FORMS[::4]:
        names = ("keys", "values", "dtype", "channels", "queries", "rotated")
        run.measure("kernels", dict(zip(names, form, strict=True)), partial(checked, run, *form))


def checked(
    run: Run, keys: str, values: str, dtype: str, channels: int, queries: int, rotated: bool
) -> dict[str, Any]:
    """The largest error of a form, over the largest output, and whether it is right."""
    lengths = (0, 1, 65) if run.toy else (0, 1, 333, 5000)
    d, kind = 64 if rotated else channels, getattr(torch, dtype)
    segment = random_segment(keys, values, kind, channels, lengths, run.device)
    if rotated:
        segment = StepSegment(segment.keys, segment.values, segment.lengths, True, 0, rebuilding(segment, d))
    query = randn(run.device, kind, len(lengths), queries, d)
    found = triton_gpu.Segments(queries, [segment]).attend((None, query), d**-0.5, 30.0)
    wanted, lse = definition(segment, query, d**-0.5, 30.0)
    out = found[0 if rotated else 1].double()
    error = float((out - wanted).abs().max() / wanted.abs().max())
    error = max(error, float((found[3].double() - lse)[~lse.isinf()].abs().max()))
    return {"error_of_largest": error, "tolerance": TOLERANCE[dtype], "right": error <= TOLERANCE[dtype]}


def randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Seeded normal numbers."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def random_segment(
    keys: str, values: str, dtype: torch.dtype, width: int, lengths: tuple[int, ...], device: str
) -> StepSegment:
    """Rows of random tokens, packed."""
    starts = starts_of(torch.tensor(lengths)).to(device)
    sides = [
        stored_in_rows(packing, pack_rows(packing, x, starts), width, starts)
        for packing, x in (
            (PACKINGS[keys], randn(device, dtype, sum(lengths), 1, width)),
            (PACKINGS[values], randn(device, dtype, sum(lengths) + 1, 1, width)[1:]),
        )
    ]
    return StepSegment(sides[0], sides[1], starts.diff())


def rebuilding(segment: StepSegment, d: int) -> Rebuilding:
    """Random maps to keys of d channels, which are rotated as Llama rotates them."""
    device, rows = str(segment.values.lane.device), len(segment.values.lane)
    angle = 10000.0 ** (-np.arange(0, d, 2) / d)

    def table(positions: np.ndarray) -> np.ndarray:
        turned = positions[:, None] * angle
        return np.stack([np.cos(turned), np.sin(turned)], 1).astype(np.float32)

    longest = segment.keys.most_tokens + 1
    tables = table(np.arange(0, longest + 64, 64)), table(np.arange(64))
    maps = randn(device, segment.keys.dtype, rows, segment.keys.width, d) / segment.keys.width**0.5
    positions = torch.arange(longest, dtype=torch.int32, device=device)
    return Rebuilding(maps, None, positions, torch.zeros_like(segment.values.lane), (*tables, 0))


def definition(
    segment: StepSegment, query: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each row in fp64: (output (R, m, v), log-sum-exp (R, m))."""
    out, lses = [], []
    longest = int(segment.lengths.max()) if segment.lengths is not None else 0
    keys, values = (x.decoded(0, longest, torch.float64) for x in (segment.keys, segment.values))
    for row, asked in enumerate(query.double()):
        n = int(segment.lengths[row]) if segment.lengths is not None else 0
        own = keys[row, :n]
        if (how := segment.rebuilding) is not None:
            own = own @ how.maps[row % len(how.maps)].double()
            coarse, fine, _ = (torch.as_tensor(x, device=own.device) for x in how.rotation)
            at = torch.arange(n, device=own.device)
            (a, b), (c, e) = (x.double().unbind(1) for x in (coarse[at // 64], fine[at % 64]))
            cos, sin = ((x).to(how.maps.dtype).double() for x in (a * c - b * e, b * c + a * e))
            left, right = own.chunk(2, 1)
            own = torch.cat([left * cos - right * sin, right * cos + left * sin], 1)
        scores = asked @ own.mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        lses.append(scores.logsumexp(1) if n else scores.new_full((len(asked),), -torch.inf))
        out.append(scores.softmax(1) @ values[row, :n])
    return torch.stack(out), torch.stack(lses)


# -- bandwidth


def bandwidth(run: Run) -> None:
    """GB/s of a step of attention with the heads of Llama-3.2-1B and of Llama-3.1-8B, beside a plain sum."""
    memory = torch.ones((2**30 if not run.toy else 2**16) // 4, device=run.device)
    seconds = timed(run, memory.sum)
    run.add("bandwidth", {"what": "read", "gbs": memory.nbytes / seconds / 1e9})
    contexts = (8192, 32768, 131072) if not run.toy else (96,)
    for context in contexts:
        for d in (64, 128) if not run.toy else (64,):
            what = {"context": context, "kv_heads": 8, "queries": 4, "channels": d}
            run.measure("bandwidth", what | {"what": "flash"}, partial(flash_attention, run, context, d))
            for keys, values in (("plain",) * 2, ("token8",) * 2, ("token4",) * 2, ("channel2", "token2")):
                call = partial(attention, run, keys, values, context, d)
                run.measure("bandwidth", what | {"what": f"{keys}, {values}"}, call)


def attention(run: Run, keys: str, values: str, context: int, d: int) -> dict[str, Any]:
    """The figures of a step over all tokens, in one form."""
    heads = 8 if not run.toy else 2
    lengths = (context,) * (heads * sequences(run, context, d))
    query = randn(run.device, torch.bfloat16, len(lengths), 4, d)
    first = random_segment(keys, values, torch.bfloat16, d, lengths, run.device)
    held = sum(
        x.nbytes for s in (first.keys, first.values) for x in (s.numbers, s.scale, s.low) if x is not None
    )
    kernel = triton_gpu.Segments(4, [first])
    seconds = timed(run, partial(kernel.attend, (None, query), d**-0.5))
    row = {"bytes": held, "ms": 1e3 * seconds, "gbs": held / seconds / 1e9}
    if run.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.attend((None, query), d**-0.5)
        seconds = timed(run, graph.replay)
        row |= {"graph_ms": 1e3 * seconds, "graph_gbs": held / seconds / 1e9}
    return row


def flash_attention(run: Run, context: int, d: int) -> dict[str, Any]:
    """The figures of torch's FlashAttention over the whole cache, which is not compressed."""
    b, heads = sequences(run, context, d), 8 if not run.toy else 2
    query = randn(run.device, torch.bfloat16, b, 4 * heads, 1, d)
    keys, values = (randn(run.device, torch.bfloat16, b, heads, context, d) for _ in range(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if run.device == "cuda" else nullcontext():
        seconds = timed(run, partial(scaled_dot_product_attention, query, keys, values, enable_gqa=True))
    held = keys.nbytes + values.nbytes
    return {"bytes": held, "ms": 1e3 * seconds, "gbs": held / seconds / 1e9}


def sequences(run: Run, context: int, d: int) -> int:
    """A batch whose whole cache is larger than what a GPU caches."""
    return 1 if run.toy else max(1, COLD // (2 * 2 * 8 * context * d))


def timed(run: Run, call: Callable[[], object]) -> float:
    """Median seconds of a call, by the GPU's own clock where there is one."""
    times, rounds = [], 20 if not run.toy else 1
    for _ in range(3 if not run.toy else 1):
        call()
    for _ in range(rounds):
        if run.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


# -- whole models


def random_model(run: Run, shape: str, positions: int) -> PreTrainedModel:
    """A random model of this shape, attached."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=positions)
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    with torch.device(run.device):
        model = LlamaForCausalLM(config).to(dtype)
    return attach(model.eval())


def steps(run: Run) -> None:
    """Decode steps of whole models: each setting beside stock in its own run, so that none costs another."""
    contexts = (8192, 32768, 131072) if not run.toy else (64,)
    shapes = ("smollm2-135m", "llama-3.2-1b") if not run.toy else ("toy",)
    tokenizer = load("tiny", "float32", "cpu")[1]
    models: dict[str, PreTrainedModel] = {}
    makers: dict[str, dict[str, Callable[[], LowkeyCache]]] = {}

    def prepared(shape: str) -> dict[str, Any]:
        start = time.perf_counter()
        models[shape] = random_model(run, shape, 2 * max(contexts))
        makers[shape] = dict(settings(models[shape], tokenizer))
        return {"seconds": time.perf_counter() - start}

    for shape in shapes:
        run.measure("steps", {"model": shape, "setting": "preparation"}, partial(prepared, shape))
    for context in contexts:
        for shape, known in makers.items():
            model = models[shape]
            for name, make in known.items():
                call = partial(step, run, model, tokenizer, name, make, context)
                run.measure("steps", {"model": shape, "context": context, "setting": name}, call)


def settings(model: PreTrainedModel, tokenizer: Any) -> Iterator[tuple[str, Callable[[], LowkeyCache]]]:
    """What makes an empty cache, by the names of SETTINGS. Ranks are fitted to little text: shapes count."""
    few = Sample(windows=4, length=64)
    fit = partial(calibrate, model, tokenizer, budget="50%", allocator="uniform", sample=few, bits="none")
    rank = fit(method=PCA(), layout="post_rope")
    joint = fit(method=KQSVD(group=0), layout="pre_rope")
    cache = partial(make_cache, model)
    known = {
        "full": cache,
        "snapkv:10%": partial(cache, policy=make_policy("snapkv", "10%", {})),
        **{bits: partial(cache, bits=bits) for bits in ("int8", "int4", "kivi2")},
        "rank:50%": partial(cache, rank),
        "joint:50%": partial(cache, joint),
        "joint:50%+kivi2": partial(cache, joint, bits="kivi2"),
    }
    yield from ((name, known[name]) for name in SETTINGS)


def step(
    run: Run,
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    make: Callable[[], LowkeyCache],
    context: int,
) -> dict[str, Any]:
    """The figures of one setting and of stock in the same run."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    timing = StepTiming((context,), (1,), 7 if not run.toy else 1)
    with sdpa_kernel(order, set_priority=True):
        stock, own = step_bench(model, tokenizer, {name: make}, timing)["rows"]
    own = {key: own[key] for key in ("step_ms", "ratio_to_stock", "spread", "bytes_held", "operations")}
    return own | {"stock_ms": stock["step_ms"], "stock_bytes": stock["bytes_held"]}


def calibration(run: Run) -> None:
    """Seconds and peak memory of calibrating a model of Llama-3.2-1B's shape by default."""

    def measured() -> dict[str, Any]:
        model, tokenizer = random_model(run, shape, 4096), load("tiny", "float32", "cpu")[1]
        sample = Sample(32, 512) if not run.toy else Sample(4, 32)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        plan = calibrate(model, tokenizer, budget="50%", sample=sample)
        row = {"seconds": time.perf_counter() - start, "method": plan.method["name"]}
        if run.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        return row

    shape = "llama-3.2-1b" if not run.toy else "toy"
    run.measure("calibration", {"model": shape}, measured)


def two_gpus(run: Run) -> None:
    """The logits of a model whose layers lie on two GPUs against those on one."""
    if run.device == "cuda" and torch.cuda.device_count() < 2:
        return run.add("two-gpus", {"skipped": "there is one GPU"})
    devices = ("cuda:0", "cuda:1") if run.device == "cuda" else ("cpu", "cpu")
    run.measure("two-gpus", {"devices": list(devices)}, partial(spread, run, devices))


def spread(run: Run, devices: tuple[str, str]) -> dict[str, Any]:
    """The largest difference between logits on one device and on two, over those on one."""
    shape = "smollm2-135m" if not run.toy else "toy"
    model = random_model(run, shape, 4096)
    ids = torch.arange(1, 65, device=devices[0]).unsqueeze(0)

    @torch.no_grad()
    def logits() -> Tensor:
        cache = make_cache(model, bits="int4")
        parts = [model(one, past_key_values=cache).logits for one in (ids[:, :56], *ids[:, 56:].split(1, 1))]
        return torch.cat(parts, 1).float().to(devices[0])

    def compared() -> dict[str, Any]:
        error = float((logits() - alone).abs().max() / alone.abs().max())
        return {"difference": error, "right": error < 2e-2}

    alone = logits()
    half = model.config.num_hidden_layers // 2
    if run.device == "cpu":  # accelerate would take its memory for that of offloaded weights
        return compared()
    places = {f"model.layers.{i}": devices[i >= half] for i in range(model.config.num_hidden_layers)}
    places |= {"model.embed_tokens": devices[0], "model.norm": devices[1], "model.rotary_emb": devices[0]}
    model = dispatch_model(model, places | {"lm_head": devices[0]}, force_hooks=True)
    return compared()


def _short(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


if __name__ == "__main__":
    typer.run(main)
