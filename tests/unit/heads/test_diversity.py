"""How different heads are: measures and maps of every attention kind against explicit matrices."""

from __future__ import annotations

import json
import math

import pico
import pytest
import torch
from attention_kinds import HEADS, HIDDEN, KINDS, MLA, D, own
from transformers import AttentionInterface

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM
from lowkey.core.types import LowkeyError
from lowkey.heads import diversity as div
from lowkey.heads.diversity import (
    attention_divergence,
    centred,
    circuit,
    diversity,
    effective_rank,
    js_divergence,
    operator_cosines,
    weight_diversity,
)
from lowkey.models import families
from lowkey.models.attention_interface import ATTENTION_NAME
from lowkey.models.projections import head_maps

NORMED = {
    **{name: {**KINDS[name], "qk_norm": True} for name in ("gqa", "lrkv-full", "mea", "gta-0", "k_eq_v")},
    "mla": MLA,
    "low-rank queries": {"attention": "mha", "q_lora_rank": 6},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def handed(model: LowkeyForCausalLM, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the first layer hands the attention function when all tokens are at position 0, so that nothing is
    rotated: queries, and keys and values of every query head."""
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append([query, *(x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))])
        return value.new_zeros(len(query), query.shape[2], HEADS, value.shape[-1]), None

    AttentionInterface.register("spy", spy)
    block, model.config._attn_implementation = model.model.layers[0].self_attn, "spy"
    model.config.decode = "expanded"
    block(
        hidden,
        unrotated(hidden.shape[1], model.config.rope_width),
        position_ids=torch.zeros(1, hidden.shape[1], dtype=torch.long),
    )
    return tuple(seen[0])


def unrotated(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, tokens, width, dtype=torch.float64), torch.zeros(
        1, tokens, width, dtype=torch.float64
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


# -- cosines and effective ranks


def test_cosines_are_those_of_the_operators_written_out():
    left, right = random(HEADS, D, HIDDEN), random(HEADS, D, HIDDEN, seed=1)
    operators = [a.T @ b for a, b in zip(left, right, strict=True)]
    expected = [[float((a * b).sum() / (a.norm() * b.norm())) for a in operators] for b in operators]
    assert same(operator_cosines(left, right), torch.tensor(expected, dtype=torch.float64))


def test_centred_gram_is_that_of_operators_less_their_mean():
    flat = random(HEADS, HIDDEN)
    flat = flat / flat.norm(dim=1, keepdim=True)
    less = flat - flat.mean(0)
    assert same(centred(flat @ flat.T), less @ less.T)


def test_effective_rank_counts_directions():
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0]))) == pytest.approx(2)
    shares = [0.5, 0.3, 0.2]
    assert effective_rank(torch.diag(torch.tensor(shares))) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares))
    )


def test_orthogonal_heads_are_as_many_as_can_be():
    basis = torch.eye(HIDDEN, dtype=torch.float64).view(HEADS, D, HIDDEN)
    found = circuit(basis, basis)
    assert found["uncentred"] == pytest.approx(1) and found["centred"] == pytest.approx(1)
    assert found["centred_of_heads"] == pytest.approx((HEADS - 1) / HEADS), (
        "the paper's number cannot pass its ceiling"
    )
    assert found["mean_cosine"] == pytest.approx(0)


def test_identical_heads_count_as_one():
    left, right = (random(1, D, HIDDEN, seed=i).expand(HEADS, -1, -1) for i in (0, 1))
    found = circuit(left, right)
    assert found["uncentred"] == pytest.approx(1 / HEADS) and found["mean_cosine"] == pytest.approx(1)
    assert found["centred"] == pytest.approx(1 / (HEADS - 1)) and found["centred_of_heads"] == pytest.approx(
        1 / HEADS
    )


def test_zero_heads_and_single_heads_give_none_and_never_nan():
    nothing = circuit(torch.zeros(HEADS, D, HIDDEN), torch.zeros(HEADS, D, HIDDEN))
    assert nothing["uncentred"] is nothing["centred"] is None and not torch.tensor(nothing["cosines"]).any()
    one = circuit(random(1, D, HIDDEN), random(1, D, HIDDEN, seed=1))
    assert one["uncentred"] == pytest.approx(1) and one["centred"] is None
    left = random(HEADS, D, HIDDEN)
    left[0] = 0
    some = circuit(left, random(HEADS, D, HIDDEN, seed=1))
    assert 0.6 < some["uncentred"] <= 0.75 and some["cosines"][0] == [0] * HEADS


def test_numbers_do_not_depend_on_the_basis_of_a_head():
    q, k, turn = random(HEADS, D, HIDDEN), random(HEADS, D, HIDDEN, seed=1), random(HEADS, D, D, seed=2)
    assert same(operator_cosines(q, k), operator_cosines(turn.mT @ q, torch.linalg.inv(turn) @ k))
    assert not same(operator_cosines(q, k), operator_cosines(turn.mT @ q, k))


# -- the maps of every kind


@pytest.mark.parametrize("name", KINDS)
def test_maps_make_the_keys_values_and_scores_of_the_layer(name):
    model, hidden = own(**KINDS[name]), random(1, 5, HIDDEN)
    block = model.model.layers[0].self_attn
    query, keys, values = handed(model, hidden)
    maps = block.head_maps()
    q, k, v = (torch.einsum("btD,hdD->bhtd", hidden, m) for m in maps[:3])
    if name == "lrkv-latent":  # handed side by side: the shared part, and latents
        shared, up_k, up_v = keys[..., :D], block.k_up, block.v_up
        keys, values = shared + keys[..., D:] @ up_k, values[..., :D] + values[..., D:] @ up_v
        query = query[..., :D]
    width, reach = k.shape[-1], v.shape[-1]
    assert same(q, query) and same(k, keys[..., :width]) and same(v, values[..., :reach])
    scores = q[..., :width] @ k.mT
    if maps.key_slice is not None and name == "mla":
        assert width == 6, "keys without the slice"
        scores = scores + q[..., width:] @ (hidden @ maps.key_slice.T).unsqueeze(1).mT
    assert same(scores, query @ keys.mT)


@pytest.mark.parametrize("name", NORMED)
def test_maps_hold_the_weights_of_norms(name):
    """What norms divide by is one number per token and head (all heads, for latents), so directions must
    agree.
    """
    model, hidden = own(**NORMED[name]), random(1, 5, HIDDEN)
    block = model.model.layers[0].self_attn
    if name == "mea":  # whose component heads are each divided by a number of their own: none are mixed here
        block.k_mix = torch.nn.Parameter(
            torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 2, 0]], dtype=torch.float64)
        )
    query, keys, values = handed(model, hidden)
    maps = block.head_maps()
    for m, expected in zip(maps[:3], (query, keys, values), strict=True):
        found = torch.einsum("btD,hdD->bhtd", hidden, m)
        width = min(found.shape[-1], 6) if name == "mla" else found.shape[-1]
        cosine = torch.nn.functional.cosine_similarity(found[..., :width], expected[..., :width], dim=-1)
        assert same(cosine, torch.ones_like(cosine))


def test_output_maps_sum_to_the_layer():
    """With head norm and a weight of each head's own, heads of length sqrt(d) are not changed by what the
    norm divides by.
    """
    model = own(**KINDS["mea-grouped"])
    block, heads = model.model.layers[0].self_attn, random(1, 5, HEADS, D)
    heads = heads / heads.norm(dim=-1, keepdim=True) * D**0.5
    with torch.no_grad():
        expected = block.finish(heads, random(1, 5, HIDDEN))
    assert same(torch.einsum("bthd,hDd->btD", heads, block.head_maps().o), expected)


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "phi3", "qwen3", "gemma3_text", "olmo2", "granite"])
def test_maps_of_stock_models(name):
    """Against keys and values in transformers' own cache at position 0, where nothing is rotated, up to what
    norms divide by.
    """
    model = pico.build(name)
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if "_norm" in where:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        out = model(pico.prompt(1), use_cache=True, output_hidden_states=True)
    for i, layer in enumerate(out.past_key_values.layers):
        maps, inputs = (
            head_maps(model, i),
            families.attention_input(model, i, out.hidden_states[i]).detach(),
        )
        stored = (x.repeat_interleave(len(maps.q) // x.shape[1], 1) for x in (layer.keys, layer.values))
        for m, expected in zip(maps[1:3], stored, strict=True):
            cosine = torch.nn.functional.cosine_similarity(
                torch.einsum("btD,hdD->bhtd", inputs, m), expected, dim=-1
            )
            assert float(cosine.min()) > 1 - 1e-5


def test_a_model_of_sliding_layers_only_has_heads_too():
    model = pico.build("mistral", sliding_window=16)
    assert len(weight_diversity(model)) == pico.LAYERS


@torch.no_grad()
def test_parts_of_lrkv():
    model = own(**KINDS["lrkv-partial"])
    block = model.model.layers[0].self_attn
    maps = block.head_maps()
    assert same(maps.k - maps.k_residual, block.k_proj.weight.expand(HEADS, -1, -1))
    found = div.of_maps(maps)["residual"]
    residual = [
        torch.cat((up.T @ down, torch.zeros(4, HIDDEN)))
        for up, down in zip(block.k_up, block.k_down.weight.split(3), strict=True)
    ]
    shared = block.k_proj.weight
    assert found["keys"]["residual_norm"] == pytest.approx(sum(float(r.norm()) for r in residual) / HEADS)
    assert found["keys"]["shared_over_residual"] == pytest.approx(
        sum(float(shared.norm() / r.norm()) for r in residual) / HEADS
    )
    expected = [float((shared * r).sum() / (shared.norm() * r.norm())) for r in residual]
    assert found["keys"]["cosines"] == pytest.approx(expected) and found["keys"]["cosine"] == pytest.approx(
        sum(expected) / HEADS
    )
    block.v_up.zero_()
    values = div.of_maps(block.head_maps())["residual"]["values"]
    assert values["shared_over_residual"] is None and values["cosine"] == 0


def test_fresh_lrkv_starts_with_a_small_residual():
    sizes = {"hidden_size": 256, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 4, "head_dim": 64, "attention": "lrkv", "lrkv_rank": 24}
    config = LowkeyConfig(**sizes, **heads)
    torch.manual_seed(0)
    residual = div.of_maps(LowkeyForCausalLM(config).model.layers[0].self_attn.head_maps())["residual"]
    assert 8 < residual["keys"]["shared_over_residual"] < 12.5 and abs(residual["keys"]["cosine"]) < 0.05


# -- whole models


def test_random_heads_are_near_the_ceiling():
    config = LowkeyConfig(
        hidden_size=128,
        intermediate_size=16,
        num_hidden_layers=2,
        vocab_size=8,
        num_attention_heads=8,
        attention="mha",
    )
    torch.manual_seed(0)
    for layer in weight_diversity(LowkeyForCausalLM(config)):
        for kind in ("qk", "vo"):
            assert 0.99 < layer[kind]["centred"] <= 1 and 0.99 < layer[kind]["uncentred"] <= 1


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith("a-0")])
def test_every_kind_is_measured_and_beside_it_its_random_form(name):
    model = own(**KINDS[name])
    found = diversity(
        model, pico.tokenizer(), "It was a dark and stormy night. " * 8, windows=2, context=16, inits=1
    )
    json.dumps(found, allow_nan=False)
    assert len(found["layers"]) == 2 and found["heads"] == HEADS
    for layer in found["layers"]:
        assert 0 < layer["js"] < 1 and 1 / HEADS - 1e-9 < layer["qk"]["uncentred"] <= 1 + 1e-9
        assert layer["init"]["qk_centred"]["mean"] > 0 and (layer["residual"] is None) == (
            name[:4] != "lrkv" or name == "lrkv-0"
        )
        assert (layer["key_slice"] is not None) == (name in ("mla", "gta"))


def test_zero_output_projections_have_no_random_reference():
    model = own(attention="lrkv", lrkv_rank=2, zero_init_output=True)
    found = diversity(
        model, pico.tokenizer(), "It was a dark and stormy night. " * 8, windows=1, context=16, inits=2
    )
    assert found["layers"][0]["vo"]["uncentred"] and found["layers"][0]["init"]["vo_uncentred"] is None
    assert found["mean"]["init"]["vo_uncentred"] is None


def test_random_forms_follow_the_seed_and_keep_the_global_state():
    model, text = pico.build("llama"), "It was a dark and stormy night. " * 8
    state = torch.random.get_rng_state()
    one, again, other = (
        diversity(model, pico.tokenizer(), text, windows=1, context=16, inits=2, seed=s) for s in (0, 0, 7)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert (
        one == again
        and one["layers"][0]["init"] != other["layers"][0]["init"]
        and one["layers"][0]["qk"] == other["layers"][0]["qk"]
    )
    band = one["layers"][1]["init"]["qk_centred"]
    assert band["low"] < band["mean"] < band["high"]


# -- attention maps


def test_js_divergence_against_loops():
    weights = torch.softmax(3 * random(2, 3, 4, 5), -1)
    weights[0, 0, 0] = torch.tensor([1.0, 0, 0, 0, 0])

    def js(p: list[float], q: list[float]) -> float:
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        parts = [[a * math.log2(a / m) for a, m in zip(x, middle, strict=True) if a > 0] for x in (p, q)]
        return sum(map(sum, parts)) / 2

    found = js_divergence(weights)
    for b in range(2):
        for t in range(4):
            rows = weights[b, :, t].tolist()
            pairs = [js(rows[i], rows[j]) for i in range(3) for j in range(i)]
            assert float(found[b, t]) == pytest.approx(sum(pairs) / 3, abs=1e-6)


def test_js_divergence_ends_at_nothing_and_one_bit():
    apart = torch.eye(4).view(1, 4, 1, 4)
    assert (
        float(js_divergence(apart)) == pytest.approx(1)
        and float(js_divergence(apart[:, :1].expand(-1, 4, -1, -1))) == 0
    )


def test_attention_divergence_is_the_mean_over_queries():
    model, ids = pico.attached("gemma3_text"), pico.prompt(24, 3)
    model.train()
    found = attention_divergence(model, ids)
    assert model.config._attn_implementation == ATTENTION_NAME and model.training
    model.eval()
    with torch.no_grad():
        maps = pico.stock("gemma3_text")(ids, output_attentions=True).attentions
    assert found == pytest.approx([float(js_divergence(w)[:, 1:].mean()) for w in maps], abs=1e-6)


def test_a_layer_of_one_head_has_no_divergence():
    assert (
        attention_divergence(
            pico.build("llama", num_attention_heads=1, num_key_value_heads=1), pico.prompt(8, 1)
        )
        == [None] * pico.LAYERS
    )


def test_text_too_short_is_refused():
    with pytest.raises(LowkeyError, match=r"data: .* too few"):
        diversity(pico.build("llama"), pico.tokenizer(), "Short.", windows=1, context=64)
