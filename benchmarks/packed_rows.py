"""What bounds a decode step's attention over stored rows: memory, or the instructions that decode numbers.

    python benchmarks/packed_rows.py [OUT.json] [--rounds 15]

The same kernel reads rows that lie in memory, and rows that are few enough to stay in the processor's cache.
Where both take the same time for a number, instructions are the bound and not bytes. One thread. Run it on an
idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lowkey.backends import ragged
from lowkey.core.files import write_json
from lowkey.evaluate.machine import machine
from lowkey.storage.packing import scheme
from lowkey.storage.rows import stored_densely

FORMS = ("float32", "bfloat16", "int8", "int4", "kivi4", "kivi2")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5, "kivi4": 0.5, "kivi2": 0.25}  # a number
COLD, WARM = 48 * 2**20, 6 * 2**20  # bytes that are read: more than caches hold, and less
HEADS, WIDTH, READ = 8, 64, 2**28
COLUMNS = (
    "rows",
    "queries of a head",
    "GB/s",
    "of read bandwidth",
    "numbers per ns",
    "numbers per ns, in the cache",
)


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None, rounds: int = 15
) -> None:
    """Print a Markdown table, write JSON."""
    torch.set_num_threads(1)
    read = torch.zeros(READ, dtype=torch.uint8).view(torch.int64)
    rows = []
    for queries, form in product((1, 4), FORMS):
        (cold, nbytes, numbers), (warm, _, few) = (
            attention(form, queries, COLD),
            attention(form, queries, WARM),
        )
        times = [(seconds(read.sum), seconds(cold)) for _ in range(rounds)]  # a read also empties caches
        again = [(seconds(warm), seconds(warm))[1] for _ in range(rounds)]
        bandwidth, step = READ / median(t for t, _ in times), median(t for _, t in times)
        row = {"form": form, "queries": queries, "bytes": nbytes, "gbs": nbytes / step / 1e9}
        row |= {"read_gbs": bandwidth / 1e9, "share_of_read_bandwidth": nbytes / step / bandwidth}
        rows.append(row | {"numbers_per_ns": numbers / step / 1e9, "warm": few / median(again) / 1e9})
        print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
    if out:
        write_json(out, {"environment": machine("cpu"), "rows": rows}, "benchmark", ours=True)


def attention(form: str, queries: int, nbytes: int) -> tuple[Callable[[], Any], int, int]:
    """A step over rows of about so many bytes; the bytes and the numbers that it reads."""
    tokens = int(nbytes / (2 * HEADS * WIDTH * BYTES[form])) // 64 * 64
    keys, values = torch.randn(2, 1, HEADS, tokens, WIDTH)
    query, lengths = torch.randn(HEADS, queries, WIDTH), torch.full((HEADS,), tokens)
    numbers = keys.numel() + values.numel()
    if form in ("float32", "bfloat16"):
        dtype = getattr(torch, form)
        flat: list[Tensor] = [x.to(dtype).reshape(-1, WIDTH) for x in (keys, values)]
        starts = torch.arange(HEADS + 1) * tokens
        held = sum(x.numel() * x.element_size() for x in flat)
        return partial(ragged.ragged, query.to(dtype), *flat, starts, 0.1), held, numbers
    packings = scheme(form)
    stored, held = [], 0
    for packing, x in ((packings.keys, keys), (packings.values, values)):
        parts = packing.pack(x)
        held += sum(part.numel() * part.element_size() for part in parts)
        stored.append(stored_densely(packing, parts, WIDTH))
    return partial(ragged.stored_rows, query, *stored, lengths, 0.1), held, numbers


def seconds(step: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        row["form"],
        str(row["queries"]),
        f"{row['gbs']:.1f}",
        f"{row['share_of_read_bandwidth']:.0%}",
        f"{row['numbers_per_ns']:.1f}",
        f"{row['warm']:.1f}",
    ]


if __name__ == "__main__":
    typer.run(main)
