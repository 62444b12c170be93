"""Random pico models of every family, built in milliseconds.

3 layers, hidden 64, head dim 16, vocabulary 97.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lowkey
from lowkey.cache.cache import LowkeyCache, cache_of
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import Factors, Layout
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan, versions
from lowkey.policies.base import Policy
from lowkey.policies.gates import Gates
from lowkey.storage.codec import LowRank, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact
from lowkey.storage.packing import PerToken

VOCAB, LAYERS, HIDDEN, HEAD_DIM = 97, 3, 64, 16
WINDOW = 16  # of the sliding layers, shorter than the prompts used here
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": HEAD_DIM}
DERIVED_WIDTH = {"num_attention_heads": 4, "num_key_value_heads": 2}  # head_dim is hidden size / heads
DIFFERENCES: dict[str, dict] = {  # what a family's configuration needs besides sizes
    "llama": HEADS,
    "mistral": {**HEADS, "sliding_window": None},
    "qwen2": DERIVED_WIDTH,
    "qwen3": HEADS,
    "phi3": {**DERIVED_WIDTH, "pad_token_id": 0},
    "gemma2": {**HEADS, **MIXED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**HEADS, **MIXED, "query_pre_attn_scalar": 16},
    "granite": {
        **DERIVED_WIDTH,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "olmo2": DERIVED_WIDTH,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),  # cos and sin are scaled
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}
NAMES = [*families.FAMILIES, *VARIANTS]
SMALL = ("smallkv", "smallkv-tokens")  # policies that have a small model read along
# policies that a call of the model alone does not serve: a second pass, the right answer, a small model
UNFED = ("kvzip", "attention-matching", "oracle", *SMALL)


def build(name: str, **overrides: object) -> PreTrainedModel:
    """A fresh model; the same name gives the same weights."""
    kind, extra = VARIANTS.get(name, (name, {}))
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 512,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.15}
    config = AutoConfig.for_model(kind, **{**shape, **ids, **DIFFERENCES[kind], **extra, **overrides})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def stock(name: str) -> PreTrainedModel:
    """Shared: transformers' own eager attention."""
    model = build(name)
    model.set_attn_implementation("eager")
    return model


@cache
def attached(name: str) -> PreTrainedModel:
    """Shared: the same weights with our attention function."""
    return lowkey.attach(build(name))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: <s> and the 95 printable ASCII characters and the newline, in their byte-level
    form.
    """
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [pre.pre_tokenize_str(chr(c))[0][0] for c in (10, *range(32, 127))]
    vocab = {token: i for i, token in enumerate(["<s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def save(folder: Path, name: str = "llama", **overrides: object) -> Path:
    """A folder that `from_pretrained` reads: a pico model and the tokenizer."""
    for part in (build(name, **overrides), tokenizer()):
        part.save_pretrained(folder)
    return folder


def prompt(length: int = 40, batch: int = 2, seed: int = 0) -> Tensor:
    """Random token ids (batch, length) without id 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- factors


def orthonormal(heads: int, rank: int, seed: int) -> Tensor:
    """Random (h, d, rank) with orthonormal columns."""
    square = torch.randn(heads, HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square).Q[..., :rank]


def factors(
    heads: int, rank_k: int = HEAD_DIM, rank_v: int = HEAD_DIM, seed: int = 0, shared: bool = False
) -> Factors:
    """Random orthonormal factors of one layer."""
    k, v = (orthonormal(1 if shared else heads, r, 2 * seed + i) for i, r in enumerate((rank_k, rank_v)))
    return Factors(k, k.mT, v, v.mT)


def merged_factors(heads: int, rank_k: int, rank_v: int, t_k: int, t_v: int, seed: int = 0) -> Factors:
    """Random orthonormal maps of t_k and of t_v heads together, their order shuffled, means taken off."""
    generator = torch.Generator().manual_seed(seed)

    def side(t: int, r: int) -> tuple[Tensor, Tensor]:
        width = t * HEAD_DIM
        down = (
            torch.linalg.qr(torch.randn(heads // t, width, width, generator=generator))
            .Q[..., : t * r]
            .contiguous()
        )
        return down, per_head_maps(down.mT, t).contiguous()

    means = (torch.randn(heads, HEAD_DIM, generator=generator) for _ in range(2))
    return Factors(*side(t_k, rank_k), *side(t_v, rank_v), torch.randperm(heads, generator=generator), *means)


def layer_factors(
    model: PreTrainedModel, rank_k: int = HEAD_DIM, rank_v: int = HEAD_DIM, shared: bool = False
) -> dict[int, Factors]:
    """Other factors in every compressible layer."""
    shape = families.geometry(model)
    return {i: factors(shape.kv_heads, rank_k, rank_v, seed=i, shared=shared) for i in shape.compressible}


def plan(model: PreTrainedModel, rank_k: int = 6, rank_v: int = 6, **fields: object) -> Plan:
    """One that says it was made for this model; any other field as given."""
    provenance = {
        "model": "pico",
        "model_sha256": model_fingerprint(model),
        "data_sha256": "0",
        "tokens": 1,
        "seed": 0,
        "versions": versions(),
    }
    rest = {
        "method": {"name": "pca", "parameters": {}},
        "allocator": {"name": "uniform", "parameters": {}},
        "budget": "50%",
    }
    shape = asdict(families.geometry(model))
    made = Plan(
        layer_factors(model, rank_k, rank_v), "post_rope", **rest, geometry=shape, provenance=provenance
    )
    return replace(made, **fields)


# -- caches


def lowrank(
    model: PreTrainedModel, maps: dict[int, Factors], layout: Layout = "post_rope", exact: Exact | None = None
) -> LowkeyCache:
    """A cache that stores latents under these factors."""
    return cache_of(model, lambda i: CodedLayer(LowRank(maps[i], layout, families.rope(model, i)), exact))


def quantized(model: PreTrainedModel, bits: int = 8) -> LowkeyCache:
    """A cache that stores integers of so many bits, in groups along each token."""
    return cache_of(model, lambda i: CodedLayer(Plain(), None, (PerToken(bits), PerToken(bits))))


# -- running


def padding(pads: list[int], length: int) -> tuple[Tensor, Tensor]:
    """(attention mask, position ids) of left-padded rows, as `generate` makes them."""
    mask = torch.stack([torch.arange(length) >= p for p in pads]).long()
    return mask, (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    ids: Tensor,
    past: object = None,
    pads: list[int] | None = None,
    splits: list[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits (b, t, V) of the ids, fed in pieces of the sizes `splits`; whatever the cache holds already
    comes before. mask: for padding that is not on the left alone."""
    before = int(past.get_seq_length()) if past is not None else 0  # a copy: a static cache counts in place
    mask = padding(pads or [0] * len(ids), before + ids.shape[1])[0] if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out, start = [], 0
    for size in splits or [ids.shape[1]]:
        stop = start + size
        arguments = {
            "attention_mask": mask[:, : before + stop],
            "position_ids": positions[:, before + start : before + stop],
        }
        out.append(
            model(ids[:, start:stop], **arguments, past_key_values=past, use_cache=past is not None).logits
        )
        start = stop
    assert start == ids.shape[1], "splits must add up to the length"
    return torch.cat(out, dim=1)


def gates(model: PreTrainedModel, policy: Policy) -> Gates | None:
    """Made-up numbers of a policy that learns something of the model; None for the others."""
    if not policy.learns:
        return None
    shape, generator = families.geometry(model), torch.Generator().manual_seed(3)
    sizes = policy.gate_shapes(*families.head_sizes(model))
    layers = tuple(
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        for _ in shape.compressible
    )
    return Gates(policy.learns, layers, "pico", model_fingerprint(model), {})


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    new: int,
    past: object = None,
    pads: list[int] | None = None,
    **kwargs: object,
) -> Tensor:
    """Ids (b, new) by greedy decoding (or by the search that kwargs ask for)."""
    mask, _ = padding(pads or [0] * len(ids), ids.shape[1])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, past_key_values=past, **options)[:, ids.shape[1] :]


def real(x: Tensor, pads: list[int]) -> Tensor:
    """The rows' numbers at tokens that are not padding, (n, ...)."""
    return torch.cat([row[p:] for row, p in zip(x, pads, strict=True)])
