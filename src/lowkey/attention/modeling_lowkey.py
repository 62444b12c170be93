"""Our causal language model: transformers' Llama decoder with an attention of its own in every layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .base import Attention
from .configuration_lowkey import LowkeyConfig
from .costs import Costs
from .gqa import GroupedQuery
from .gta import KeysAreValues, TiedAttention
from .lrkv import LowRankKV
from .mea import ExplicitAttention
from .mla import LatentAttention
from .parts import HeadNorm, OutputProjection
from .rotary import rotary

ATTENTION: dict[str, type[Attention]] = {
    "mha": GroupedQuery,
    "gqa": GroupedQuery,
    "mqa": GroupedQuery,
    "mla": LatentAttention,
    "lrkv": LowRankKV,
    "mea": ExplicitAttention,
    "gta": TiedAttention,
    "k_eq_v": KeysAreValues,
}


def costs(config: LowkeyConfig) -> Costs:
    """Costs of one layer's attention: of those in `attention_layers`, where that names some layers."""
    return ATTENTION[config.attention].costs(config)


def layer_costs(config: LowkeyConfig) -> list[Costs]:
    """Costs of the attention of every layer."""
    own, others = costs(config), config.others
    if others is None:
        return [own] * config.num_hidden_layers
    other = costs(others)
    return [own if i in (config.attention_layers or ()) else other for i in range(config.num_hidden_layers)]


class LowkeyDecoderLayer(LlamaDecoderLayer):
    """transformers' decoder layer with one of `ATTENTION`, and with norms that keep fp64."""

    self_attn: Any  # Llama's annotations allow only its own modules in these places
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()  # Llama's own would build its attention first
        self.hidden_size = config.hidden_size
        others = config.others
        if others is None or layer_idx in (config.attention_layers or ()):
            self.self_attn = ATTENTION[config.attention](config, layer_idx)
        else:
            self.self_attn = ATTENTION[others.attention](others, layer_idx)
            self.self_attn.whole = config
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LowkeyPreTrainedModel(LlamaPreTrainedModel):
    """What transformers must know about our models: configuration, initialisation and how to save them."""

    config_class = LowkeyConfig
    config: LowkeyConfig
    _no_split_modules = ["LowkeyDecoderLayer"]  # noqa: RUF012
    # Absorbed reading forms scores of its own, for which it needs the mask as a tensor.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": LowkeyDecoderLayer, "attentions": Attention}  # noqa: RUF012

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does. If the code goes beside the weights, the config names our class for each
        of the Auto classes.
        """
        if self._auto_class is not None:
            module = type(self).__module__.rpartition(".")[2]
            classes = {"AutoModel": "LowkeyModel", "AutoModelForCausalLM": "LowkeyForCausalLM"}
            known = {auto: f"{module}.{name}" for auto, name in classes.items()}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **known}
        super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Attention | HeadNorm | OutputProjection):
            module.initialize()


class LowkeyModel(LowkeyPreTrainedModel, LlamaModel):
    """The decoder without a language model head."""

    norm: Any  # Llama's annotation allows only its own

    def __init__(self, config: LowkeyConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LowkeyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary(config)
        self.gradient_checkpointing = False
        self.post_init()


class LowkeyForCausalLM(LowkeyPreTrainedModel, LlamaForCausalLM):
    """A causal language model whose `config.attention` says how it attends and what it stores."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LowkeyConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LowkeyModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
