"""What a layer of attention takes, as formulas. Tests compare them with real tensors and with torch's
counter.

Conventions: 2 operations per multiply-accumulate (MAC), forward pass only; softmax, norms and rotations are
not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .configuration_lowkey import LowkeyConfig

MANY = 10**6  # stored tokens, for which a choice by operations is written into a formula


class Costs(NamedTuple):
    """Costs of one layer of attention.

    Args:
        parameters: trained numbers.
        stored: numbers stored per token.
        read: how many of them a decode step reads per stored token; twice where both products read them (a
            kernel that keeps a tile may read less).
        token: MACs per token when a whole text is read.
        pair: MACs per query token and visible token when a whole text is read.
        decode_token: MACs for one new token over a cache, independent of the cache, as `decode` has it.
        decode_pair: MACs for one new token per stored token.
    """

    parameters: int
    stored: int
    read: int
    token: int
    pair: int
    decode_token: int
    decode_pair: int

    def prefill_flops(self, tokens: int, causal: bool = True) -> int:
        """Operations to read a text.

        Args:
            tokens: tokens of the text.
            causal: count visible pairs only; otherwise all pairs, as a kernel that skips nothing computes.
        """
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        return 2 * (self.token * tokens + self.pair * pairs)

    def decode_flops(self, stored: int) -> int:
        """Operations for one new token, which is the last of `stored` tokens."""
        return 2 * (self.decode_token + self.decode_pair * stored)

    def bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes per token, with numbers of `itemsize` bytes."""
        return self.stored * itemsize


def projection_costs(config: LowkeyConfig, key_width: int, value_width: int) -> tuple[int, int]:
    """What all kinds have: queries, gate, head norm and output projection.

    Args:
        config: the configuration.
        key_width: dimensions of a query head.
        value_width: dimensions of a head's output.

    Returns:
        Parameters, and MACs per token.
    """
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank
    queries = hidden * rank + rank * heads * key_width if rank else hidden * heads * key_width
    out = heads * value_width * hidden
    macs = queries + out * (2 if config.attn_output_gate else 1)
    norms = (rank or 0) + (key_width if config.qk_norm else 0)
    norms += {"none": 0, "shared": value_width, "own": heads * value_width}[config.head_norm or "none"]
    biases = heads * key_width + hidden if config.attention_bias else 0
    return macs + norms + biases, macs


def model_parameters(config: LowkeyConfig, layers: Sequence[Costs]) -> int:
    """Trained numbers of the whole model.

    Args:
        config: the configuration.
        layers: costs of each layer.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    # SwiGLU has three matrices, and a block two norms
    block = 3 * hidden * wide + 2 * hidden + (2 * wide + hidden if config.mlp_bias else 0)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return sum(layer.parameters + block for layer in layers) + embeddings + hidden


def model_flops(config: LowkeyConfig, layers: Sequence[Costs], tokens: int) -> int:
    """Operations of one forward pass over one text, logits of all tokens included. Training takes three times
    as many.

    Args:
        config: the configuration.
        layers: costs of each layer.
        tokens: tokens of the text.
    """
    # the three matrices of SwiGLU, and the logits
    rest = (
        3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        + config.vocab_size * config.hidden_size
    )
    return sum(layer.prefill_flops(tokens) for layer in layers) + 2 * rest * tokens


def model_bytes_per_token(layers: Sequence[Costs], itemsize: int) -> int:
    """Cache bytes per token of all layers, with numbers of `itemsize` bytes."""
    return sum(layer.bytes_per_token(itemsize) for layer in layers)
