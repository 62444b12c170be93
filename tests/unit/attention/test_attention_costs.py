"""Parameters, stored numbers and operations of every attention kind against formulas; what is refused."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from variants import (
    LRKV,
    MLA,
    ONE_OF_EACH,
    VARIANTS,
    attention,
    build,
    config,
    empty_cache,
    hidden,
    ids,
    logits,
)

from lowkey.attention import (
    LowkeyConfig,
    LowkeyForCausalLM,
    costs,
    layer_costs,
    model_bytes_per_token,
    model_flops,
    model_parameters,
)
from lowkey.attention.base import LayerCall, split_into_heads

each = pytest.mark.parametrize("name", VARIANTS)
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 32,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "intermediate_size": 344,
}
WIDTHS = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "lrkv_rank": 8,
    "mea_num_component_heads": 3,
    "q_lora_rank": 48,
}


def widened(name: str) -> LowkeyConfig:
    """The variant at widths at which rotations, which are not counted, are small."""
    own = {key: WIDTHS[key] for key in WIDTHS if VARIANTS[name].get(key)}
    if name == "mla-narrow":
        own["kv_lora_rank"] = 8
    # torch counts fused kernels as if nothing were masked, or not at all
    return config(name, **WIDE, **own, attn_implementation="eager")


def without_memory(shape: LowkeyConfig) -> LowkeyForCausalLM:
    with torch.device("meta"):
        return LowkeyForCausalLM(shape).eval()


def operations(model: LowkeyForCausalLM, new: int, past: DynamicCache | None) -> int:
    """Of the first layer's attention, as torch counts them."""
    before = past.get_seq_length() if past is not None else 0
    positions = torch.arange(before, before + new, device="meta")[None]
    hidden = torch.empty(1, new, model.config.hidden_size, device="meta")
    rope = model.model.rotary_emb(hidden, positions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(model)(hidden, rope, past_key_values=past, position_ids=positions)
    return counter.get_total_flops()


@each
def test_operations_of_a_whole_text(name):
    model = without_memory(widened(name))
    assert operations(model, 160, None) == pytest.approx(
        costs(model.config).prefill_flops(160, causal=False), rel=0.01
    )


@each
def test_operations_of_a_decoding_step(name):
    model = without_memory(widened(name))
    past = DynamicCache(config=model.config)
    operations(model, 299, past)
    assert operations(model, 1, past) == pytest.approx(costs(model.config).decode_flops(300), rel=0.01)


@each
def test_operations_of_a_model(name):
    model, tokens = LowkeyForCausalLM(widened(name)), torch.zeros(1, 160, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    unseen = sum(
        cost.prefill_flops(160, causal=False) - cost.prefill_flops(160) for cost in layer_costs(model.config)
    )
    assert counter.get_total_flops() - unseen == pytest.approx(
        model_flops(model.config, layer_costs(model.config), 160), rel=0.01
    )


@each
def test_parameters_of_a_variant(name):
    model = build(name)
    assert sum(p.numel() for p in attention(model).parameters()) == costs(model.config).parameters
    assert model.num_parameters() == model_parameters(model.config, layer_costs(model.config))


@each
def test_what_a_cache_holds(name):
    """Dynamic: numbers per token, and bytes. Static: the same room for every token it could hold."""
    model = build(name)
    dynamic, static = empty_cache("dynamic", model), empty_cache("static", model)
    for past in (dynamic, static):
        with torch.no_grad():
            model(ids(11), past_key_values=past)
    stored = [cost.stored for cost in layer_costs(model.config)]
    assert [layer.keys.numel() + layer.values.numel() for layer in dynamic.layers] == [
        n * 2 * 11 for n in stored
    ]
    assert [layer.keys.numel() + layer.values.numel() for layer in static.layers] == [
        n * 2 * 40 for n in stored
    ]
    held = sum(part.nbytes for layer in dynamic.layers for part in (layer.keys, layer.values))
    assert held == 2 * 11 * model_bytes_per_token(layer_costs(model.config), 8)


@each
def test_what_a_decoding_step_reads(name):
    """Stored numbers per token that weights depend on, and those that outputs do, weights given; a latent
    that is written out as keys and values at once is read once."""
    model = build(name, num_hidden_layers=1, attn_implementation="eager")
    layer, positions = attention(model), torch.arange(6)[None]
    x = hidden(6, batch=1)
    query, *kept = layer.project(
        x, layer.q_norm(split_into_heads(layer.q_proj(x), layer.heads)), call(model, x, positions)
    )
    stored = [part.detach().requires_grad_() for part in kept]
    _, weights = layer.attend(query[:, :, -1:], *stored, call(model, x, positions[:, -1:]))
    # alone it has all the weight, whatever it is
    first = [part.detach()[:, :, :1].requires_grad_() for part in kept]
    out, _ = layer.attend(query[:, :, :1], *first, call(model, x, positions[:, :1]))
    by_scores, by_values = touched(weights, stored), touched(out, first)
    once = name.startswith("mla") and model.config.decode == "expanded"
    # of a position: read, but weights are no smooth function of them
    digits = 3 if name.startswith(("lrkv-full", "lrkv-some")) else 0
    assert costs(model.config).read == digits + int(
        (by_scores | by_values).sum() if once else by_scores.sum() + by_values.sum()
    )


def call(model: LowkeyForCausalLM, x: torch.Tensor, positions: torch.Tensor) -> LayerCall:
    return LayerCall(None, model.model.rotary_emb(x, positions), positions, True, {})


def touched(result: torch.Tensor, stored: list[torch.Tensor]) -> torch.Tensor:
    """Which numbers of the first stored token the result depends on."""
    way = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad((result * way).sum(), stored, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(s) if g is None else g)[0, :, 0].flatten() != 0
            for s, g in zip(stored, grads, strict=True)
        ]
    )


@st.composite
def shapes(draw):
    """Configurations of any kind and of many widths."""
    kind = draw(st.sampled_from(sorted({v["attention"] for v in VARIANTS.values()})))
    group, heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    widths = st.integers(1, 12)
    shape = {
        "attention": kind,
        "hidden_size": draw(st.integers(1, 40)),
        "num_attention_heads": group * heads,
        "head_dim": 2 * draw(widths),
        "attn_output_gate": draw(st.booleans()),
        "head_norm": draw(st.sampled_from([None, "none", "shared", "own"])),
        "q_lora_rank": draw(st.none() | widths),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    if kind in ("gqa", "lrkv", "mea", "gta", "k_eq_v"):
        shape |= {"num_key_value_heads": heads, "qk_norm": draw(st.booleans())}
        shape["qk_rope_head_dim"] = 2 * draw(st.integers(0, shape["head_dim"] // 2))
    if kind == "mla":
        shape |= {"kv_lora_rank": draw(widths), "qk_nope_head_dim": draw(widths), "v_head_dim": draw(widths)}
        shape |= {"qk_rope_head_dim": 2 * draw(st.integers(0, 6)), "mla_kv_norm": draw(st.booleans())}
    if kind == "lrkv":
        shape |= {
            "lrkv_rank": 2 * draw(st.integers(0, 6)),
            "lrkv_rope_mode": draw(st.sampled_from(["full", "latent", "partial"])),
        }
    if kind == "mea":
        shape["mea_num_component_heads"] = draw(widths)
    return LowkeyConfig(
        **shape, vocab_size=11, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=16
    )


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_parameters_and_stored_numbers_at_any_width(shape):
    model, past = without_memory(shape), DynamicCache(config=shape)
    cost = costs(shape)
    assert model.num_parameters() == model_parameters(shape, layer_costs(shape))
    assert sum(p.numel() for p in attention(model).parameters()) == cost.parameters
    operations(model, 3, past)
    assert past.layers[0].keys.numel() + past.layers[0].values.numel() == 3 * cost.stored


def test_half_of_mha_at_the_same_width():
    """Kinds at equal bytes: 8 heads, a low rank of 3/8 of a head, or 4 stored or component heads."""
    half = {"hidden_size": 128, "num_attention_heads": 8}
    full = costs(LowkeyConfig(attention="mha", **half)).stored
    arms = [
        {"attention": "gqa", "num_key_value_heads": 4},
        {"attention": "lrkv", "lrkv_rank": 6, "lrkv_rope_mode": "latent"},
        {"attention": "mea", "mea_num_component_heads": 4},
        {"attention": "mla", "kv_lora_rank": 120, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        {"attention": "k_eq_v"},
    ]
    assert [costs(LowkeyConfig(**half, **arm)).stored for arm in arms] == [full // 2] * len(arms)
    # and where each token stands
    assert costs(LowkeyConfig(**half, attention="lrkv", lrkv_rank=6)).stored == full // 2 + 3


# -- the start


@pytest.mark.parametrize("rank", [2, 8, 24])
@pytest.mark.parametrize(("mode", "scale"), [("full", 0.1), ("latent", 0.1), ("partial", 0.1), ("full", 0.3)])
def test_the_low_rank_part_starts_at_its_share_of_the_shared_one(mode, scale, rank):
    torch.manual_seed(0)
    shape = config(
        "lrkv-full",
        hidden_size=256,
        num_attention_heads=8,
        head_dim=32,
        lrkv_rank=rank,
        lrkv_rope_mode=mode,
        lrkv_init_scale=scale,
        initializer_range=0.02,
    )
    layer = attention(LowkeyForCausalLM(shape))
    for which in "kv":
        down, up = (
            getattr(layer, f"{which}_down").weight.unflatten(0, (8, rank)),
            getattr(layer, f"{which}_up"),
        )
        shared = getattr(layer, f"{which}_proj").weight[: up.shape[-1]].norm()
        shares = torch.stack([(down[i].T @ up[i]).norm() / shared for i in range(8)])
        assert shares.mean().item() == pytest.approx(scale, rel=0.2)


def test_explicit_heads_start_as_component_heads():
    same, fewer = attention(build("mea")), attention(build("mea-fewer"))
    assert torch.equal(same.k_mix, torch.eye(4, dtype=torch.float64)) and torch.equal(same.v_mix, same.k_mix)
    assert fewer.k_mix.argmax(0).tolist() == [0, 0, 1, 2]
    assert (fewer.k_mix - torch.nn.functional.one_hot(fewer.k_mix.argmax(0), 3).T).abs().max() < 0.1
    turned = attention(build("mea-orthogonal")).k_mix
    assert torch.allclose(turned @ turned.T, torch.eye(2, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_output_projections_at_zero_make_all_kinds_start_alike(name):
    start, other = (build(kind, zero_init_output=True, tie_word_embeddings=True) for kind in ("mha", name))
    rest = {key: w for key, w in start.state_dict().items() if "self_attn" not in key}
    assert not other.load_state_dict(rest, strict=False).unexpected_keys
    assert torch.equal(logits(start, ids()), logits(other, ids()))
    assert not attention(other).o_proj.weight.any()


# -- what is refused


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attention_layers": []}, ["attention_layers []", "0 to 31", "half or deep"]),
        ({"attention_layers": [1, 1]}, ["attention_layers [1, 1]", "each once"]),
        ({"attention_layers": [32]}, ["attention_layers [32]", "0 to 31"]),
        ({"attention_layers": [True]}, ["attention_layers [True]", "0 to 31"]),
        ({"attention_layers": "most"}, ["attention_layers 'most'", "half or deep"]),
        ({"attention_layers": "deep", "num_hidden_layers": 3}, ["attention_layers []", "0 to 2"]),
        ({"other_attention": {"attention": "mla"}}, ["other_attention", "give that too"]),
        (
            {"attention_layers": [0], "other_attention": {"heads": 3}},
            ["'heads' is no field", "num_key_value_heads"],
        ),
        (
            {"attention_layers": [0], "other_attention": {"attention": "mla"}},
            ["kv_lora_rank None", "'mla' needs"],
        ),
        ({"attention": "mla2"}, ["attention 'mla2'", "choose one of", "lrkv"]),
        ({"lrkv_rope_mode": "half"}, ["lrkv_rope_mode 'half'", "choose one of", "latent"]),
        ({"head_norm": "both"}, ["head_norm 'both'", "choose one of", "shared"]),
        ({"mea_hlc_init": "zero"}, ["mea_hlc_init 'zero'", "choose one of", "orthogonal"]),
        ({"decode": "fast"}, ["decode 'fast'", "choose one of", "absorbed"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "divide num_attention_heads 4", "choose"]),
        ({"num_key_value_heads": -1}, ["num_key_value_heads -1", "at least 1", "choose"]),
        (
            {"attention": "mha", "num_key_value_heads": 2},
            ["num_key_value_heads 2", "'mha' has 4", "choose 'gqa'"],
        ),
        (
            {"attention": "mqa", "num_key_value_heads": 2},
            ["num_key_value_heads 2", "'mqa' has 1", "leave it out"],
        ),
        (
            {"attention": "mea", "mea_num_component_heads": -2},
            ["mea_num_component_heads -2", "at least 1", "leave it out"],
        ),
        (
            {"attention": "mea", "mea_num_component_heads": 0},
            ["mea_num_component_heads 0", "at least 1", "leave it out"],
        ),
        ({"q_lora_rank": 0}, ["q_lora_rank 0", "at least 1", "leave it out"]),
        ({"head_dim": 0}, ["head_dim 0", "at least 1", "leave it out"]),
        ({"head_dim": 7}, ["head_dim 7", "pairs", "even"]),
        ({"attention": "k_eq_v", "qk_rope_head_dim": 3}, ["qk_rope_head_dim 3", "pairs", "even"]),
        ({"attention": "gta", "qk_rope_head_dim": 10}, ["qk_rope_head_dim 10", "up to head_dim 8"]),
        (
            {**LRKV, "lrkv_rope_mode": "partial", "qk_rope_head_dim": -2},
            ["qk_rope_head_dim -2", "from 0 up to head_dim 8"],
        ),
        ({"attention": "mla"}, ["kv_lora_rank None", "'mla' needs", "at least 1"]),
        ({**MLA, "kv_lora_rank": 0}, ["kv_lora_rank 0", "'mla' needs", "at least 1"]),
        ({**MLA, "qk_norm": True}, ["qk_norm True", "latents", "leave it out"]),
        (
            {**MLA, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0},
            ["qk_nope_head_dim 0 and qk_rope_head_dim 0", "give one"],
        ),
        ({**MLA, "qk_nope_head_dim": -1}, ["qk_nope_head_dim -1", "at least 0", "leave it out"]),
        ({**MLA, "v_head_dim": 0}, ["v_head_dim 0", "at least 1", "leave it out"]),
        ({**MLA, "v_head_dim": -1}, ["v_head_dim -1", "at least 1", "leave it out"]),
        ({**LRKV, "lrkv_rank": -1}, ["lrkv_rank -1", "at least 0"]),
        ({**LRKV, "lrkv_init_scale": -0.1}, ["lrkv_init_scale -0.1", "0 or more"]),
        ({**LRKV, "lrkv_rank": 5, "lrkv_rope_mode": "latent"}, ["lrkv_rank 5", "pairs", "even"]),
        ({**LRKV, "decode": "absorbed"}, ["decode 'absorbed'", "rebuilding", "decode='auto'"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_built_is_refused(wrong, said):
    """The field, its value, and what to do instead."""
    with pytest.raises(StrictDataclassClassValidationError) as refusal:
        LowkeyConfig(hidden_size=24, num_attention_heads=4, **{"head_dim": 8, **wrong})
    message = str(refusal.value.__cause__)
    assert isinstance(refusal.value.__cause__, ValueError) and "\n" not in message
    assert [part for part in said if part not in message] == []
