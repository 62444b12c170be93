"""Pico models written as GGUF files, by the writer of llama.cpp's own package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = [*(chr(c) for c in range(33, 126)), "Ġ", "ĠĠ", "Ċ", "<|im_end|>"]  # of a byte-level vocabulary
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(
    path: Path, model: PreTrainedModel, kind: str = "F32", architecture: str = "llama", splits: str = "smollm"
) -> Path:
    """A Llama with its weights in blocks of `kind` (norms in F32) and a vocabulary of single characters and
    two blanks.
    """
    c = model.config
    file = gguf.GGUFWriter(path, architecture)
    file.add_name("pico")
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_rope_dimension_count(c.head_dim)
    file.add_rope_freq_base(c.rope_parameters["rope_theta"])
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_vocab_size(c.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(splits)
    file.add_token_list(TOKENS)
    file.add_token_types([1] * (len(TOKENS) - 1) + [3])
    file.add_token_merges(["Ġ Ġ"])
    file.add_eos_token_id(len(TOKENS) - 1)
    file.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        numbers = _halves_apart(name, weight, c).float().numpy()
        as_kind = gguf.GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
        file.add_tensor(
            _named(name), gguf.quantize(numbers, as_kind) if as_kind != 0 else numbers, raw_dtype=as_kind
        )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _named(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def _halves_apart(name: str, weight: torch.Tensor, c: PreTrainedConfig) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels where transformers rotates the two halves of a head."""
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight in blocks of this kind."""
    as_kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(
        np.array(gguf.dequantize(gguf.quantize(weight.float().numpy(), as_kind), as_kind))
    )
