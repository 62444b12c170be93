"""Models of lowkey.attention, through their own modules and as plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import (
    MEMORY,
    Answers,
    asked,
    check_same,
    engine,
    forked,
    imported,
    of_our_cache,
    prompts,
    served,
)
from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, layer_costs, register
from lowkey.models.families import plain_architecture
from lowkey.models.loading import load_tokenizer

D, HEADS = 32, 4
KINDS: dict[str, dict] = {
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa", "qk_norm": True},
    "mla": {"attention": "mla", "kv_lora_rank": 48, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16},
    "lrkv": {"attention": "lrkv", "lrkv_rank": 6},
    "lrkv-latent": {
        "attention": "lrkv",
        "lrkv_rank": 8,
        "lrkv_rope_mode": "latent",
        "num_key_value_heads": 2,
    },
    "mea": {"attention": "mea", "num_key_value_heads": 4, "mea_num_component_heads": 3},
    "gta": {"attention": "gta", "num_key_value_heads": 2, "qk_rope_head_dim": 16},
    "k_eq_v": {"attention": "k_eq_v", "num_key_value_heads": 2, "qk_rope_head_dim": 16},
    "gated": {"attention": "gqa", "num_key_value_heads": 2, "attn_output_gate": True},
}


def saved(folder: Path, kind: str) -> tuple[Path, LowkeyConfig]:
    register()
    torch.manual_seed(0)
    config = LowkeyConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        head_dim=D,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **KINDS[kind],
    )
    LowkeyForCausalLM(config).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder, config


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_models(tmp_path, kind):
    """Those that are plain ones run on vLLM's kernel, as `lowkey serve` starts them."""
    folder, config = saved(tmp_path / "model", kind)
    plain = plain_architecture(config)
    settings = {"hf_overrides": {"architectures": [plain]}} if plain else {}
    given = prompts(7, 21, 200, 40)
    answers = served(folder, given, max_num_batched_tokens=96, max_num_seqs=8, **settings)
    check_same(answers, of_our_cache(folder, given))
    assert answers.blocks == MEMORY // (128 * 4 * sum(cost.stored for cost in layer_costs(config)))
    assert (plain is not None) == (kind in ("gqa", "mqa"))


@pytest.mark.parametrize("kind", ["mla", "lrkv", "mea", "gta", "k_eq_v"])
def test_our_own_models_are_preempted_and_share_prefixes(tmp_path, kind):
    """With torch.compile allowed. Of 13 pages, three prompts take 12, and their answers do not fit."""
    folder, config = saved(tmp_path / "model", kind)
    token_bytes = 4 * sum(cost.stored for cost in layer_costs(config))
    given, shared = prompts(*[120] * 5), prompts(96, seed=1)[0]
    late = [[*shared, 5, 6], [*shared, 7, 8, 9]]

    def run():
        llm = engine(
            folder,
            enforce_eager=False,
            block_size=32,
            kv_cache_memory_bytes=13 * 32 * token_bytes,
            max_model_len=256,
        )
        return [asked(llm, given), *(asked(llm, [ids]) for ids in late)]

    imported()
    together, first, second = (Answers(*answers) for answers in forked(run))
    assert together.blocks == 13 and together.preemptions > 0 and second.cached == [96]
    for answers, ids in ((together, given), (first, late[:1]), (second, late[1:])):
        check_same(answers, of_our_cache(folder, ids))
