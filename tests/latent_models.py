"""Small models of the families that store one latent of each token and a key slice (MLA)."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowkey.models.families import LATENT

FAMILIES = LATENT
LAYERS, HEADS, LATENT_WIDTH, SLICE, UNROTATED, VALUE = 3, 4, 16, 8, 10, 12
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": LATENT_WIDTH,
    "q_lora_rank": 12,
    "qk_rope_head_dim": SLICE,
    "qk_nope_head_dim": UNROTATED,
    "v_head_dim": VALUE,
    "max_position_embeddings": 512,
}


def build(name: str, **fields: object) -> PreTrainedModel:
    """A fresh model of this family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **fields})).eval()
