"""Sensitivities against slow computations, and the weights they are read from."""

from __future__ import annotations

import math

import numpy as np
import pico
import pytest
import torch
from pico import attached, build, prompt, stock
from transformers import DynamicCache

from lowkey.calibration.sensitivity import SIGNALS, condition, fisher
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.projections import projection_parts, projections
from lowkey.models.weights import only_trainable

ROWS = prompt(12, batch=3)

every = pytest.mark.parametrize("name", pico.NAMES)


def biased(name):
    """A fresh model whose biases are not zero, as they are after initialisation."""
    model = build(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter)
    return model


def eager(name):
    """A fresh model with the attention that honours soft-capping, as `stock` has."""
    model = build(name)
    model.set_attn_implementation("eager")
    return model


# -- the weights


def project(x, weight, bias):
    """(heads, b, t, d) from inputs (b, t, D), one head after another."""
    return torch.stack([x @ w.T + (0 if bias is None else bias[h]) for h, w in enumerate(weight)])


def by_modules(model, layer, x):
    """Queries, keys and values of the modules themselves, each (b, t, heads, d); no norm is applied."""
    block, shape = families.decoder_layers(model)[layer].self_attn, families.geometry(model)
    if model.config.model_type == "phi3":
        heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        made = block.qkv_proj(x)
        flat = made[..., :heads], made[..., heads : heads + kv], made[..., heads + kv :]
    else:
        flat = block.q_proj(x), block.k_proj(x), block.v_proj(x)
    return [y.unflatten(-1, (-1, shape.head_dim)) for y in flat]


@every
@torch.no_grad()
def test_projections_are_those_of_the_attention_module(name):
    model = biased(name)
    for layer in range(pico.LAYERS):
        x = torch.randn(2, 5, pico.HIDDEN, generator=torch.Generator().manual_seed(layer))
        p = projections(model, layer)
        ours = [
            project(x, *pair).permute(1, 2, 0, 3)
            for pair in ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias))
        ]
        for mine, theirs in zip(ours, by_modules(model, layer, x), strict=True):
            assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-5)


@every
@torch.no_grad()
def test_output_projections_are_those_of_the_attention_module(name):
    model = build(name)
    block = families.decoder_layers(model)[1].self_attn
    o = projections(model, 1).o
    read = torch.randn(2, 5, len(o), pico.HEAD_DIM, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        sum(read[:, :, h] @ o[h].T for h in range(len(o))), block.o_proj(read.flatten(2)), atol=1e-5
    )


@every
@torch.no_grad()
def test_values_and_the_first_keys_are_those_in_a_stock_cache(name):
    """Nothing here is known of a family's modules. At position 0 the rotation is none, up to the scale of its
    cosine.
    """
    model, cache = biased(name), DynamicCache(config=build(name).config)
    hidden = model(ROWS, past_key_values=cache, output_hidden_states=True).hidden_states
    for layer in families.geometry(model).compressible:
        x, p = families.attention_input(model, layer, hidden[layer]), projections(model, layer)
        assert torch.allclose(
            project(x, p.v, p.v_bias).transpose(0, 1), cache.layers[layer].values, atol=1e-5
        )
        scale = families.rope(model, layer)(torch.zeros(1, 1, dtype=torch.long), x)[0].max()
        keys, cached = project(x, p.k, p.k_bias).transpose(0, 1)[:, :, 0], cache.layers[layer].keys[:, :, 0]
        rotating = families.rope(model, layer)(torch.zeros(1, 1, dtype=torch.long), x)[0].shape[-1]
        keys[..., :rotating] *= scale
        assert torch.allclose(keys, cached, atol=1e-5) != p.normed


@every
@torch.no_grad()
def test_a_single_token_reads_its_own_value(name):
    """Its attention is 1 whatever its key, so the block's output is the sum over query heads of o[H] of its
    value.
    """
    model = biased(name)
    shape = families.geometry(model)
    x = torch.randn(1, 1, pico.HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer in shape.compressible:
        p = projections(model, layer)
        values = project(x, p.v, p.v_bias)
        wanted = sum(values[h // shape.groups] @ p.o[h].T for h in range(shape.heads))
        rope = families.rope(model, layer).embeddings(torch.zeros(1, 1, dtype=torch.long), x)
        found = families.decoder_layers(model)[layer].self_attn(
            x, position_embeddings=rope, attention_mask=None
        )[0]
        assert torch.allclose(found, wanted, atol=1e-5)


@every
def test_which_families_norm_their_keys(name):
    block = families.decoder_layers(stock(name))[0].self_attn
    assert projections(stock(name), 0).normed == any("k_norm" in n for n, _ in block.named_parameters())


def test_projections_are_copies_in_fp32_without_gradients():
    model = build("phi3").bfloat16()
    before = {n: p.clone() for n, p in model.named_parameters()}
    p = projections(model, 0)
    for tensor in (p.q, p.k, p.v, p.o):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model = build("llama")
    projections(model, 0).k.zero_()
    assert float(projections(model, 0).k.abs().max()) > 0


# -- fisher


def slowly(model, rows):
    """One backward pass per row and every weight's gradient; the loss token by token."""
    model.zero_grad()
    sums = {}
    for row in rows:
        logits = model(row.unsqueeze(0)).logits[0].float()
        loss = -sum(logits[t].log_softmax(-1)[row[t + 1]] for t in range(len(row) - 1)) / (len(row) - 1)
        loss.backward()
        for layer in families.geometry(model).compressible:
            for side, part in zip("kv", projection_parts(model, layer)[1:], strict=True):
                sums[layer, side] = (
                    sums.get((layer, side), 0) + part.linear.weight.grad[part.rows].float() ** 2
                )
        model.zero_grad()
    means = {key: float((s / len(rows)).sqrt().mean()) for key, s in sums.items()}
    return [(means[layer, "k"], means[layer, "v"]) for layer in families.geometry(model).compressible]


def flat(signal):
    return [x for pair in signal for x in pair]


@every
def test_fisher_is_a_slow_loop_over_samples(name):
    wanted = slowly(eager(name), ROWS)
    assert flat(fisher(stock(name), ROWS, 2)) == pytest.approx(flat(wanted), rel=1e-4)
    assert flat(fisher(attached(name), ROWS, 1)) == pytest.approx(flat(wanted), rel=1e-4)
    assert len(wanted) == len(families.geometry(stock(name)).compressible) and all(
        x > 0 for x in flat(wanted)
    )


def test_fisher_squares_per_sample_not_per_batch():
    """The root mean square over rows, and so neither the order nor the batch matters, and a row twice counts
    twice.
    """
    alone = [flat(fisher(stock("llama"), row.unsqueeze(0), 1)) for row in ROWS]
    together = flat(fisher(stock("llama"), ROWS, 3))
    assert flat(fisher(stock("llama"), ROWS.flip(0), 1)) == pytest.approx(together, rel=1e-5)
    assert flat(fisher(stock("llama"), ROWS[:1].repeat(4, 1), 4)) == pytest.approx(alone[0], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_fisher_of_a_bf16_model_is_near_that_in_fp32(name):
    model = eager(name).bfloat16()
    assert flat(fisher(model, ROWS, 1)) == pytest.approx(flat(fisher(stock(name), ROWS, 1)), rel=0.1)
    assert model.dtype == torch.bfloat16


def marked(name="phi3"):
    """A model with gradients of its own, and parameters that want none."""
    model = build(name)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, i) if i % 4 == 0 else None
    return model, state(model)


def state(model):
    return [
        (p.requires_grad, None if p.grad is None else p.grad.tolist(), p.tolist()) for p in model.parameters()
    ]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_model_is_left_as_it_was(name):
    model, before = marked()
    with torch.no_grad():
        SIGNALS[name](model, ROWS, 1)
        assert not torch.is_grad_enabled()
    assert state(model) == before and not model.training


def test_fisher_leaves_no_gradient_behind():
    model = build("llama")
    fisher(model, ROWS, 1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_is_left_as_it_was_after_an_error():
    model, before = marked()
    with pytest.raises(IndexError):
        fisher(model, ROWS + pico.VOCAB, 1)
    assert state(model) == before


def test_only_the_wanted_parameters_require_gradients():
    model = build("llama")
    weight = projection_parts(model, 1)[2].linear.weight
    with only_trainable([weight], model):
        assert [p is weight for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("rows", [ROWS[:0], ROWS[:, :1], ROWS[0]], ids=["none", "one token", "one dimension"])
def test_rows_without_a_next_token_are_refused(rows):
    with pytest.raises(LowkeyError, match="rows of shape"):
        fisher(stock("llama"), rows, 1)


# -- condition


@every
def test_condition_is_numpys(name):
    model = build(name)
    for layer, found in zip(families.geometry(model).compressible, condition(model, ROWS, 1), strict=True):
        for x, part in zip(found, projection_parts(model, layer)[1:], strict=True):
            assert x == pytest.approx(
                math.log(np.linalg.cond(part.linear.weight[part.rows].detach().double().numpy())), rel=1e-6
            )


def test_condition_of_bad_weights_is_finite():
    model = build("llama")
    blocks = families.decoder_layers(model)
    with torch.no_grad():
        blocks[0].self_attn.k_proj.weight[0] = 0  # rank one less
        blocks[0].self_attn.v_proj.weight.zero_()
        blocks[1].self_attn.k_proj.weight.copy_(3 * torch.eye(pico.HIDDEN))
    most = 23 * math.log(2)
    (k0, v0), (k1, _), _ = condition(model, ROWS, 1)
    assert (k0, v0, k1) == pytest.approx((most, most, 0.0), abs=1e-6)
