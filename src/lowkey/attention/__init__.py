"""Attention that has a small cache by design: one field of the configuration chooses it, and one class
trains, generates and saves it.

    model = LowkeyForCausalLM(LowkeyConfig(attention="lrkv", lrkv_rank=24, ...))

`base` has what all kinds share, `parts` the modules that they are built of, `rotary` rotations. One file each
has a kind (`gqa`, `gta`, `lrkv`, `mea`, `mla`), `costs` counts what they take, and `modeling_lowkey` puts
them into Llama's decoder. transformers copies this folder beside a checkpoint, so it imports nothing of
lowkey, and siblings by relative imports only.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lowkey.attention.configuration_lowkey import ATTENTION_KINDS, GROUPED, SUBSETS, LowkeyConfig
from lowkey.attention.costs import Costs, model_bytes_per_token, model_flops, model_parameters
from lowkey.attention.modeling_lowkey import ATTENTION, LowkeyForCausalLM, LowkeyModel, costs, layer_costs


def register() -> None:
    """Tell transformers' Auto classes about our model type, and let `save_pretrained` put this code beside
    the weights.

    Importing lowkey does not do this; commands and loaders call it.
    """
    AutoConfig.register(LowkeyConfig.model_type, LowkeyConfig, exist_ok=True)
    AutoModel.register(LowkeyConfig, LowkeyModel, exist_ok=True)
    AutoModelForCausalLM.register(LowkeyConfig, LowkeyForCausalLM, exist_ok=True)
    LowkeyConfig.register_for_auto_class()
    LowkeyModel.register_for_auto_class("AutoModel")
    LowkeyForCausalLM.register_for_auto_class("AutoModelForCausalLM")


__all__ = [
    "ATTENTION",
    "Costs",
    "GROUPED",
    "ATTENTION_KINDS",
    "LowkeyConfig",
    "LowkeyForCausalLM",
    "LowkeyModel",
    "SUBSETS",
    "costs",
    "layer_costs",
    "model_bytes_per_token",
    "model_flops",
    "model_parameters",
    "register",
]
