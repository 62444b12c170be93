"""Attention with a small cache from birth: a training step of every kind against MHA's, and a decoding step
over a long cache.

    python benchmarks/attention.py [OUT.json] [--rounds 7 --stored 4096 --repeats 25]

Times are seconds of processor time of one thread, so that others on the machine stretch them less. All rows
of a table took turns in one run; each share is the median over rounds of this round's time over MHA's
(training) or over the first row's (decoding).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, costs
from lowkey.core.files import write_json

SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 344,
    "vocab_size": 1024,
}
KINDS: dict[str, dict[str, Any]] = {  # at half of MHA's cache where the kind has a choice
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 4},
    "mqa": {"attention": "mqa"},
    "mla": {"attention": "mla", "kv_lora_rank": 120, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "mla 1/4": {"attention": "mla", "kv_lora_rank": 56, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "lrkv full": {"attention": "lrkv", "lrkv_rank": 6},
    "lrkv latent": {"attention": "lrkv", "lrkv_rank": 6, "lrkv_rope_mode": "latent"},
    "lrkv partial": {"attention": "lrkv", "lrkv_rank": 6, "lrkv_rope_mode": "partial"},
    "mea 8 of 8": {"attention": "mea"},
    "mea 4 of 8": {"attention": "mea", "mea_num_component_heads": 4},
    "gta": {"attention": "gta", "num_key_value_heads": 4},
    "k_eq_v": {"attention": "k_eq_v", "num_key_value_heads": 8},
}
WIDE = {
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "vocab_size": 64,
}
LATENTS = {
    "attention": "mla",
    "kv_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
LOW_RANK = {"attention": "lrkv", "lrkv_rank": 24}
READERS: dict[str, dict[str, Any]] = {
    "mha": {"attention": "mha"},
    "gqa, 4 heads": {"attention": "gqa", "num_key_value_heads": 4},
    "mla absorbed": {**LATENTS, "decode": "absorbed"},
    "mla expanded": {**LATENTS, "decode": "expanded"},
    "lrkv latent absorbed": {**LOW_RANK, "lrkv_rope_mode": "latent", "decode": "absorbed"},
    "lrkv latent expanded": {**LOW_RANK, "lrkv_rope_mode": "latent", "decode": "expanded"},
    "lrkv partial absorbed": {**LOW_RANK, "lrkv_rope_mode": "partial", "decode": "absorbed"},
    "lrkv partial expanded": {**LOW_RANK, "lrkv_rope_mode": "partial", "decode": "expanded"},
    "lrkv full, values absorbed": LOW_RANK,
    "lrkv full, expanded": {**LOW_RANK, "decode": "expanded"},
    "mea 4 of 8 absorbed": {"attention": "mea", "mea_num_component_heads": 4, "decode": "absorbed"},
    "mea 4 of 8 expanded": {"attention": "mea", "mea_num_component_heads": 4, "decode": "expanded"},
    "gta, 4 heads": {"attention": "gta", "num_key_value_heads": 4},
    "k_eq_v, 4 heads": {"attention": "k_eq_v", "num_key_value_heads": 4},
}


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None,
    rounds: int = 7,
    tokens: int = 256,
    rows: int = 8,
    stored: int = 4096,
    repeats: int = 25,
) -> None:
    """Print Markdown tables, write JSON."""
    torch.set_num_threads(1)
    trained = [training(dtype, rounds, rows, tokens) for dtype in ("float32", "bfloat16")]
    decoded = [decoding(batch, stored, repeats) for batch in (1, 4)]
    if out:
        write_json(out, {"training": trained, "decoding": decoded}, "benchmark", ours=True)


def turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        # none always after the same other
        for name, step in random.Random(number).sample(list(steps.items()), len(steps)):
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def share(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, least and most over rounds of a step's time over the base's."""
    of = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(of), min(of), max(of)


def training(dtype: str, rounds: int, rows: int, tokens: int) -> dict[str, Any]:
    """Forward, backward and AdamW at equal width; bfloat16: under autocast."""
    text = torch.randint(SMALL["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(0))
    models = {name: model_of(kind, SMALL, tie_word_embeddings=True).train() for name, kind in KINDS.items()}
    steps = {name: trainer(model, text, dtype) for name, model in models.items()}
    seconds = turns(steps, rounds)
    print(
        f"\ntraining, {dtype}, {rows} x {tokens} tokens a step\n\n| kind | parameters | tokens/s | of MHA's "
        "time | least, most |"
    )
    print("|---|---|---|---|---|")
    found = {}
    for name, model in models.items():
        middle, least, most = share(seconds[name], seconds["mha"])
        speed = rows * tokens / statistics.median(seconds[name])
        found[name] = {
            "parameters": model.num_parameters(),
            "tokens_per_second": speed,
            "of_mha": middle,
            "least": least,
            "most": most,
        }
        print(
            f"| {name} | {model.num_parameters()} | {speed:.0f} | {middle:.2f} | {least:.2f}, {most:.2f} |",
            flush=True,
        )
    return {"dtype": dtype, "rows": rows, "tokens": tokens, "rounds": rounds, "kinds": found}


def trainer(model: LowkeyForCausalLM, text: Tensor, dtype: str) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(text, labels=text, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def decoding(batch: int, stored: int, repeats: int) -> dict[str, Any]:
    """One layer's attention for one new token over `stored` tokens in fp32; what appending to the cache costs
    is in it.
    """
    models = {name: model_of(kind, WIDE).eval() for name, kind in READERS.items()}
    steps = {name: reader(model, batch, stored) for name, model in models.items()}
    seconds = turns(steps, repeats)
    print(
        f"\ndecoding, one layer, batch {batch}, {stored} stored tokens\n\n| kind | ms | of MHA's time | "
        "least, most | KiB stored a row |"
    )
    print("|---|---|---|---|---|")
    found = {}
    for name, model in models.items():
        middle, least, most = share(seconds[name], seconds["mha"])
        held = costs(model.config).bytes_per_token(4) * stored
        ms = 1e3 * statistics.median(seconds[name])
        found[name] = {"ms": ms, "of_mha": middle, "least": least, "most": most, "stored_bytes_per_row": held}
        print(
            f"| {name} | {ms:.2f} | {middle:.2f} | {least:.2f}, {most:.2f} | {held / 1024:.0f} |", flush=True
        )
    return {"batch": batch, "stored": stored, "repeats": repeats, "kinds": found}


def reader(model: LowkeyForCausalLM, batch: int, stored: int) -> Callable[[], object]:
    """A step that answers one token over a cache of random numbers and takes it back."""
    layer, past = model.model.layers[0].self_attn, DynamicCache(config=model.config)
    hidden, positions = torch.randn(batch, 1, model.config.hidden_size), torch.full((batch, 1), stored - 1)
    rope = model.model.rotary_emb(hidden, positions)
    layer(hidden, rope, past_key_values=past, position_ids=positions)
    shapes = [part.shape for part in (past.layers[0].keys, past.layers[0].values)]
    keys, values = (torch.randn(*shape[:2], stored - 1, shape[3]) for shape in shapes)

    def step() -> None:
        past.layers[0].keys, past.layers[0].values = keys, values
        layer(hidden, rope, past_key_values=past, position_ids=positions)

    return step


def model_of(kind: dict[str, Any], shape: dict[str, int], **more: object) -> LowkeyForCausalLM:
    torch.manual_seed(0)
    return LowkeyForCausalLM(
        LowkeyConfig(**shape, **kind, **more, max_position_embeddings=8192, pad_token_id=0)
    )


if __name__ == "__main__":
    typer.run(main)
