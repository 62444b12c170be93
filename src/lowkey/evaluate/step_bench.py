"""Time one decode step of a whole model with different caches, against transformers' own cache and attention.

Settings take turns in rounds, so that other load on the machine meets all of them. Every figure is a median
over rounds, and every quotient is of two times of the same round.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill
from lowkey.core import text
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError, device_of
from lowkey.evaluate.machine import machine
from lowkey.evaluate.operations import counted_operations
from lowkey.models import families
from lowkey.storage.rollback import storage_bytes

STEP_FORMAT = 1
STOCK_SETTING = "stock"  # the row of transformers' own cache and attention
STEPS_OF_A_TURN = 2  # of a turn
SEED = 0  # of the order of turns


@dataclass(frozen=True)
class StepTiming(Checked):
    """How steps are timed.

    Args:
        contexts: tokens of the prompt that is read before the steps; several are timed one after the other.
        threads: CPU threads of torch and of lowkey's kernels; several are timed one after the other.
        rounds: rounds in which every setting takes a turn. One more, which warms up, is left out.
    """

    contexts: tuple[int, ...] = option((1024,), at_least=8, at_most=2**24)
    threads: tuple[int, ...] = option((1,), at_least=1, at_most=2**10)
    rounds: int = option(15, at_least=1, at_most=10**4)


@dataclass(frozen=True)
class Contestant:
    """A model and a cache that has read the prompt.

    Args:
        model: with the attention that goes with the cache.
        cache: grows with every step.
    """

    model: PreTrainedModel
    cache: Cache

    def step(self, token: Tensor) -> None:
        """Decode one token (1, 1)."""
        self.model(token, past_key_values=self.cache)

    def nbytes(self) -> int:
        """The bytes that the cache holds."""
        if isinstance(self.cache, LowkeyCache):
            return self.cache.nbytes()
        held = (t for layer in self.cache.layers for t in vars(layer).values() if isinstance(t, Tensor))
        return storage_bytes(held)


@torch.no_grad()
def step_bench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Callable[[], LowkeyCache]],
    timing: StepTiming = StepTiming(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time decode steps behind a prompt of the embedded evaluation text, which is repeated where it is short.

    A turn is two steps, of which the mean counts. Nothing is taken back in between: a cache holds two tokens
    more after each round, those of the settings before it likewise. What happens rarely (a block of packed
    keys is full every 32 tokens) shows in the spread, if at all.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what makes an empty cache, by name. transformers' own cache and attention, over the same
            weights, are always the first row.
        timing: contexts, threads and rounds.
        progress: shows progress.

    Returns:
        `format`, `environment`, and `rows`, each with `setting`, `context`, `threads`, `step_ms` (median over
        rounds), `ratio_to_stock` (median over rounds of its time over that of stock), `spread` (the first and
        third quartile of the same), and, of one further step, `operations`, `value_reads` (see
        `counted_operations`) and `bytes_held` behind it.

    Raises:
        LowkeyError: a context beyond the model's positions, or a cache that refuses the prompt.
    """
    longest = families.max_positions(model)
    for context in timing.contexts:
        if longest is not None and context > longest:
            raise LowkeyError(f"context {context}: the model has {longest} positions; give at most that")
    environment = machine(str(device_of(model))) | {
        "device": str(device_of(model)),
        "model": model.config._name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": timing.rounds,
        "steps_per_round": STEPS_OF_A_TURN,
    }
    stock = stock_twin(model)
    rows: list[dict[str, Any]] = []
    for context in timing.contexts:
        ids = _prompt(model, tokenizer, context)
        # empty caches first: what does not go together is refused before anything is read
        caches = {name: make() for name, make in settings.items()}
        contestants = {STOCK_SETTING: Contestant(stock, DynamicCache(config=stock.config))}
        contestants |= {name: Contestant(model, cache) for name, cache in caches.items()}
        for name in progress(list(contestants), lambda name: f"{context} tokens, {name}"):  # noqa: B023
            cache = contestants[name].cache
            if isinstance(cache, LowkeyCache):
                prefill(model, tokenizer, cache, ids)
            else:
                stock(ids, past_key_values=cache, logits_to_keep=1)
        for threads in timing.threads:
            with _torch_threads(threads):
                times = _times(contestants, ids[:, -1:], timing.rounds, f"{context} tokens", progress)
            rows += [
                {"setting": name, "context": context, "threads": threads}
                | _compared(times[name], times[STOCK_SETTING])
                | _counted(contestant, ids[:, -1:])
                for name, contestant in contestants.items()
            ]
    return {"format": STEP_FORMAT, "environment": environment, "rows": rows}


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with transformers' own SDPA attention. The two share all weights."""
    weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, weights)
    twin.get_decoder().set_attn_implementation("sdpa")
    return twin


def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Ids (1, length) of the embedded text, behind the tokenizer's beginning of text if it has one."""
    ids = text.encode(tokenizer, text.embedded_text("evaluation"), model)
    start = ids.new_tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    return torch.cat([start, ids.repeat(-(-length // len(ids)))])[:length].unsqueeze(0).to(device_of(model))


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Compute with so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _times(
    contestants: Mapping[str, Contestant], token: Tensor, rounds: int, label: str, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of a step of each contestant in each round, in which they take turns in a new random order."""
    order = random.Random(SEED)
    turns = [(r, n) for r in range(rounds + 1) for n in order.sample(list(contestants), len(contestants))]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for r, name in progress(turns, lambda turn: f"{label}, steps, {turn[1]}"):
        step = partial(contestants[name].step, token)
        steps = [_seconds(step, token.device) for _ in range(STEPS_OF_A_TURN)]
        if r:  # the first round warms up and compiles
            times[name].append(mean(steps))
    return times


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _compared(own: Sequence[float], stock: Sequence[float]) -> dict[str, Any]:
    """The figures of a row that come from its times and those of stock, both in seconds by round."""
    over_stock = [a / b for a, b in zip(own, stock, strict=True)]
    first, _, third = quantiles(over_stock * 2 if len(own) == 1 else over_stock, n=4, method="inclusive")
    return {"step_ms": 1e3 * median(own), "ratio_to_stock": median(over_stock), "spread": [first, third]}


def _counted(contestant: Contestant, token: Tensor) -> dict[str, Any]:
    """The figures of a row that come from counting one more step, and the bytes behind it."""
    with counted_operations() as count:
        contestant.step(token)
    return {
        "bytes_held": contestant.nbytes(),
        "operations": count.operations,
        "value_reads": count.value_reads,
    }
