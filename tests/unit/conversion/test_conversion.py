"""Conversions that lose nothing are exact: the new model gives the logits of the source."""

from __future__ import annotations

import pico
import pytest
import torch
from conversions import GATED, IDS, D, H, build, equal
from transformers import DynamicCache

from lowkey.conversion import ConversionOptions, Loss, conversion_record, convert, kinds, source

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
def test_a_conversion_does_not_depend_on_earlier_input(kind: str, fields: dict) -> None:
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
    """Only dropping rotations can then lose anything; with rotation it does, so that the test can fail."""
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
def test_partial_rotation_is_exact_for_shared_rotated_channels(
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


# -- norms


def test_a_norm_that_the_source_lacks_is_off_unless_asked_for() -> None:
    model = build("llama")
    assert convert(model, "mea", mea_num_component_heads=4).config.head_norm == "none"
    made = convert(model, "mea", mea_num_component_heads=4, head_norm="own")
    assert made.config.head_norm == "own" and not equal(model, made, tolerance=1e-2)
    mla = {"kv_lora_rank": D, "qk_nope_head_dim": 0}
    made = convert(build("llama-mqa"), "mla", mla_kv_norm=True, **mla)
    assert not equal(build("llama-mqa"), made, tolerance=1e-2)
