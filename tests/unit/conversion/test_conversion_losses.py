"""Conversions that lose something lose what theory says: singular values, whitening, aligned heads."""

from __future__ import annotations

import pico
import pytest
import torch
from conversions import ALIGNED, IDS, D, H, build, equal, logits
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.attention import LowkeyForCausalLM
from lowkey.conversion import convert, gauge, input_moments, kinds, source

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
def test_low_rank_of_a_wide_map_is_best_for_its_outputs(tokens: int) -> None:
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
