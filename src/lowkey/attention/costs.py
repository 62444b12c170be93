"""What a layer of attention takes, as formulas; the tests hold them against real tensors and torch's counter.

Conventions: 2 operations per multiply-accumulate (MAC), forward only; softmax, norms and rotations are not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .configuration_lowkey import LowkeyConfig

MANY = 10**6  # stored tokens, for which a choice by operations is written into a formula


class Costs(NamedTuple):
    """One layer of attention.

    parameters: numbers trained. stored: numbers kept per token. read: how many of them a decoding step reads
    per stored token, twice where both products read them (a kernel that keeps a tile may read less). token,
    pair: MACs per token, and per query token and visible token, when a whole text is read. decode_token,
    decode_pair: the same for one new token over a cache, as `decode` has it.
    """

    parameters: int
    stored: int
    read: int
    token: int
    pair: int
    decode_token: int
    decode_pair: int

    def prefill_flops(self, tokens: int, causal: bool = True) -> int:
        """Reading `tokens` tokens; `causal` counts visible pairs only, else all of them, as kernels without
        skipping do.
        """
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        return 2 * (self.token * tokens + self.pair * pairs)

    def decode_flops(self, stored: int) -> int:
        """One new token, which is the last of `stored`."""
        return 2 * (self.decode_token + self.decode_pair * stored)

    def bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes per token in numbers of `itemsize` bytes."""
        return self.stored * itemsize


def projection_costs(config: LowkeyConfig, key_width: int, value_width: int) -> tuple[int, int]:
    """(parameters, MACs per token) of queries, gate, head norm and output projection, which all variants
    have.
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
    """Numbers trained in the whole model, of the layers' costs."""
    hidden, wide = config.hidden_size, config.intermediate_size
    block = 3 * hidden * wide + 2 * hidden + (2 * wide + hidden if config.mlp_bias else 0)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return sum(layer.parameters + block for layer in layers) + embeddings + hidden


def model_flops(config: LowkeyConfig, layers: Sequence[Costs], tokens: int) -> int:
    """One forward pass over `tokens` tokens of one text, logits of all of them included. Training takes three
    times as many.
    """
    rest = (
        3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        + config.vocab_size * config.hidden_size
    )
    return sum(layer.prefill_flops(tokens) for layer in layers) + 2 * rest * tokens


def model_bytes_per_token(layers: Sequence[Costs], itemsize: int) -> int:
    """Cache bytes per token of all layers, in numbers of `itemsize` bytes."""
    return sum(layer.bytes_per_token(itemsize) for layer in layers)
