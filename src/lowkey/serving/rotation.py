"""A model's rotary embedding from its config alone: engines hold weights in modules of their own."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowkey.models import families
from lowkey.models.families import Rope


def configured_rope(config: PreTrainedConfig, device: torch.device | str = "cpu") -> Rope:
    """The rotary embedding of the layers with full attention.

    Args:
        config: of the model.
        device: on which it computes.
    """
    small = copy.deepcopy(config)
    inner = small.get_text_config()
    # a model of one small layer rotates as the whole does
    inner.num_hidden_layers, inner.vocab_size, inner.pad_token_id = 1, 8, None
    if getattr(inner, "layer_types", None) is not None:
        inner.layer_types = ["full_attention"]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    return families.rope(model, 0)
