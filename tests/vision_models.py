"""Small random models with a vision tower."""

from __future__ import annotations

import pico
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, TEXT_IDS = 96, 93  # the image's token; ids of text lie below the others that mean something
DECODER = {
    "vocab_size": pico.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WRAPPERS = {  # text decoder, vision tower, the rest
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
        {"model_type": "pixtral", "head_dim": 16},
        {"spatial_merge_size": 1},
    ),
    "llava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "projection_dim": 32},
        {"image_seq_length": 4},
    ),
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, **pico.MIXED},
        {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "boi_token_index": 94, "eoi_token_index": 95},
    ),
}


def seeing(kind):
    text, tower, rest = WRAPPERS[kind]
    config = AutoConfig.for_model(
        kind,
        text_config={**DECODER, **text},
        vision_config={**TOWER, **tower},
        image_token_index=IMAGE,
        **rest,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.12)
    return model
