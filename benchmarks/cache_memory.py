"""What caches really cost a process: its resident memory with ten filled caches at hand, beside what they say
they hold.

    python benchmarks/cache_memory.py [MODEL] [--prompts 10] [--tokens 6000] [--settings
    full,bits-8,snapkv,global]

Each line is a fresh process, which first reads one prompt into a cache that it drops, so that what a forward
pass leaves behind for good is not counted. `resident` is the growth of resident memory after Python's
collector ran; `trimmed`, after the C library also gave back the pages that it keeps for later (glibc's
malloc_trim). Without MODEL: a random Llama of 4 layers, as wide as SmolLM2-135M.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowkey
from lowkey.cache.cache import LowkeyCache
from lowkey.models.loading import load
from lowkey.policies import SnapKV

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
KEPT = "1%"
SETTINGS: dict[str, Callable[[PreTrainedModel], LowkeyCache]] = {
    "full": lambda m: lowkey.make_cache(m),
    "bits-8": lambda m: lowkey.make_cache(m, bits=8),
    "snapkv": lambda m: lowkey.make_cache(m, policy=SnapKV(KEPT)),
    # its layers wait for one another
    "global": lambda m: lowkey.make_cache(m, policy=SnapKV(KEPT, "global")),
}


def resident() -> float:
    """MiB of this process, on Linux."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def trimmed() -> float:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


@torch.no_grad()
def child(name: str, setting: str, prompts: int, tokens: int) -> None:
    """One measurement, printed as a table line."""
    torch.manual_seed(0)
    if name:
        model = load(name, "float32", "cpu")[0]
    else:
        config = LlamaConfig(**SHAPE, vocab_size=1000, max_position_embeddings=tokens, eos_token_id=None)
        model = LlamaForCausalLM(config).eval()
    lowkey.attach(model)

    def filled(seed: int) -> LowkeyCache:
        cache = SETTINGS[setting](model)
        ids = torch.randint(
            model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)
        )
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    filled(0)
    before = trimmed()
    caches = [filled(seed) for seed in range(prompts)]
    plain = resident() - before
    held = sum(cache.nbytes() for cache in caches) / 2**20
    shape = model.config
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    whole = prompts * tokens * 2 * shape.num_hidden_layers * shape.num_key_value_heads * width * 4 / 2**20
    print(f"| {setting} | {whole:.1f} | {held:.1f} | {plain:.1f} | {trimmed() - before:.1f} |", flush=True)


def main(
    model: str = typer.Argument(""),
    prompts: int = 10,
    tokens: int = 6000,
    settings: str = ",".join(SETTINGS),
    one: str = "",
) -> None:
    if one:
        child(model, one, prompts, tokens)
        return
    print(f"{prompts} prompts of {tokens} tokens, MiB in all\n")
    print("| setting | a full cache's | nbytes() | resident | trimmed |")
    print("|---|---|---|---|---|", flush=True)
    for setting in settings.split(","):
        options = [
            "--prompts",
            str(prompts),
            "--tokens",
            str(tokens),
            "--one",
            setting,
            *([model] if model else []),
        ]
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    typer.run(main)
