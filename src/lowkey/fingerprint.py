"""Short names for models and texts, so that a plan cannot be used with others."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLE = 1024  # numbers per tensor: enough to notice any fine-tuning, cheap for 70 B parameters
SHAPES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 of the shapes in the config, of evenly spaced numbers of every weight, rounded to bfloat16, and of which adapters are active.

    Rounding makes a model loaded in float32 and in bfloat16 the same model.
    """
    config = model.config.get_text_config()
    digest = hashlib.sha256(repr([getattr(config, name, None) for name in SHAPES]).encode())
    wrapped: list[Any] = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")]
    if wrapped:  # peft's layers, whose adapters may be switched
        digest.update(repr(sorted({(tuple(m.active_adapters), bool(m.disable_adapters)) for m in wrapped})).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def data_fingerprint(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
