"""What a smaller cache costs before the first token: the time of a prompt under each setting over that of
transformers' own cache and attention in the same run.

    python benchmarks/prefill.py [OUT.json] [--model smollm2 --context 4k --dtype float32 --rounds 3
    --settings int4,h2o,... --threads 1 --layers 6]

The prompt is read as `lowkey.prefill` reads it, so that KVzip's second pass counts. Policies keep 10 %. Ranks
are those of `benchmarks/bench.py`. Every round times stock and all settings once, in turn. On one thread,
times are CPU time, so that other jobs count less. Rows of OUT that are not measured again stay there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import bench
import torch
import typer
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import lowkey
from lowkey.cache.cache import LowkeyCache
from lowkey.catalog import make_policy
from lowkey.cli.checks import parse_numbers
from lowkey.core import files
from lowkey.evaluate.machine import machine
from lowkey.evaluate.step_bench import stock_twin
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.policies import POLICIES
from lowkey.policies.base import Policy

BUDGET = "10%"


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None,
    model: Annotated[str, typer.Option(help="a folder or the name of a model")] = "smollm2",
    context: Annotated[str, typer.Option(help="tokens of the prompt, like 1k or 1k,4k")] = "4k",
    dtype: str = "float32",
    settings: Annotated[str, typer.Option(help="separated by commas (default: all)")] = "",
    rounds: int = 3,
    threads: int = 1,
    layers: Annotated[int | None, typer.Option(help="only the first so many layers")] = None,
) -> None:
    torch.set_num_threads(threads)
    loaded, tokenizer = load(model, dtype, "cpu")
    if layers is not None:
        loaded.model.layers = loaded.model.layers[:layers]
        loaded.config.num_hidden_layers = layers
        loaded.config.layer_types = None
    lowkey.attach(loaded)
    makers = bench.settings(loaded, tokenizer) | policies(loaded)
    chosen = settings.split(",") if settings else list(makers)
    rows = []
    for tokens in parse_numbers("context", context, "StepTiming", "contexts"):
        times = measured(loaded, tokenizer, tokens, {name: makers[name] for name in chosen}, rounds)
        rows += [
            {"setting": name, "dtype": dtype, "context": tokens, "threads": threads, "layers": layers, **row}
            for name, row in compared(times)
        ]
        for row in rows[-len(chosen) - 1 :]:
            spread = f"{row['ratio_to_stock']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
            print(row["setting"], tokens, f"{row['seconds']:.2f} s", spread)
    if out:
        new = {key(row) for row in rows}
        old = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
        rows = [row for row in old if key(row) not in new] + rows
        files.write_json(out, {"environment": machine("cpu"), "rows": rows}, "benchmark", ours=True)


def policies(model: PreTrainedModel) -> dict[str, Callable[[], LowkeyCache]]:
    """What makes an empty cache of each policy that needs no gates, answer or small model. Head importance is
    random: time depends on shapes only.
    """
    shape, seeded = families.geometry(model), torch.Generator().manual_seed(0)
    scores = torch.rand(len(shape.compressible), shape.kv_heads, generator=seeded).tolist()
    heads = dict.fromkeys(("copy", "r2", "induction", "echo", "reward", "distilled"), scores)

    def policy(name: str) -> Policy:
        return make_policy(name, BUDGET, {}).with_head_scores(heads)

    made = {name: policy(name) for name in POLICIES}
    # what else some would have to be given says nothing of the time that a prompt takes
    return {
        name: partial(lowkey.make_cache, model, policy=one)
        for name, one in made.items()
        if not (one.learns or one.sees_answer or one.reads_along)
    }


@torch.no_grad()
def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    makers: dict[str, Callable[[], LowkeyCache]],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a prompt in every round, by setting; `stock` comes first."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(10, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    stock = stock_twin(model)

    def stock_prefill() -> None:
        stock(ids, past_key_values=DynamicCache(config=stock.config), logits_to_keep=1)

    def own_prefill(name: str) -> None:
        lowkey.prefill(model, tokenizer, makers[name](), ids)

    runs: dict[str, Callable[[], None]] = {"stock": stock_prefill}
    runs |= {name: partial(own_prefill, name) for name in makers}
    times: dict[str, list[float]] = {name: [] for name in runs}
    # on one thread other jobs do not count
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def compared(times: dict[str, list[float]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Medians of the seconds and of their quotients within a round, with the least and the largest quotient,
    by setting.
    """
    for name, own in times.items():
        quotients = [a / b for a, b in zip(own, times["stock"], strict=True)]
        yield (
            name,
            {
                "seconds": median(own),
                "ratio_to_stock": median(quotients),
                "least": min(quotients),
                "most": max(quotients),
                "rounds": len(own),
            },
        )


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[name] for name in ("setting", "dtype", "context", "threads", "layers"))


if __name__ == "__main__":
    typer.run(main)
