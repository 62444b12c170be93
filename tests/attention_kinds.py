"""Small models of every kind of attention."""

from __future__ import annotations

import pico
import torch

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM

D, HEADS, HIDDEN = 8, 4, 32
MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
KINDS: dict[str, dict] = {
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
    "mla": {**MLA, "mla_kv_norm": False},
    "mla-0": {**MLA, "mla_kv_norm": False, "mla_latent_scale": True, "qk_rope_head_dim": 0},
    "lrkv-full": {"attention": "lrkv", "lrkv_rank": 3},
    "lrkv-latent": {
        "attention": "lrkv",
        "lrkv_rank": 4,
        "lrkv_rope_mode": "latent",
        "num_key_value_heads": 2,
    },
    "lrkv-partial": {"attention": "lrkv", "lrkv_rank": 3, "lrkv_rope_mode": "partial", "qk_rope_head_dim": 4},
    "lrkv-0": {"attention": "lrkv", "lrkv_rank": 0},
    "mea": {
        "attention": "mea",
        "num_key_value_heads": 4,
        "mea_num_component_heads": 3,
        "mea_hlc_init": "orthogonal",
    },
    "mea-grouped": {
        "attention": "mea",
        "num_key_value_heads": 2,
        "mea_num_component_heads": 2,
        "head_norm": "own",
    },
    "gta": {"attention": "gta", "num_key_value_heads": 2, "qk_rope_head_dim": 4},
    "gta-0": {"attention": "gta", "num_key_value_heads": 2, "qk_rope_head_dim": 0},
    "k_eq_v": {"attention": "k_eq_v", "num_key_value_heads": 2},
}


def own(seed: int = 0, **kind: object) -> LowkeyForCausalLM:
    """A model of our own in fp64, every parameter away from its starting value."""
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": pico.VOCAB,
        "head_dim": D,
    }
    config = LowkeyConfig(
        **{**shape, "num_attention_heads": HEADS, "rms_norm_eps": 1e-12, "bos_token_id": 1, **kind}
    )
    torch.manual_seed(seed)
    model = LowkeyForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
