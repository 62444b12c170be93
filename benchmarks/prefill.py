"""What a smaller cache costs in time: a prompt, and then a decoding step, under each setting over those of
the full cache in the same run.

    python benchmarks/prefill.py [--context 4096 --budget 10% --rounds 5 --policies snapkv,... --no-latents]

A random Llama of 2 layers, hidden 1024, 16 heads, 8 KV heads of 64; time depends on shapes only. Rounds in
which the settings take turns; medians of the ratios within a round.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowkey
from lowkey.cache.cache import LowkeyCache, cache_of
from lowkey.catalog import make_policy
from lowkey.core.types import Factors, Layout
from lowkey.models import families
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact

STEPS = 8  # of decoding
POLICIES = (
    "streamingllm",
    "tova",
    "snapkv",
    "ada-kv",
    "pyramidkv",
    "expected-attention",
    "curdkv",
    "keydiff",
    "kv-compress",
    "think",
    "h2o",
)


def main(
    context: int = 4096,
    budget: str = "10%",
    rounds: int = 5,
    policies: Annotated[str, typer.Option(help="separated by commas; may be empty")] = ",".join(POLICIES),
    latents: Annotated[bool, typer.Option(help="low rank and packed integers, too")] = True,
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    model = lowkey.attach(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 1000, (1, context))
    chosen = {name: make_policy(name, budget, {}) for name in policies.split(",") if name}
    caches: dict[str, Callable[[], LowkeyCache]] = {"full": lambda: lowkey.make_cache(model)}
    caches |= {name: partial(lowkey.make_cache, model, policy=policy) for name, policy in chosen.items()}
    caches |= stored_otherwise(model) if latents else {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
    for _ in range(rounds + 1):
        for name, make in caches.items():
            times[name].append(seconds(model, ids, make()))
    print("| setting | prefill, s | over full | step, ms | over full |\n|---|---|---|---|---|")
    for name, took in times.items():
        (prefill, its), (step, own) = (_beside(took[1:], times["full"][1:], i) for i in range(2))
        print(f"| {name} | {prefill:.3f} | {its:.3f} | {1000 * step:.1f} | {own:.3f} |")


def _beside(took: list[tuple[float, float]], full: list[tuple[float, float]], i: int) -> tuple[float, float]:
    """Medians of the i-th time and of its ratio within a round."""
    return statistics.median(x[i] for x in took), statistics.median(
        x[i] / y[i] for x, y in zip(took, full, strict=True)
    )


def stored_otherwise(model: PreTrainedModel) -> dict[str, Callable[[], LowkeyCache]]:
    """Latents of half the rank, in random bases: time depends on shapes only; and integers."""
    near = Exact(sinks=4, recent=64)
    kinds: dict[str, tuple[Layout, Exact]] = {
        "rank 50 %": ("post_rope", Exact()),
        "rank 50 %, pre-RoPE": ("pre_rope", Exact()),
        "rank 50 %, 4 sinks and 64 recent": ("post_rope", near),
        "rank 50 %, pre-RoPE, 4 sinks and 64 recent": ("pre_rope", near),
    }
    caches: dict[str, Callable[[], LowkeyCache]] = {
        name: partial(cache_of, model, partial(latent_layer, model, layout, exact))
        for name, (layout, exact) in kinds.items()
    }
    return caches | {bits: partial(lowkey.make_cache, model, bits=bits) for bits in ("int8", "int4", "kivi4")}


def latent_layer(model: PreTrainedModel, layout: Layout, exact: Exact, i: int) -> CodedLayer:
    shape = families.geometry(model)
    down = torch.linalg.qr(torch.randn(shape.kv_heads, shape.head_dim, shape.head_dim // 2)).Q
    return CodedLayer(LowRank(Factors(down, down.mT, down, down.mT), layout, families.rope(model, i)), exact)


@torch.no_grad()
def seconds(model: PreTrainedModel, ids: torch.Tensor, cache: LowkeyCache) -> tuple[float, float]:
    """Of the prompt, and of a step after it: the median of several."""
    marks = [time.perf_counter()]
    for part in (ids, *[ids[:, :1]] * STEPS):
        model(part, past_key_values=cache, logits_to_keep=1)
        marks.append(time.perf_counter())
    prefill, *steps = (stop - start for start, stop in itertools.pairwise(marks))
    return prefill, statistics.median(steps)


if __name__ == "__main__":
    typer.run(main)
