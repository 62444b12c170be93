"""What a policy costs before the first token: its prefill over that of the full cache, in one run.

    python benchmarks/policy_prefill.py [MODEL] [--context 4096 --budget 10% --rounds 3 --threads 1 --policies
    h2o,kvzip,...]

MODEL: a folder or the name of a model; left out, a random Llama as wide as SmolLM2-135M (hidden 576, 9 heads
and 3 KV heads of 64) with 4 layers, since time depends on shapes only. Policies take turns with the full
cache; medians of the times and of the ratios within a round. The prompt is read as `lowkey.prefill` reads it,
so that KVzip's second pass counts. peak: what the process grew by beyond its size before the first prefill of
that policy, in MiB, taken in a round of its own.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowkey
from lowkey.catalog import make_policy
from lowkey.models.families import geometry
from lowkey.models.loading import load
from lowkey.policies import POLICIES
from lowkey.policies.base import Policy


def main(
    model: Annotated[str | None, typer.Argument(help="a folder or a name (default: a random one)")] = None,
    context: int = 4096,
    budget: str = "10%",
    rounds: int = 3,
    threads: int = 1,
    policies: Annotated[str, typer.Option(help="separated by commas")] = ",".join(POLICIES),
) -> None:
    torch.set_num_threads(threads)
    loaded, tokenizer = load(model, "float32", "cpu") if model else (random_model(), Words())
    ids = torch.randint(
        10,
        loaded.config.get_text_config().vocab_size,
        (1, context),
        generator=torch.Generator().manual_seed(0),
    )
    settings: dict[str, Policy | None] = {
        "full": None,
        **{name: with_heads(name, budget, loaded) for name in policies.split(",")},
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    growth: dict[str, float] = {}
    for name, policy in settings.items():
        before = peak()
        seconds(loaded, tokenizer, ids, policy)
        growth[name] = peak() - before
    for _ in range(rounds):
        for name, policy in settings.items():
            times[name].append(seconds(loaded, tokenizer, ids, policy))
    print(f"{context} tokens, {threads} thread(s), budget {budget}")
    print("| policy | prefill, s | over full | peak, MiB |\n|---|---|---|---|")
    for name, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took, times["full"], strict=True))
        print(f"| {name} | {statistics.median(took):.2f} | {ratio:.2f} | {growth[name]:.0f} |", flush=True)


class Words:
    """A tokenizer for a random model: as many tokens as a real one makes of a short request."""

    def __call__(self, text: str, **_: object) -> Words:
        self.input_ids = torch.arange(2, 2 + len(text.split()) + 2).unsqueeze(0)
        return self


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=4, max_position_embeddings=2**17, **shape)
    return lowkey.attach(LlamaForCausalLM(config).eval())


def with_heads(name: str, budget: str, model: PreTrainedModel) -> Policy:
    """The policy, with random head importance where it asks for some."""
    shape = geometry(model)
    scores = torch.rand(
        len(shape.compressible), shape.kv_heads, generator=torch.Generator().manual_seed(0)
    ).tolist()
    return make_policy(name, budget, {}).with_head_scores(
        dict.fromkeys(("copy", "r2", "induction", "echo"), scores)
    )


@torch.no_grad()
def seconds(model: PreTrainedModel, tokenizer: object, ids: torch.Tensor, policy: Policy | None) -> float:
    cache = lowkey.make_cache(model, policy=policy)
    # on one thread other jobs do not count
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    lowkey.prefill(model, tokenizer, cache, ids)  # type: ignore[arg-type]
    return clock() - start


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
