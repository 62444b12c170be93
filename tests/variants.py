"""Pico models of every attention kind that trains with a small cache.

2 layers, hidden 24, 4 heads of 8, vocabulary 97, fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM

VOCAB, HIDDEN, HEADS, HEAD_DIM, LAYERS = 97, 24, 4, 8, 2
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LRKV = {"attention": "lrkv", "lrkv_rank": 4}
EVERY_CONTROL = {"qk_norm": True, "attn_output_gate": True, "head_norm": "own", "q_lora_rank": 10}
VARIANTS: dict[str, dict] = {
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
    "gqa-controls": {"attention": "gqa", "num_key_value_heads": 2, **EVERY_CONTROL},
    "gqa-bias": {"attention": "gqa", "num_key_value_heads": 2, "attention_bias": True},
    "mla": MLA,
    "mla-expanded": {**MLA, "decode": "expanded"},
    "mla-absorbed": {**MLA, "decode": "absorbed"},
    "mla-narrow": {**MLA, "kv_lora_rank": 4},  # fewer operations absorbed, even for a whole text
    "mla-scaled": {**MLA, "mla_latent_scale": True, "q_lora_rank": 10},
    "mla-bias": {**MLA, "attention_bias": True},
    "mla-bias-absorbed": {**MLA, "attention_bias": True, "decode": "absorbed"},
    "mla-nope": {**MLA, "mla_rotate": False},
    "mla-no-slice": {**MLA, "qk_rope_head_dim": 0},
    "lrkv-full": LRKV,
    "lrkv-full-2-norm": {**LRKV, "num_key_value_heads": 2, "qk_norm": True},
    "lrkv-full-expanded": {**LRKV, "num_key_value_heads": 2, "decode": "expanded"},
    "lrkv-latent": {**LRKV, "lrkv_rope_mode": "latent"},
    "lrkv-latent-2-norm": {**LRKV, "lrkv_rope_mode": "latent", "num_key_value_heads": 2, "qk_norm": True},
    "lrkv-latent-absorbed": {
        **LRKV,
        "lrkv_rope_mode": "latent",
        "num_key_value_heads": 2,
        "decode": "absorbed",
    },
    "lrkv-latent-expanded": {**LRKV, "lrkv_rope_mode": "latent", "decode": "expanded"},
    "lrkv-partial": {**LRKV, "lrkv_rope_mode": "partial"},
    "lrkv-partial-2-norm": {**LRKV, "lrkv_rope_mode": "partial", "num_key_value_heads": 2, "qk_norm": True},
    "lrkv-partial-absorbed": {
        **LRKV,
        "lrkv_rope_mode": "partial",
        "num_key_value_heads": 2,
        "decode": "absorbed",
    },
    "lrkv-partial-expanded": {**LRKV, "lrkv_rope_mode": "partial", "decode": "expanded"},
    "lrkv-nothing": {"attention": "lrkv", "lrkv_rank": 0, "num_key_value_heads": 2},
    "mea": {"attention": "mea"},
    "mea-grouped": {"attention": "mea", "num_key_value_heads": 2, "qk_norm": True},
    "mea-fewer": {"attention": "mea", "mea_num_component_heads": 3},
    "mea-fewer-absorbed": {"attention": "mea", "mea_num_component_heads": 3, "decode": "absorbed"},
    "mea-fewer-expanded": {"attention": "mea", "mea_num_component_heads": 3, "decode": "expanded"},
    "mea-fewer-grouped": {"attention": "mea", "num_key_value_heads": 2, "mea_num_component_heads": 1},
    "mea-orthogonal": {
        "attention": "mea",
        "mea_num_component_heads": 2,
        "mea_hlc_init": "orthogonal",
        "qk_norm": True,
    },
    "gta": {"attention": "gta", "num_key_value_heads": 2, "qk_norm": True},
    "gta-no-slice": {"attention": "gta", "num_key_value_heads": 2, "qk_rope_head_dim": 0},
    "mea-some": {
        "attention": "mea",
        "num_key_value_heads": 2,
        "mea_num_component_heads": 1,
        "attention_layers": [0],
    },
    "lrkv-some": {**LRKV, "attention_layers": [0], "other_attention": MLA},
    "mla-some": {
        **MLA,
        "attention_layers": [0],
        "other_attention": {**LRKV, "lrkv_rope_mode": "latent", "num_key_value_heads": 2},
    },
    "k_eq_v": {"attention": "k_eq_v", "num_key_value_heads": 2},
    "k_eq_v-partial": {
        "attention": "k_eq_v",
        "num_key_value_heads": 2,
        "qk_rope_head_dim": 4,
        "qk_norm": True,
    },
}
ONE_OF_EACH = [
    "mha",
    "gqa-controls",
    "mla",
    "lrkv-full-2-norm",
    "lrkv-latent",
    "lrkv-partial",
    "mea-grouped",
    "mea-fewer",
    "gta",
    "k_eq_v",
]
UNROTATED = ["mla-nope", "mla-no-slice", "gta-no-slice"]


def config(name: str, **overrides: object) -> LowkeyConfig:
    """The configuration of a variant."""
    return LowkeyConfig(**{**SHAPE, **VARIANTS[name], **overrides})


def build(name: str, seed: int = 0, **overrides: object) -> LowkeyForCausalLM:
    """A fresh model; what starts at one or zero is moved, so that a weight left out would show."""
    torch.manual_seed(seed)
    model = LowkeyForCausalLM(config(name, **overrides)).double().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def ids(length: int = 12, batch: int = 2, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: LowkeyForCausalLM, tokens: Tensor, **kwargs: object) -> Tensor:
    """Logits without a cache."""
    return model(tokens, use_cache=False, **kwargs).logits


def empty_cache(kind: str, model: LowkeyForCausalLM) -> Cache:
    """transformers' static or dynamic cache for the model."""
    return (
        StaticCache(model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)
    )


def attention(model: LowkeyForCausalLM, layer: int = 0) -> nn.Module:
    """The attention module of a layer."""
    return model.model.layers[layer].self_attn


@torch.no_grad()
def alone(
    model: LowkeyForCausalLM, hidden: Tensor, positions: Tensor | None = None, layer: int = 0
) -> Tensor:
    """One layer's attention over a whole text: (b, t, D) -> (b, t, D)."""
    positions = torch.arange(hidden.shape[1])[None] if positions is None else positions
    rope = model.model.rotary_emb(hidden, positions)
    return attention(model, layer)(hidden, rope, position_ids=positions)[0]


def hidden(length: int = 10, batch: int = 2, seed: int = 0) -> Tensor:
    """Random hidden states (batch, length, hidden)."""
    return torch.randn(
        batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def share(source: LowkeyForCausalLM, target: LowkeyForCausalLM) -> LowkeyForCausalLM:
    """`target` with all weights of `source` that it has too, by name and shape."""
    own = target.state_dict()
    common = {
        name: w for name, w in source.state_dict().items() if name in own and own[name].shape == w.shape
    }
    target.load_state_dict(common, strict=False)
    return target


def put(weight: Tensor, value: Tensor) -> None:
    """Overwrite a weight."""
    with torch.no_grad():
        weight.copy_(value)
