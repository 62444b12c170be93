"""What large shapes take at 128k tokens, by the arithmetic of `lowkey cost`: nothing is measured.

    python benchmarks/scale.py          # writes docs/results/scale.json

The shapes are written down here by hand, from the configs that their makers published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoConfig, PreTrainedConfig

from lowkey.attention import LowkeyConfig, register
from lowkey.core.gpus import GPUS, Gpu
from lowkey.core.stored_setting import EXPANDED, parse_settings
from lowkey.planner.floor import Workload, floor_of, stored_bytes
from lowkey.policies import POLICIES
from lowkey.storage.packing import SCHEMES

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "scale.json"
CONTEXT, DTYPE = 131_072, torch.bfloat16
SETTINGS = "full,int8,int4,kivi4,kivi2,rank:50%,rank:50%+kivi4,snapkv:10%,snapkv:25%+int4"
LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": CONTEXT,
}
# model type and fields of the config
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", {**LLAMA, "num_key_value_heads": 8}),
    "Qwen3-32B": (
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 5120,
            "intermediate_size": 25_600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            # with YaRN, as its card describes it; without, it has 40,960 positions
            "max_position_embeddings": CONTEXT,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "vocab_size": 129_280,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "max_position_embeddings": 163_840,
        },
    ),
}
# where each runs: GPU, number of GPUs, bits of a weight (None: those of bfloat16), settings
PLACES: dict[str, tuple[str, int, float | None, str]] = {
    "Llama-3.1-8B": ("h200", 1, None, SETTINGS),
    "Qwen3-32B": ("h200", 1, None, SETTINGS),
    # published in 8 bits, with a scale of 32 bits for each block of 128 x 128 weights
    "DeepSeek-V3": ("h200", 8, 8 + 32 / 128**2, f"full,{EXPANDED}"),
}
# attention kinds of lowkey in the shape of Llama-3.1-8B
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"attention": "mha"},
    "gqa, 8 KV heads": {"attention": "gqa", "num_key_value_heads": 8},
    "gta, 8 KV heads": {"attention": "gta", "num_key_value_heads": 8},
    "k_eq_v, 8 KV heads": {"attention": "k_eq_v", "num_key_value_heads": 8},
    "mqa": {"attention": "mqa"},
    "mla, latent of 512": {"attention": "mla", "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "lrkv, rank 24": {"attention": "lrkv", "lrkv_rank": 24},
    "lrkv, rank 8, latent": {"attention": "lrkv", "lrkv_rank": 8, "lrkv_rope_mode": "latent"},
    "mea, 8 component heads": {"attention": "mea", "mea_num_component_heads": 8},
}


def shape_config(name: str) -> PreTrainedConfig:
    """The config of a shape of SHAPES."""
    kind, fields = SHAPES[name]
    return AutoConfig.for_model(kind, **fields)


def kind_config(name: str) -> LowkeyConfig:
    """The config of a kind of KINDS."""
    return LowkeyConfig(**{**LLAMA, "head_dim": 128, **KINDS[name]})


def rows_of(config: PreTrainedConfig, settings: str, gpu: Gpu, weight_bits: float | None) -> list[dict]:
    """A row for each setting: with one sequence, and with as many as fit (`full_`)."""
    alone = Workload(config, DTYPE, CONTEXT, 1, weight_bits)
    rows = []
    for setting in parse_settings(settings, list(SCHEMES), list(POLICIES), (EXPANDED,)):
        stored = [stored_bytes(alone, setting)]
        told = floor_of(alone, stored, gpu)
        row = {"setting": setting.text, **told["rows"][0], "parameters": told["parameters"]}
        row |= {name: told[name] for name in ("weights_bytes", "weights_read_bytes")}
        if fits := row["sequences_that_fit"]:
            crowded = floor_of(Workload(config, DTYPE, CONTEXT, fits, weight_bits), stored, gpu)["rows"][0]
            row |= {f"full_{name}": crowded[name] for name in ("step_ms", "tokens_per_second")}
        rows.append(row)
    for row in rows:
        row["share_of_first"] = row["sequence_bytes"] / rows[0]["sequence_bytes"]
    return rows


def counted() -> dict[str, Any]:
    """What the file holds."""
    register()
    found: dict[str, Any] = {"format": 1, "context": CONTEXT, "dtype": "bfloat16", "shapes": {}, "kinds": []}
    for name, (card, count, bits, settings) in PLACES.items():
        gpu = Gpu(card, GPUS[card].gib, GPUS[card].gbs, count)
        rows = rows_of(shape_config(name), settings, gpu, bits)
        found["shapes"][name] = {"gpu": card, "gpus": count, "weight_bits": bits or 16, "rows": rows}
    for name in KINDS:
        (row,) = rows_of(kind_config(name), "full", GPUS["h200"], None)
        found["kinds"].append({**row, "setting": name})
    first = found["kinds"][0]["sequence_bytes"]
    for row in found["kinds"]:
        row["share_of_first"] = row["sequence_bytes"] / first
    return found


def main() -> None:
    """Write docs/results/scale.json."""
    OUT.write_text(json.dumps(counted(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
