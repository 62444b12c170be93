"""What caches really cost a process: its resident memory, beside what they say they hold.

    python benchmarks/cache_memory.py [OUT.json] [--tokens 32768 --chunk 2048 --settings full,snapkv,h2o,int4]
    python benchmarks/cache_memory.py --prompts 10 --tokens 6000 --settings full,bits-8,snapkv,global

The first form reads one prompt chunk by chunk, and prints how far the process grew meanwhile: `peak`. A cache
with a policy keeps 2048 tokens and evicts after every chunk. `one chunk`: the peak of the first chunk alone.
The second form fills a cache with each of several prompts and holds all of them. `resident` is the growth of
resident memory after Python's collector ran; `trimmed`, after the C library also gave back the pages that it
keeps for later (glibc's malloc_trim).

Each line is a fresh process on one thread (Linux), which first reads a short prompt into a cache that it
drops, so that what a forward pass leaves behind for good is not counted. The model is a random Llama of 4
layers, as wide as SmolLM2-135M.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowkey
from lowkey.cache.cache import LowkeyCache
from lowkey.core import files
from lowkey.evaluate.machine import machine
from lowkey.policies import H2O, TOVA, SnapKV, StreamingLLM

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
VOCABULARY = 1000
KEPT = "2048 tokens"
SETTINGS: dict[str, Callable[[PreTrainedModel, str], LowkeyCache]] = {
    "full": lambda m, kept: lowkey.make_cache(m),
    "int8": lambda m, kept: lowkey.make_cache(m, bits=8),
    "int4": lambda m, kept: lowkey.make_cache(m, bits=4),
    "snapkv": lambda m, kept: lowkey.make_cache(m, policy=SnapKV(kept)),
    # its layers wait for one another
    "snapkv-global": lambda m, kept: lowkey.make_cache(m, policy=SnapKV(kept, "global")),
    "h2o": lambda m, kept: lowkey.make_cache(m, policy=H2O(kept)),
    "tova": lambda m, kept: lowkey.make_cache(m, policy=TOVA(kept)),
    "streamingllm": lambda m, kept: lowkey.make_cache(m, policy=StreamingLLM(kept)),
    "snapkv+int4": lambda m, kept: lowkey.make_cache(m, policy=SnapKV(kept, recent=32), bits=4),
}


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None,
    tokens: int = 32768,
    chunk: int = 2048,
    prompts: Annotated[int, typer.Option(help="hold so many prompts instead, each read at once")] = 0,
    settings: str = "full,int4,snapkv,snapkv-global,h2o,tova,streamingllm,snapkv+int4",
    kept: Annotated[str, typer.Option(help="the budget of a policy")] = KEPT,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if one:
        print(json.dumps(held(one, tokens, prompts, kept) if prompts else peak(one, tokens, chunk, kept)))
        return
    options = [*f"--tokens {tokens} --chunk {chunk} --prompts {prompts} --kept".split(), kept]
    rows = []
    for setting in settings.split(","):
        command = [sys.executable, __file__, *options, "--one", setting]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(rows[-1], flush=True)
    if out:
        files.write_json(out, {"environment": machine("cpu"), "rows": rows}, "benchmark", ours=True)


@torch.no_grad()
def peak(setting: str, tokens: int, chunk: int, kept: str) -> dict[str, Any]:
    """The figures of one prompt that is read chunk by chunk."""
    model = random_model(tokens)
    ids = prompt(0, tokens)
    read(model, SETTINGS[setting](model, kept), ids[:, :64], 64)
    before = trimmed()
    forget_peak()
    read(model, SETTINGS[setting](model, kept), ids[:, :chunk], chunk)
    first = highest() - before
    trimmed()
    forget_peak()
    start, cache = time.perf_counter(), SETTINGS[setting](model, kept)
    read(model, cache, ids, chunk)
    return {
        "setting": setting,
        "tokens": tokens,
        "chunk": chunk,
        "full_mib": full_cache(tokens),
        "held_mib": cache.nbytes() / 2**20,
        "one_chunk_mib": first,
        "peak_mib": highest() - before,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def held(setting: str, tokens: int, prompts: int, kept: str) -> dict[str, Any]:
    """The figures of several prompts that are held."""
    model = random_model(tokens)

    def filled(seed: int) -> LowkeyCache:
        cache = SETTINGS[setting](model, kept)
        read(model, cache, prompt(seed, tokens), tokens)
        return cache

    filled(0)
    before = trimmed()
    caches = [filled(seed) for seed in range(prompts)]
    plain = resident() - before
    return {
        "setting": setting,
        "tokens": tokens,
        "prompts": prompts,
        "full_mib": prompts * full_cache(tokens),
        "held_mib": sum(cache.nbytes() for cache in caches) / 2**20,
        "resident_mib": plain,
        "trimmed_mib": trimmed() - before,
    }


def random_model(positions: int) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(**SHAPE, vocab_size=VOCABULARY, max_position_embeddings=positions, eos_token_id=None)
    return lowkey.attach(LlamaForCausalLM(config).eval())


def prompt(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: PreTrainedModel, cache: LowkeyCache, ids: torch.Tensor, chunk: int) -> None:
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, logits_to_keep=1)


def full_cache(tokens: int) -> float:
    """MiB of the keys and values of a prompt in fp32."""
    width = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    return tokens * 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * width * 4 / 2**20


def resident() -> float:
    """MiB of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def trimmed() -> float:
    """As `resident`, once the C library has given back what it does not use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def forget_peak() -> None:
    """Let `highest` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def highest() -> float:
    """The most MiB that this process had since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    typer.run(main)
