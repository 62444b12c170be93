"""How many parameters a decoder has, from its config alone: nothing is built and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from lowkey.attention import layer_costs, model_parameters
from lowkey.models import families


@dataclass(frozen=True)
class Parameters:
    """The parameters of a decoder.

    Buffers, such as the frequencies of rotations, are not counted, and neither are layers beside the decoder,
    such as those that predict further tokens (MTP).

    Args:
        total: all of them. A matrix that serves as embedding and as output counts once.
        looked_up: those of an embedding that is not the output, too. A step reads one row of it for a token.
        experts: those of all routed experts.
        experts_used: the share of a layer's experts that one token is routed to.
    """

    total: int
    looked_up: int = 0
    experts: int = 0
    experts_used: float = 1.0

    def read(self, tokens: int) -> float:
        """The parameters that a decode step reads.

        Every matrix is read once for all tokens. The experts of a layer are those that at least one token is
        routed to, in the mean over tokens that choose evenly and independently.

        Args:
            tokens: new tokens of the step, one for each sequence.
        """
        idle = (1 - self.experts_used) ** tokens
        return self.total - self.looked_up - idle * self.experts


def count_parameters(config: PreTrainedConfig) -> Parameters:
    """The parameters of a model with this config.

    Raises:
        LowkeyError: for a family that is neither supported nor one of `families.LATENT`.
    """
    config = config.get_text_config()
    embedding = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else embedding
    if families.is_own(config):
        own: Any = config
        return Parameters(model_parameters(own, layer_costs(own)), looked_up)
    outside = embedding + looked_up + config.hidden_size  # with the last norm
    if not families.stores_latents(config):
        layer = _grouped_attention(config) + _mlp(config, config.intermediate_size)
        norms = families.family(config).block_norms * config.hidden_size
        return Parameters(config.num_hidden_layers * (layer + norms) + outside, looked_up)
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    routing = config.num_hidden_layers - dense
    experts = config.n_routed_experts * _mlp(config, config.moe_intermediate_size, biased=False)
    router = config.n_routed_experts * config.hidden_size
    shared = _mlp(config, config.moe_intermediate_size * config.n_shared_experts)
    total = (
        outside
        + config.num_hidden_layers * (_latent_attention(config) + 2 * config.hidden_size)
        + dense * _mlp(config, config.intermediate_size)
        + routing * (experts + router + shared)
    )
    used = config.num_experts_per_tok / config.n_routed_experts
    return Parameters(total, looked_up, routing * experts, used)


def _grouped_attention(config: Any) -> int:
    """Attention whose query heads share KV heads, with the norms of queries and keys."""
    family, d = families.family(config), families.head_dim(config)
    queries, stored = config.num_attention_heads * d, families.stored_heads(config) * d
    matrices = config.hidden_size * (2 * queries + 2 * stored)
    biased = _asks_for(config, "attention_bias")
    biases = (queries + 2 * stored if biased or family.biased else 0) + (config.hidden_size if biased else 0)
    norms = (queries + stored if family.norm_spans_heads else 2 * d) if family.normed else 0
    return matrices + biases + norms


def _latent_attention(config: Any) -> int:
    """Attention over one latent of each token and a key slice that all heads share (arXiv:2405.04434)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    rank, latent = config.q_lora_rank, config.kv_lora_rank
    query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    query = hidden * query_width if rank is None else hidden * rank + rank + rank * query_width
    down = hidden * (latent + config.qk_rope_head_dim) + latent
    up = latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    out = heads * config.v_head_dim * hidden
    biases = (rank or 0) + latent + config.qk_rope_head_dim + hidden
    return query + down + up + out + (biases if _asks_for(config, "attention_bias") else 0)


def _mlp(config: Any, width: int, biased: bool = True) -> int:
    """A gated MLP. biased: whether it has the biases that the config may ask for."""
    hidden = config.hidden_size
    biases = 2 * width + hidden if biased and _asks_for(config, "mlp_bias") else 0
    return 3 * hidden * width + biases


def _asks_for(config: Any, field: str) -> bool:
    """Whether a flag is set that the config's class has; a family without the flag ignores it."""
    return hasattr(type(config), field) and bool(getattr(config, field))
