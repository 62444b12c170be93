"""Time one decode step of attention: ragged backends against torch's own attention and against memory
bandwidth.

Contestants take turns, so that other load on the machine meets all of them; figures are medians over rounds,
of quotients within a round. Each call finds its storage outside the processor's caches, as a layer of a real
model does, because several copies of the storage take turns too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowkey.backends import grouped, numba_cpu, triton_gpu
from lowkey.core.options import Checked, option
from lowkey.core.types import Budget, LowkeyError
from lowkey.evaluate.limits import check_head_groups
from lowkey.evaluate.machine import machine
from lowkey.ops.apportion import apportion
from lowkey.ops.ragged import starts_of

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# All copies of the storage together take this many bytes: more than a processor's caches hold.
POOL = 2**29
MOST_COPIES = 64
READ = 2**28  # bytes that are read to measure the bandwidth
CALLS = 3  # calls per round, of which the fastest counts
SPREAD = 1.0  # standard deviation of the logarithm of heads' lengths at a budget

Ragged = Callable[..., tuple[Tensor, Tensor]]
DecodeStep = Callable[[], object]


@dataclass(frozen=True)
class DecodeShape(Checked):
    """What is timed: one new token, a batch of one.

    Args:
        context: stored tokens of each KV head.
        head_dim: width of a head.
        heads: number of query heads, a multiple of `kv_heads`.
        kv_heads: number of KV heads.
        dtype: dtype of keys, values and queries.
        repeats: number of rounds.
        seed: seed of the random numbers.
    """

    context: int = option(8192, at_least=1, at_most=2**24)
    head_dim: int = option(128, at_least=1, at_most=2**14)
    heads: int = option(32, at_least=1, at_most=2**14)
    kv_heads: int = option(8, at_least=1, at_most=2**14)
    dtype: str = option("bfloat16", choices=tuple(CACHE_DTYPES))
    repeats: int = option(15, at_least=1, at_most=10**6)
    seed: int = option(0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head_groups(self.heads, self.kv_heads)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.context * self.kv_heads * self.head_dim * CACHE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stored:
    """Keys and values of all heads, one head's rows after the other's.

    Args:
        keys: (n, d).
        values: (n, d).
        starts: row at which each head begins, and the end (h + 1).
    """

    keys: Tensor
    values: Tensor
    starts: Tensor


@torch.no_grad()
def decode_bench(
    context: int = 8192,
    head_dim: int = 128,
    heads: int = 32,
    kv_heads: int = 8,
    dtype: str = "bfloat16",
    budget: str | Budget = "10%",
    repeats: int = 15,
    seed: int = 0,
) -> dict:
    """Time a step over the whole context, and over the part of it that a budget keeps, with heads of unequal
    length.

    Args:
        context: stored tokens of each KV head.
        head_dim: width of a head.
        heads: number of query heads, a multiple of `kv_heads`.
        kv_heads: number of KV heads.
        dtype: `float32`, `bfloat16` or `float16`.
        budget: tokens that heads keep on average, in `%` or `tokens`.
        repeats: number of rounds.
        seed: seed of the random numbers.

    Returns:
        The settings, the environment, the read bandwidth (GB/s, 10^9 bytes) and figures of each backend.

    Raises:
        LowkeyError: an option out of its range, a budget in bytes or above the context, or a storage that
            does not fit into memory.
    """
    shape = DecodeShape(context, head_dim, heads, kv_heads, dtype, repeats, seed)
    lengths = _lengths(shape, Budget.parse(budget), seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_memory(shape, device)
    times = _rounds(_contestants(shape, lengths, device, seed), repeats, device)
    bandwidth = [READ / seconds / 1e9 for seconds in times.pop("read")]
    settings = {
        "context": context,
        "head_dim": head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "dtype": dtype,
        "budget": str(budget),
    }
    return {
        **settings,
        "repeats": repeats,
        "seed": seed,
        "kept": lengths.tolist(),
        "environment": machine(device) | {"threads": torch.get_num_threads(), "device": device},
        "read_bandwidth_gbs": median(bandwidth),
        "backends": {
            name: _row(name, times, bandwidth, shape.nbytes) for name in times if not name.endswith(" budget")
        },
    }


def _lengths(shape: DecodeShape, budget: Budget, seed: int) -> Tensor:
    """Tokens that each KV head keeps (h): unequal, as real head budgets are, with an exact total."""
    if budget.unit not in ("%", "tokens"):
        raise LowkeyError(f"budget {budget}: this step keeps whole tokens; write it as '10%' or '512 tokens'")
    total = shape.kv_heads * (
        budget.amount if budget.unit == "tokens" else budget.amount / 100 * shape.context
    )
    if total > shape.kv_heads * shape.context:
        raise LowkeyError(f"budget {budget}: is more than the context of {shape.context}; try '10%'")
    # Measured head budgets are about log-normal, which a normal number in the exponent gives.
    weights = torch.randn(shape.kv_heads, generator=torch.Generator().manual_seed(seed)).mul(SPREAD).exp()
    ones = torch.ones(shape.kv_heads, dtype=torch.long)
    return apportion(weights, round(total), ones, ones * shape.context)


def _check_memory(shape: DecodeShape, device: str) -> None:
    """Refuse a storage that this machine cannot hold, before any of it is allocated.

    Raises:
        LowkeyError: it needs more than the free memory.
    """
    needed = 4 * shape.nbytes  # the random rows and two copies of them, and what the budget keeps
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_memory()
    if needed > free:
        what = f"context {shape.context}, head_dim {shape.head_dim} and kv_heads {shape.kv_heads}"
        raise LowkeyError(
            f"{what}: need {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; give less of one "
            "of them"
        )


def _free_memory() -> int:
    """Bytes that may be allocated: what the system calls available, and no more than the control group
    allows.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Either file may be missing, or hold a word such as `max` instead of a number.
    with suppress(OSError, ValueError):
        available = next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
        )
        free = min(free, int(available.split()[1]) * 2**10)
    with suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def _contestants(shape: DecodeShape, lengths: Tensor, device: str, seed: int) -> dict[str, DecodeStep]:
    """What is timed: one call by name. `read` reads memory only; `NAME budget` is a backend's step over what
    the budget keeps.
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(
        shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim, generator=generator
    ).to(device, CACHE_DTYPES[shape.dtype])
    full, kept = (
        _copies(rows, shape, generator, device) for rows in (torch.full_like(lengths, shape.context), lengths)
    )
    memory = torch.ones(READ // 4, device=device)
    steps: dict[str, DecodeStep] = {"read": memory.sum, "sdpa": lambda: _sdpa(query, next(full))}
    for name, ragged in _backends(device).items():
        steps[name], steps[f"{name} budget"] = _step(ragged, query, full), _step(ragged, query, kept)
    return steps


def _copies(lengths: Tensor, shape: DecodeShape, generator: torch.Generator, device: str) -> Iterator[Stored]:
    """The same random rows at several addresses, in turn, forever."""
    n = int(lengths.sum())
    pair = [
        torch.randn(n, shape.head_dim, generator=generator).to(device, CACHE_DTYPES[shape.dtype])
        for _ in range(2)
    ]
    count = min(max(POOL // sum(x.nbytes for x in pair), 2), MOST_COPIES)
    return cycle(
        [Stored(pair[0].clone(), pair[1].clone(), starts_of(lengths).to(device)) for _ in range(count)]
    )


def _backends(device: str) -> dict[str, Ragged]:
    """The ragged backends that run on this device."""
    backends: dict[str, Ragged] = {"grouped": grouped.ragged}
    if device == "cpu" and numba_cpu.available():
        backends["numba"] = numba_cpu.ragged
    if device == "cuda" and triton_gpu.available():
        backends["triton"] = triton_gpu.ragged
    return backends


def _step(ragged: Ragged, query: Tensor, stored: Iterator[Stored]) -> DecodeStep:
    """A call that attends over the next copy of the storage."""

    def step() -> object:
        s = next(stored)
        return ragged(query, s.keys, s.values, s.starts, query.shape[-1] ** -0.5)

    return step


def _sdpa(query: Tensor, stored: Stored) -> Tensor:
    """One step of torch's own attention, in which all heads have the same length."""
    h, g, d = query.shape
    keys, values = (x.view(1, h, -1, d) for x in (stored.keys, stored.values))
    return scaled_dot_product_attention(query.view(1, h * g, 1, d), keys, values, enable_gqa=g > 1)


def _rounds(contestants: dict[str, DecodeStep], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. A first round, which warms up and compiles, is left out."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, step in contestants.items():
            # the fastest of a few calls: other load on the machine only makes calls slower
            times[name].append(min(_timed(step, device) for _ in range(CALLS)))
    return {name: seconds[1:] for name, seconds in times.items()}


def _timed(step: DecodeStep, device: str) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _row(name: str, times: dict[str, list[float]], bandwidth: list[float], nbytes: int) -> dict:
    """The figures of one backend: medians over rounds, of quotients within a round.

    torch's own attention has no rows of different length and thus no figures at a budget.
    """
    full, kept = times[name], times.get(f"{name} budget")
    return {
        "ms": 1e3 * median(full),
        "gbs": nbytes / median(full) / 1e9,
        "ratio_to_sdpa_full": _median_quotient(times["sdpa"], full),
        "budget_ms": 1e3 * median(kept) if kept else None,
        "budget_to_full": _median_quotient(kept, full) if kept else None,
        "share_of_read_bandwidth": median(
            nbytes / seconds / 1e9 / gbs for seconds, gbs in zip(full, bandwidth, strict=True)
        ),
    }


def _median_quotient(above: list[float], below: list[float]) -> float:
    """Median over rounds of the quotient of two times."""
    return median(a / b for a, b in zip(above, below, strict=True))
