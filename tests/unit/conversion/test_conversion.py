"""Trained models with another attention: what must be exact is, what must be lost is what theory says, and
the folder is what it says.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pico
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from typer.testing import CliRunner

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, register
from lowkey.cli.app import app
from lowkey.conversion import (
    ConversionOptions,
    Loss,
    conversion_record,
    convert,
    gauge,
    input_moments,
    kinds,
    source,
    starting_loss,
)
from lowkey.core.types import LowkeyError
from lowkey.models.loading import load

IDS = pico.prompt(24)
D, H = pico.HEAD_DIM, 8
OWN = {
    "vocab_size": pico.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
SHORT, LONG = [1 + i / 10 for i in range(8)], [2 + i / 10 for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
BASE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "llama3": {**BASE, **LLAMA3},
    "longrope": {**BASE, **LONGROPE},
    "yarn": pico.YARN,
    "linear": {**BASE, "rope_type": "linear"},
}
ALIGNED = ConversionOptions(basis="aligned")


def build(name: str, **overrides: object) -> PreTrainedModel:
    """In fp64, with biases and norms as training leaves them, not zeros and ones."""
    if name == "own":
        torch.manual_seed(0)
        model = LowkeyForCausalLM(LowkeyConfig(**{**OWN, "initializer_range": 0.15, **overrides})).eval()
    else:
        model = pico.build(name, **overrides)
    generator = torch.Generator().manual_seed(7)
    for parameter, values in model.named_parameters():
        if parameter.endswith("bias"):
            values.data.normal_(generator=generator)
        elif "norm" in parameter:
            values.data.add_(0.3 * torch.randn(values.shape, generator=generator))
    return model.double()


@torch.no_grad()
def logits(model: PreTrainedModel, still: bool = False) -> Tensor:
    """`still`: all tokens at position 0, where rotation turns nothing; without a mask they would be taken for
    texts of one token each.
    """
    positions, mask = (torch.zeros_like(IDS), torch.ones_like(IDS)) if still else (None, None)
    return model(IDS, position_ids=positions, attention_mask=mask, use_cache=False).logits


def equal(
    model: PreTrainedModel, made: PreTrainedModel, still: bool = False, tolerance: float | None = None
) -> bool:
    """Relative to the largest logit; transformers' own norms round to fp32, ours keep fp64."""
    want = logits(model, still)
    tolerance = tolerance or (1e-9 if type(model) is LowkeyForCausalLM else 3e-6)
    return bool((logits(made, still) - want).abs().max() <= tolerance * want.abs().max())


# -- exact starts

FULL_RANK, LATENT = {"lrkv_rank": D}, {"lrkv_rope_mode": "latent"}
PAST = {
    "rope_parameters": {**ROPES["longrope"], "original_max_position_embeddings": 16},
    "original_max_position_embeddings": 16,
}
NTK = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": 16,
}  # 24 tokens pass it
GATED = {"attention": "gqa", "num_key_value_heads": 4, "attn_output_gate": True, "head_norm": "own"}
THIN = {
    "attention": "gqa",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "mla_latent_scale": True,
    "qk_norm": True,
    "head_dim": D,
}
# a part of the factor is in `mla`'s scores, not in cos and sin
COOLED = {**pico.YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
WITH_TEMPERATURE = [("llama", "mla", {"kv_lora_rank": D, "qk_nope_head_dim": 0}), ("llama", "mqa", {})]
EXACT = [
    *[
        (name, {}, "mha", {})
        for name in ("llama", "llama-mqa", "qwen2", "qwen3", "mistral", "phi3", "llama-yarn")
    ],
    *[("llama", {}, "gqa", {"num_key_value_heads": n}) for n in (4, 8)],
    *[
        ("llama-mqa", {}, "gqa", {"num_key_value_heads": 2}),
        ("llama-mqa", {}, "mqa", {}),
        ("llama-mha", {}, "mha", {}),
    ],
    *[("qwen2", {}, "gqa", {"num_key_value_heads": 2}), ("qwen3", {}, "gqa", {"num_key_value_heads": 4})],
    *[(name, {}, "lrkv", FULL_RANK) for name in ("llama", "llama-mha", "qwen3", "mistral", "llama-yarn")],
    *[
        ("llama", {}, "lrkv", {**FULL_RANK, "num_key_value_heads": g, "lrkv_rope_mode": m})
        for g in (1, 2)
        for m in ("full", "latent")
    ],
    ("llama-yarn", {}, "lrkv", {**FULL_RANK, "lrkv_rope_mode": "latent"}),
    *[("llama", {"rope_parameters": ROPES[kind]}, "lrkv", FULL_RANK) for kind in ("llama3", "linear")],
    *[
        ("phi3", PAST, kind, fields)
        for kind, fields in (
            ("mha", {}),
            ("lrkv", {"lrkv_rank": 16}),
            ("mea", {"mea_num_component_heads": 2}),
        )
    ],
    *[
        ("llama", NTK, kind, fields)
        for kind, fields in (("mha", {}), ("lrkv", FULL_RANK), ("lrkv", {**FULL_RANK, **LATENT}))
    ],
    ("llama-mqa", {}, "lrkv", {"lrkv_rank": 0, "lrkv_rope_mode": "latent"}),
    # nothing is left over, biases neither
    *[("qwen2", {}, "lrkv", {"lrkv_rank": r, "num_key_value_heads": 2}) for r in (0, 4)],
    *[
        (name, {}, "mea", {"mea_num_component_heads": n})
        for name, n in (("llama", 4), ("llama-mha", 8), ("qwen2", 2), ("qwen3", 4))
    ],
    ("llama-mqa", {}, "mla", {"kv_lora_rank": D, "qk_rope_head_dim": D, "qk_nope_head_dim": 0}),
    ("llama-yarn", {"num_key_value_heads": 1}, "mla", {"kv_lora_rank": D, "qk_nope_head_dim": 0}),
    *[
        ("qwen2", {"num_key_value_heads": 1}, "mla", {"kv_lora_rank": D, "qk_nope_head_dim": n})
        for n in (0, D)
    ],
    (
        "own",
        {**GATED, "qk_norm": False, "num_key_value_heads": 1, "attention_bias": True},
        "mla",
        {"kv_lora_rank": 8},
    ),
    *[
        (name, {"num_key_value_heads": 1, "rope_parameters": COOLED}, kind, fields)
        for name, kind, fields in WITH_TEMPERATURE
    ],
    ("llama", {"tie_word_embeddings": True}, "mha", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "mea", {"mea_num_component_heads": 4}),
    ("llama", {"head_dim": 10}, "lrkv", {"lrkv_rank": 10}),
    *[
        ("own", GATED, kind, fields)
        for kind, fields in (("mha", {}), ("lrkv", {"lrkv_rank": 8}), ("mea", {"mea_num_component_heads": 4}))
    ],
    *[("own", THIN, kind, fields) for kind, fields in (("mha", {}), ("lrkv", FULL_RANK))],
    (
        "own",
        {**THIN, "qk_norm": False, "num_key_value_heads": 1},
        "mla",
        {"kv_lora_rank": D, "qk_nope_head_dim": 0},
    ),
]


@pytest.mark.parametrize(("name", "overrides", "kind", "fields"), EXACT)
def test_the_start_is_the_source_where_nothing_is_lost(
    name: str, overrides: dict, kind: str, fields: dict
) -> None:
    model = build(name, **overrides)
    made = convert(model, kind, **fields)
    assert made.config.attention == kind and made.dtype == torch.float64 and not made.training
    assert equal(model, made)


@pytest.mark.parametrize("overrides", [NTK, {"max_position_embeddings": 512}])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [("mha", {}), ("gqa", {"num_key_value_heads": 4}), ("mea", {"mea_num_component_heads": 4})],
)
def test_generation_past_the_limit_is_the_sources(kind: str, fields: dict, overrides: dict) -> None:
    """Through a cache, where stored keys keep the frequencies of their time: as in the stock model."""
    model = build("llama", **overrides).float()
    made = convert(model, kind, **fields)
    assert torch.equal(pico.generate(made, IDS[:, :10], 20), pico.generate(model, IDS[:, :10], 20))


@pytest.mark.parametrize(
    ("kind", "fields"), [("mha", {}), ("lrkv", {"lrkv_rank": D, **LATENT}), ("lrkv", {"lrkv_rank": 4})]
)
def test_a_conversion_does_not_depend_on_what_the_source_has_read(kind: str, fields: dict) -> None:
    """Rotary embeddings that follow the length keep the frequencies of the longest text."""
    model = build("llama", **NTK)
    fresh = convert(model, kind, **fields).state_dict()
    model(pico.prompt(300, batch=1))
    again = convert(model, kind, **fields).state_dict()
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)


SUBSET = [
    ("llama", {}, "mea", {"mea_num_component_heads": 4, "attention_layers": "half"}),
    ("qwen2", {}, "lrkv", {"lrkv_rank": 3, "num_key_value_heads": 2, "attention_layers": [0, 2]}),
    ("qwen3", {}, "gqa", {"num_key_value_heads": 8, "attention_layers": [2]}),
    ("llama-mqa", {}, "mla", {"kv_lora_rank": D, "qk_nope_head_dim": 0, "attention_layers": [0]}),
    ("own", GATED, "mea", {"mea_num_component_heads": 4, "attention_layers": [1]}),
]


@pytest.mark.parametrize(("name", "overrides", "kind", "fields"), SUBSET)
def test_layers_left_out_stay_as_they_are(name: str, overrides: dict, kind: str, fields: dict) -> None:
    model = build(name, **overrides)
    assert equal(model, convert(model, kind, **fields))


@pytest.mark.parametrize(("layers", "meant"), [("half", [1]), ([2], [2]), ([0, 1, 2], [0, 1, 2])])
def test_a_conversion_of_some_layers_is_the_whole_one_there(layers: object, meant: list[int]) -> None:
    """By module: a layer that is named is the one of a conversion of all layers, any other is the source's,
    to the bit.
    """
    model = build("llama").float()
    some, every = (
        convert(model, "mea", mea_num_component_heads=2, **f) for f in ({"attention_layers": layers}, {})
    )
    for i in range(pico.LAYERS):
        found, want = (
            some.model.layers[i].self_attn.state_dict(),
            every.model.layers[i].self_attn.state_dict(),
        )
        want = want if i in meant else model.model.layers[i].self_attn.state_dict()
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    # at a smaller base of its own
    narrow = convert(model, "mla", kv_lora_rank=8, qk_rope_head_dim=8, attention_layers=layers)
    assert (
        torch.equal(
            narrow.model.rotary_emb(IDS.float(), IDS).other.frequencies, model.model.rotary_emb.inv_freq
        )
        if len(meant) < 3
        else True
    )
    past = DynamicCache(config=some.config)
    some(IDS, past_key_values=past)
    stored = [(2 if i in meant else 4) * D * 2 * IDS.numel() for i in range(pico.LAYERS)]
    assert [layer.keys.numel() + layer.values.numel() for layer in past.layers] == stored
    assert (
        conversion_record(model, some, Loss(1, 1), Loss(1, 1), {})["cache_bytes_per_token"]["converted"]
        == 4 * sum(stored) // IDS.numel()
    )


STILL = [
    *[("llama-mha", {"kv_lora_rank": 2 * H * D, "qk_rope_head_dim": e}) for e in (0, 4, 8, D)],
    ("llama", {"kv_lora_rank": 2 * 4 * D, "qk_rope_head_dim": 8, "mla_rotate": False}),
    *[("llama-yarn", {"kv_lora_rank": 8 * D, "qk_rope_head_dim": 8, "mla_rotate": r}) for r in (True, False)],
]


@pytest.mark.parametrize(("name", "fields"), STILL)
def test_a_latent_of_full_rank_is_exact_where_nothing_is_rotated(name: str, fields: dict) -> None:
    """Only dropping rotations can then lose anything; and with rotation it does, so that the test can tell."""
    model = build(name)
    made = convert(model, "mla", **fields)
    assert equal(model, made, still=True)
    assert not equal(model, made, tolerance=1e-4)


def test_a_latent_takes_biases_of_values_and_of_unrotated_keys() -> None:
    model = build("qwen2")
    for fields in ({"qk_rope_head_dim": 0}, {"qk_rope_head_dim": 4, "mla_rotate": False}):
        assert equal(model, convert(model, "mla", kv_lora_rank=64, **fields), still=True)


def test_a_rotated_slice_takes_biases_of_keys() -> None:
    """Heads that differ in phases alone, biases too: the slice is all of them."""
    model, generator = build("qwen2"), torch.Generator().manual_seed(3)
    for block in model.model.layers:
        first, second = (
            block.self_attn.k_proj.weight.data.unflatten(0, (2, D)),
            block.self_attn.k_proj.bias.data.unflatten(0, (2, D)),
        )
        angle = torch.randn(D // 2, generator=generator, dtype=torch.float64)
        for heads in (first, second.unsqueeze(-1)):
            low, high = heads[0].chunk(2)
            cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
            heads[1] = torch.cat([low * cos - high * sin, high * cos + low * sin])
    for n in (0, D):
        assert equal(model, convert(model, "mla", kv_lora_rank=2 * D, qk_nope_head_dim=n))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("name", "frequencies"), [("llama", "high"), ("llama-yarn", "high"), ("llama", "spread")]
)
def test_partial_rotation_is_exact_where_rotated_channels_are_shared_and_nothing_is_rotated(
    name: str, groups: int, frequencies: str
) -> None:
    """Heads differ in the phases of their rotated channels, in any way in the others, and not in their
    values.
    """
    model, e, generator = build(name), 8, torch.Generator().manual_seed(3)
    pairs = torch.tensor([0, 1, 2, 3] if frequencies == "high" else [0, 2, 4, 6])
    for block in model.model.layers:
        keys, values = (getattr(block.self_attn, f"{n}_proj").weight.data.view(4, D, -1) for n in "kv")
        values[:] = values[:1].clone()
        a, b = keys[0, pairs].clone(), keys[0, pairs + D // 2].clone()
        for h in range(1, 4):
            angle = 6.28 * torch.rand(4, 1, generator=generator, dtype=torch.float64)
            keys[h, pairs], keys[h, pairs + D // 2] = (
                a * angle.cos() - b * angle.sin(),
                a * angle.sin() + b * angle.cos(),
            )
    fields = {
        "lrkv_rank": D - e,
        "lrkv_rope_mode": "partial",
        "qk_rope_head_dim": e,
        "num_key_value_heads": groups,
    }
    made = convert(model, "lrkv", options=ConversionOptions(frequencies=frequencies), **fields)
    assert equal(model, made, still=True)
    assert not equal(model, made, tolerance=1e-4)
    assert not equal(
        model, convert(model, "lrkv", **fields | {"lrkv_rank": D - e - 2}), still=True, tolerance=1e-4
    )


@pytest.mark.parametrize("rope", ["llama3", "yarn", "linear"])
@pytest.mark.parametrize(
    ("frequencies", "width", "pairs"),
    [("high", 8, [0, 1, 2, 3]), ("high", 6, [0, 1, 2]), ("spread", 4, [0, 4])],
)
def test_kept_channels_turn_as_they_did(rope: str, frequencies: str, width: int, pairs: list[int]) -> None:
    model = build("llama", rope_parameters=ROPES[rope])
    made = convert(
        model,
        "mla",
        kv_lora_rank=D,
        qk_rope_head_dim=width,
        options=ConversionOptions(frequencies=frequencies),
    )
    found = kinds.RotaryFrequencies(source.frequencies(model), made.model.rotary_emb.inv_freq.double(), 1.0)
    assert found.channels()[0].tolist() == [*pairs, *(f + D // 2 for f in pairs)]
    assert sorted(torch.cat(found.channels()).tolist()) == list(range(D))
    torch.testing.assert_close(found.narrow, found.source[pairs], rtol=1e-6, atol=0)


def test_rank_zero_is_grouped_query() -> None:
    model = build("llama-mha")
    assert equal(
        convert(model, "gqa", num_key_value_heads=2),
        convert(model, "lrkv", lrkv_rank=0, num_key_value_heads=2),
    )


@pytest.mark.parametrize("form", kinds.HEAD_POOLINGS)
def test_pooled_heads_by_loops(form: str) -> None:
    model = build("llama-mha", attention_bias=True)
    made = convert(model, "gqa", num_key_value_heads=2, options=ConversionOptions(heads=form))
    for name in ("k_proj", "v_proj"):
        old, new = (getattr(m.model.layers[1].self_attn, name) for m in (model, made))
        for g in range(2):
            rows = [slice(h * D, (h + 1) * D) for h in range(4 * g, 4 * g + 4)]
            for part in ("weight", "bias"):
                picked = [getattr(old, part)[r] for r in rows]
                want = sum(picked) / 4 if form == "mean" else picked[0]
                torch.testing.assert_close(getattr(new, part)[g * D : (g + 1) * D], want)


# -- what is lost


@torch.no_grad()
def test_low_rank_loses_what_the_singular_values_say() -> None:
    weight = torch.randn(3, D, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in (0, 5, D):
        down, up = kinds.low_rank(weight, None, rank)
        lost = (weight - up.mT @ down).square().sum((1, 2))
        torch.testing.assert_close(
            lost, torch.linalg.svdvals(weight)[:, rank:].square().sum(1), atol=1e-10, rtol=1e-9
        )
    down, up = kinds.low_rank(weight, None, D + 3)  # a latent wider than what it holds
    assert down.shape[1] == D + 3 and torch.allclose(up.mT @ down, weight)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [12, 500])
def test_low_rank_of_more_outputs_than_inputs_is_best_for_what_they_make(tokens: int) -> None:
    """Also where a text has not seen all inputs: then full rank still loses nothing of the weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 20, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 20, generator=generator, dtype=torch.float64) @ torch.randn(
        20, 20, generator=generator, dtype=torch.float64
    )
    for inputs, moment in ((torch.eye(20, dtype=torch.float64), None), (x, x.mT @ x / tokens)):
        made = inputs @ weight.mT
        for rank in (3, 11):
            down, up = kinds.low_rank(weight, moment, rank)
            lost = (made - inputs @ down.mT @ up).square().sum()
            torch.testing.assert_close(
                lost, torch.linalg.svdvals(made)[rank:].square().sum(), rtol=1e-6, atol=1e-8
            )
        down, up = kinds.low_rank(weight, moment, 25)
        torch.testing.assert_close(up.mT @ down, weight)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 7])
def test_components_lose_what_the_singular_values_over_heads_say(count: int) -> None:
    model = build("llama-mha", attention_bias=True)
    made = convert(model, "mea", mea_num_component_heads=count)
    for name in ("k", "v"):
        old, new = (getattr(m.model.layers[0].self_attn, f"{name}_proj") for m in (model, made))
        heads = torch.cat([old.weight, old.bias.unsqueeze(1)], 1).view(H, -1)
        parts = torch.cat([new.weight, new.bias.unsqueeze(1)], 1).view(count, -1)
        lost = heads - getattr(made.model.layers[0].self_attn, f"{name}_mix").T @ parts
        torch.testing.assert_close(
            lost.square().sum(), torch.linalg.svdvals(heads)[count:].square().sum(), atol=1e-10, rtol=1e-9
        )


@torch.no_grad()
def key_error(model: PreTrainedModel, made: LowkeyForCausalLM, ids: Tensor, layer: int, name: str) -> float:
    """Squared error of one layer's keys or values over the source's own inputs, before rotation."""
    block = model.model.layers[layer]
    x = block.input_layernorm(model(ids, output_hidden_states=True).hidden_states[layer])
    want = getattr(block.self_attn, f"{name}_proj")(x).unflatten(-1, (4, D)).repeat_interleave(2, -2)
    own = made.model.layers[layer].self_attn
    shared = getattr(own, f"{name}_proj")(x).unsqueeze(-2)
    latents = getattr(own, f"{name}_down")(x).unflatten(-1, (H, -1))
    found = shared + torch.einsum("bthr,hrd->bthd", latents, getattr(own, f"{name}_up"))
    return float((found - want).square().sum())


def test_whitening_never_increases_the_error_of_keys_and_values() -> None:
    model, rows = build("llama"), pico.prompt(48, batch=6, seed=5)
    moments = input_moments(model, rows, batch=4)
    for rank in (2, 6, 10):
        plain, whitened = (convert(model, "lrkv", lrkv_rank=rank, moments=m) for m in (None, moments))
        for layer in range(pico.LAYERS):
            for name in ("k", "v"):
                before, after = (key_error(model, made, rows, layer, name) for made in (plain, whitened))
                assert after < before
    exact = convert(model, "lrkv", lrkv_rank=D, moments=moments)
    assert equal(model, exact)


def test_whitened_starts_of_every_kind_are_other_weights() -> None:
    model = build("llama")
    moments = input_moments(model, pico.prompt(48, batch=6, seed=5))
    for kind, fields in (
        ("lrkv", {"lrkv_rank": 4}),
        ("mea", {"mea_num_component_heads": 2}),
        ("mla", {"kv_lora_rank": 24}),
    ):
        plain, whitened = (convert(model, kind, moments=m, **fields) for m in (None, moments))
        assert not equal(plain, whitened, tolerance=1e-3)


@torch.no_grad()
def test_moments_are_those_of_the_inputs() -> None:
    model, rows = build("llama"), pico.prompt(9, batch=3)
    found = input_moments(model, rows, batch=2)
    block = model.model.layers[0]
    want = torch.zeros(65, 65, dtype=torch.float64)
    for row in rows:
        for token in row:
            x = torch.cat(
                [block.input_layernorm(model.model.embed_tokens(token)), torch.ones(1, dtype=torch.float64)]
            )
            want += torch.outer(x, x) / rows.numel()
    torch.testing.assert_close(found[0], want, atol=1e-6, rtol=1e-5)
    assert list(found) == [0, 1, 2]
    assert all(float(m[-1, -1]) == pytest.approx(1) for m in found.values())


# -- turned heads


def turned_copies(model: PreTrainedModel) -> PreTrainedModel:
    """All KV heads become the first, keys at other phases (and lengths), values turned at random."""
    generator = torch.Generator().manual_seed(3)
    for block in model.model.layers:
        k, v = (getattr(block.self_attn, f"{n}_proj").weight.data.view(-1, D, 64) for n in "kv")
        for h in range(1, len(k)):
            angle = 6.28 * torch.rand(D // 2, generator=generator, dtype=torch.float64)
            a, b = k[0].chunk(2)
            c, s = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
            k[h] = torch.cat([a * c - b * s, a * s + b * c])
            v[h] = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q @ v[0]
    return model


@pytest.mark.parametrize("white", [True, False])
def test_turning_heads_changes_nothing(white: bool) -> None:
    model = build("llama")
    want = logits(model)
    moment = None if white else input_moments(model, IDS)[1]
    w = source.read_attention(model, 1)
    turned = gauge.aligned_weights(w, 2, 1, gauge.averaged_energy, moment)
    assert not torch.allclose(turned.k, w.k) and not torch.allclose(turned.v, w.v)
    own = model.model.layers[1].self_attn
    for name in "qkv":
        getattr(own, f"{name}_proj").weight.data.copy_(getattr(turned, name)[..., :-1].flatten(0, 1))
    own.o_proj.weight.data.copy_(turned.o.transpose(0, 1).flatten(1))
    torch.testing.assert_close(logits(model), want)


COPIES = [
    *[
        ("mqa", {}),
        ("gqa", {"num_key_value_heads": 2}),
        ("lrkv", {"lrkv_rank": 0}),
        ("lrkv", {"lrkv_rank": 2}),
    ],
    *[("mea", {"mea_num_component_heads": n}) for n in (1, 2)],
]


@pytest.mark.parametrize(("kind", "fields"), COPIES)
def test_turned_copies_of_one_head_are_one_head(kind: str, fields: dict) -> None:
    model = turned_copies(build("llama"))
    assert equal(model, convert(model, kind, options=ALIGNED, **fields))
    assert not equal(model, convert(model, kind, **fields), tolerance=1e-3)


def test_mixtures_are_found_whether_or_not_heads_are_turned() -> None:
    """Heads that are scalar mixtures of two: turning them would lose what mixing alone keeps."""
    model, generator = build("llama-mha"), torch.Generator().manual_seed(3)
    for block in model.model.layers:
        for name in "kv":
            heads = getattr(block.self_attn, f"{name}_proj").weight.data.view(H, D, 64)
            heads[:] = torch.einsum(
                "hm,mdn->hdn", torch.randn(H, 2, generator=generator, dtype=torch.float64), heads[:2].clone()
            )
    for options in (None, ALIGNED):
        assert equal(model, convert(model, "mea", mea_num_component_heads=2, options=options))


def test_a_rotated_slice_stands_for_keys_at_other_phases() -> None:
    model = turned_copies(build("llama"))
    made = convert(model, "mla", kv_lora_rank=4 * D, qk_nope_head_dim=0)
    assert made.config.qk_rope_head_dim == D
    assert equal(model, made)


@pytest.mark.parametrize("white", [True, False])
def test_turning_never_loses_energy(white: bool) -> None:
    model = build("llama-mha")
    moment = None if white else input_moments(model, IDS)[0]
    w = source.read_attention(model, 0)
    for count in (1, 2, 5):
        kept = gauge.mixed_energy(count)
        turned = gauge.aligned_weights(w, 1, count, kept, moment)
        for before, after in ((w.k, turned.k), (w.v, turned.v)):
            grams = [gauge.joint(x, moment).diagonal(dim1=2, dim2=3).sum(-1) for x in (before, after)]
            assert kept(grams[1]) >= kept(grams[0])
            assert float(grams[1].trace()) == pytest.approx(float(grams[0].trace()))


# -- norms


def test_a_norm_that_the_source_lacks_is_off_unless_asked_for() -> None:
    model = build("llama")
    assert convert(model, "mea", mea_num_component_heads=4).config.head_norm == "none"
    made = convert(model, "mea", mea_num_component_heads=4, head_norm="own")
    assert made.config.head_norm == "own" and not equal(model, made, tolerance=1e-2)
    mla = {"kv_lora_rank": D, "qk_nope_head_dim": 0}
    made = convert(build("llama-mqa"), "mla", mla_kv_norm=True, **mla)
    assert not equal(build("llama-mqa"), made, tolerance=1e-2)


# -- refusals

WIDE = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
REFUSED = [
    ("gemma2", {}, "mha", {}, "scales its embeddings"),
    ("granite", {}, "mha", {}, "scales embeddings"),
    ("olmo2", {}, "mha", {}, "norms stand after"),
    ("mistral", {"sliding_window": 16}, "mha", {}, "sliding window"),
    ("phi3-partial", {}, "mha", {}, "rotates 8 of 16"),
    ("llama", {}, "gta", {}, "there is no conversion into it"),
    ("llama", {}, "gqa", {}, "needs num_key_value_heads"),
    ("llama", {}, "gqa", {"num_key_value_heads": 3}, "divide num_attention_heads 8"),
    ("llama", {}, "gqa", {"num_key_value_head": 2}, "did you mean 'num_key_value_heads'"),
    ("llama", {}, "mqa", {"lrkv_rank": 2}, "is not one of attention 'mqa'"),
    ("llama", {}, "lrkv", {"lrkv_rank": "2"}, "must be of type int"),
    ("llama", {}, "lrkv", {"lrkv_rank": D + 1}, "must be at most the head dim 16"),
    ("llama", {}, "lrkv", {"lrkv_rank": 3, "lrkv_rope_mode": "latent"}, "give an even rank"),
    ("llama", {}, "lrkv", {"lrkv_rank": 4, "qk_rope_head_dim": 4}, "is for lrkv_rope_mode='partial'"),
    (
        "llama",
        {},
        "lrkv",
        {"lrkv_rank": 4, "qk_rope_head_dim": 0, "lrkv_rope_mode": "partial"},
        "must be at least 2",
    ),
    ("llama", {}, "mea", {"mea_num_component_heads": 5}, "at most the source's 4"),
    ("llama", {}, "mea", {"mea_num_component_heads": 0}, "must be at least 1"),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 18}, "at most the source's head dim"),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "qk_nope_head_dim": 5}, "give 16 or 0"),
    (
        "llama",
        {},
        "lrkv",
        {"lrkv_rank": 2, "lrkv_rope_mode": "partial", "qk_rope_head_dim": D},
        "would reach none of 16 channels",
    ),
    ("llama", {}, "mla", {"kv_lora_rank": 2 * 4 * D + 1}, "kv_lora_rank 129: must be at most 128"),
    ("llama", WIDE, "mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 8}, "heads of width 16 alone"),
    ("qwen3", {}, "mla", {"kv_lora_rank": 8}, "norms its keys after their projection"),
    ("qwen3", {}, "mea", {"mea_num_component_heads": 2}, "normed apart"),
    ("qwen3", {}, "lrkv", {"lrkv_rank": 4, "lrkv_rope_mode": "latent"}, "normed apart"),
    ("qwen3", {}, "mqa", {"options": ALIGNED}, "cannot be aligned"),
    ("own", GATED, "mqa", {"options": ALIGNED}, "cannot be aligned"),
    ("own", {**GATED, "attention_bias": True}, "lrkv", {"lrkv_rank": 2}, "none can be moved"),
    ("own", GATED, "mha", {"head_norm": "shared"}, "the source has 'own'"),
    ("own", {"attention": "lrkv", "lrkv_rank": 2}, "mha", {}, "attention 'lrkv' cannot be converted"),
    ("own", {"attention": "mha", "attention_layers": [0]}, "mha", {}, "layers must be of one kind"),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "attention_layers": "most"},
        "attention_layers 'most': must be of type list",
    ),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "attention_layers": [7]},
        r"layers 0 to 2, each once, or half or deep",
    ),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "options": ALIGNED}, "does not mix heads"),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "options": ConversionOptions(heads="first")},
        "pools no heads",
    ),
    ("llama", {}, "mha", {"options": ConversionOptions(frequencies="spread")}, "rotated whole"),
    (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        "gqa",
        {"num_key_value_heads": 3, "options": ALIGNED},
        "no multiple",
    ),
]


@pytest.mark.parametrize(("name", "overrides", "kind", "fields", "message"), REFUSED)
def test_refused_in_one_line(name: str, overrides: dict, kind: str, fields: dict, message: str) -> None:
    with pytest.raises(LowkeyError) as caught:
        convert(build(name, **overrides), kind, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_moments_that_nothing_reads_are_refused() -> None:
    model = build("llama")
    with pytest.raises(LowkeyError, match="made from weights alone"):
        convert(model, "mqa", moments=input_moments(model, IDS))


# -- measured, written, read again


def test_the_source_stays_and_the_result_can_be_trained() -> None:
    model = pico.build("llama", tie_word_embeddings=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = convert(model, "lrkv", lrkv_rank=4).train()
    made(IDS, labels=IDS).loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in made.parameters()
    )
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_starting_loss_by_loops() -> None:
    model, tokenizer = build("llama"), pico.tokenizer()
    corpus = "the quick brown fox jumps over the lazy dog\n" * 4
    found = starting_loss(model, tokenizer, corpus, context=16, windows=3, batch=2)
    ids, nats, n = tokenizer(corpus, add_special_tokens=False).input_ids, 0.0, 0
    for start in range(0, 45, 15):
        row = [tokenizer.bos_token_id, *ids[start : start + 15]]
        steps = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for i in range(15):
            nats, n = nats - float(steps[i, row[i + 1]]), n + 1
    assert found.tokens == n == 45 and found.nats == pytest.approx(nats / n, rel=1e-5)


def run(*words: object) -> tuple[int, str, str]:
    ran = CliRunner().invoke(app, [str(w) for w in words])
    return ran.exit_code, ran.stdout, str(ran.exception or "")


SMALL = ("--context", 64, "--windows", 4)
WAYS = {
    "lrkv": ("-O", "lrkv_rank=4", "--whiten", "--basis", "aligned"),
    "mea": ("-O", "mea_num_component_heads=2", "-O", "head_norm=shared"),
    "mla": (
        "-O",
        "kv_lora_rank=24",
        "-O",
        "qk_rope_head_dim=8",
        "-O",
        "mla_rotate=true",
        "-O",
        "attention_layers=0,2-2",
        "--frequencies",
        "spread",
    ),
    "gqa": ("-O", "num_key_value_heads=2", "--heads", "first"),
}


@pytest.mark.parametrize("kind", WAYS)
def test_the_command_writes_what_it_says(kind: str, tmp_path: Path) -> None:
    place, out = pico.save(tmp_path / "model"), tmp_path / "out"
    status, printed, error = run("convert", place, out, "--attention", kind, *WAYS[kind], *SMALL, "--json")
    assert status == 0, error
    told, kept = json.loads(printed), json.loads((out / "convert.json").read_text())
    assert told.items() <= {"model": str(out), **kept}.items() and kept["attention"] == kind
    register()
    made = AutoModelForCausalLM.from_pretrained(out).eval()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(out)
    assert made.config.attention == kind and type(made) is LowkeyForCausalLM
    for which, m in (("source", model), ("converted", made)):
        loss = starting_loss(m, tokenizer, context=64, windows=4)
        assert (
            kept["loss"][which] == pytest.approx(loss.nats, rel=1e-5)
            and kept["loss"]["tokens"] == loss.tokens == 4 * 63
        )
        assert kept["parameters"][which] == sum(p.numel() for p in m.parameters())
        cache = DynamicCache(config=m.config)
        m(IDS, past_key_values=cache)
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert kept["cache_bytes_per_token"][which] == held / IDS.numel()
    assert (kept["whitened"] is not None) == ("--whiten" in WAYS[kind])
    reloaded, _ = load(str(out), device="cpu")
    torch.testing.assert_close(logits(reloaded), logits(made))
    snippet = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("THIS FOLDER", str(out)), found := {})
    torch.testing.assert_close(logits(found["model"]), logits(made))
    named = json.loads((out / "config.json").read_text())["auto_map"]
    assert set(named) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert torch.equal(
        AutoModel.from_pretrained(out)(IDS).last_hidden_state, made.model(IDS).last_hidden_state
    )


def test_the_command_prints_a_table_and_replaces_only_when_told(tmp_path: Path) -> None:
    place, out = pico.save(tmp_path / "model"), tmp_path / "out"
    status, printed, error = run("convert", place, out, "--attention", "mqa", *SMALL)
    assert status == 0, error
    assert "25.0%" in printed and "loss (nats/token)" in printed
    again = ("convert", place, out, "--attention", "mha", *SMALL)
    assert "already holds files" in run(*again)[2]
    assert json.loads((out / "convert.json").read_text())["attention"] == "mqa"
    assert run(*again, "--force")[0] == 0
    assert json.loads((out / "convert.json").read_text())["attention"] == "mha"


WRONG = [
    (("--attention", "mha", "--calibration", "x.txt"), "is for --whiten"),
    (("--attention", "gqa", "-O", "num_key_value_heads=two"), "must be a whole number"),
    (("--attention", "mqa", "-O", "attention_layers=1-x"), "must be layers like 3-8,11, or half or deep"),
    (("--attention", "gqa", "-O", "num_key_value_heads=\u00b2"), "must be a whole number"),
    (("--attention", "mla", "-O", "mla_rotate=maybe"), "must be true or false"),
    (("--attention", "mha", "--data", "missing.txt"), "no such file"),
    (("--attention", "mha", "--context", 4), "must be at least 8"),
    (
        ("--attention", "mqa", "--whiten", *SMALL),
        "moments (--whiten): attention 'mqa' is made from weights alone",
    ),
]


def test_what_cannot_be_converted_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    place = pico.save(tmp_path / "model")
    with mock.patch("lowkey.conversion.input_moments", side_effect=AssertionError):
        error = run(
            "convert",
            place,
            tmp_path / "out",
            "--attention",
            "mla",
            "-O",
            "kv_lora_rank=0",
            "--whiten",
            *SMALL,
        )[2]
    assert "kv_lora_rank 0" in error


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(words: tuple, message: str, tmp_path: Path) -> None:
    place = pico.save(tmp_path / "model")
    status, _, error = run("convert", place, tmp_path / "out", *words)
    assert status != 0 and message in error and "\n" not in error
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
