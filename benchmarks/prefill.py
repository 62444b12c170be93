"""What evicting costs in prefill: the time of a prompt under each policy over that of transformers' own cache, in the same run.

    python benchmarks/prefill.py [--context 4096 --budget 10% --rounds 5]

A random Llama of 2 layers, hidden 1024, 16 heads, 8 KV heads of 64; time depends on shapes only. Rounds in which the settings take
turns; medians of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowkey
from lowkey.loading import make_policy
from lowkey.policies.base import Policy

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


def main(context: int = 4096, budget: str = "10%", rounds: int = 5, policies: Annotated[str, typer.Option()] = ",".join(POLICIES)) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8
    )
    model = lowkey.attach(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 1000, (1, context))
    settings: dict[str, Policy | None] = {"full": None} | {name: make_policy(name, budget, {}) for name in policies.split(",")}
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds + 1):
        for name, policy in settings.items():
            times[name].append(seconds(model, ids, policy))
    print("| policy | prefill, s | over full |\n|---|---|---|")
    for name, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took[1:], times["full"][1:], strict=True))
        print(f"| {name} | {statistics.median(took[1:]):.3f} | {ratio:.3f} |")


@torch.no_grad()
def seconds(model: PreTrainedModel, ids: torch.Tensor, policy: Policy | None) -> float:
    cache = lowkey.make_cache(model, policy=policy)
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
