"""Palu and LoRC against explicit singular value decompositions of (whitened) weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import LAYER, LENGTH, RANKS, joint_rows, model_of, prepared, rebuilt, recorded
from pico import HEAD_DIM
from torch import Tensor

from lowkey.core.types import LowkeyError
from lowkey.methods import LoRC, Palu
from lowkey.models import families
from lowkey.ops.commuting import rotated_moment
from lowkey.ops.rope import rotate

# -- Palu


@pytest.mark.defines("methods", "palu")
@pytest.mark.parametrize("rank", [2, 4, 9])
@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_whitened_svd_of_the_weights_is_pca_of_what_they_make(t, rank):
    """Cholesky of X^T X and the SVD of S^T W, as the paper computes it; only in a model without biases is it
    the same.
    """
    statistics, probe = prepared("llama", "pre_rope")
    bases, seen = Palu(group=t).fit(statistics, probe, RANKS, 0), recorded("llama", "pre_rope")
    attention = families.decoder_layers(probe.model)[LAYER].self_attn
    with torch.no_grad():
        x = (
            families.attention_input(probe.model, LAYER, probe.inputs[: probe.training_count])
            .flatten(0, 1)
            .double()
        )
    s = torch.linalg.cholesky(x.mT @ x)
    for basis, linear, name in (
        (bases.keys, attention.k_proj, "keys"),
        (bases.values, attention.v_proj, "values"),
    ):
        assert basis.merge == t
        groups = linear.weight.detach().double().mT.split(t * HEAD_DIM, dim=1)  # (D, t d) each
        low = []
        for w in groups:
            u, singular, vt = torch.linalg.svd(s.mT @ w, full_matrices=False)
            down = torch.linalg.solve(s.mT, u[:, : t * rank] * singular[: t * rank])
            low.append(x @ down @ vt[: t * rank])
        ours = rebuilt(joint_rows(seen[name]), basis, rank)
        assert torch.allclose(ours, torch.cat(low, 1), atol=2e-4 * float(ours.abs().max()))


# -- LoRC


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, singular, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * singular[:rank]) @ vt[:rank])


@pytest.mark.defines("methods", "lorc")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_lorc_is_the_truncated_svd_of_the_weights(scope, name):
    """With its bias as the weight of one more input."""
    model = model_of(name)
    bases = LoRC(scope=scope).fit(*prepared(name, "pre_rope"), RANKS, 0)
    h, attention = families.geometry(model).kv_heads, families.decoder_layers(model)[LAYER].self_attn
    for basis, linear in ((bases.keys, attention.k_proj), (bases.values, attention.v_proj)):
        w = linear.weight.detach().double().mT
        w = w if linear.bias is None else torch.cat([w, linear.bias.detach().double().unsqueeze(0)])
        parts = w.split(w.shape[1] if scope == "layer" else HEAD_DIM, dim=1)
        expected = torch.cat([truncated(p, 5 * (h if scope == "layer" else 1)) for p in parts], 1)
        assert torch.allclose(rebuilt(w, basis, 5), expected, atol=1e-4)


def test_lorc_reads_no_data(layout):
    statistics, probe = prepared("llama", layout)
    other, _ = prepared("llama", layout, 2)
    a, b = (LoRC().fit(s, probe, RANKS, 0) for s in (statistics, other))
    assert torch.equal(a.keys.columns, b.keys.columns) and torch.equal(a.values.columns, b.values.columns)


def test_whitened_lorc_is_palu_over_all_heads(layout):
    statistics, probe = prepared("llama", layout)
    plain, whitened, palu = (
        m.fit(statistics, probe, RANKS, 0) for m in (LoRC(), LoRC(whiten=True), Palu(group=4))
    )
    assert torch.equal(whitened.keys.columns, palu.keys.columns) and torch.equal(
        whitened.values.columns, palu.values.columns
    )
    seen = recorded("llama", layout)
    for side in ("keys", "values"):
        x = joint_rows(seen[side])
        errors = [float((x - rebuilt(x, getattr(b, side), 5)).norm()) for b in (whitened, plain)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_lorc_refuses_keys_of_which_the_weights_say_nothing(scope):
    with pytest.raises(LowkeyError, match="whiten=true"):
        LoRC(scope=scope).fit(*prepared("qwen3", "pre_rope"), RANKS, 0)


@pytest.mark.parametrize("name", ["llama", "phi3-partial"])
def test_white_inputs_rotated_to_every_position(name):
    """The moment that LoRC takes under `post_rope`, from rows rotated one position after another."""
    probe = prepared(name, "post_rope")[1]
    rows = torch.randn(2, 7, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))  # (head, row, 1, d)
    cos, sin = (1.3 * x[0] for x in probe.rope(torch.arange(30).unsqueeze(0), rows))  # scaled as YaRN does
    joint = rows[:, :, 0].transpose(0, 1).flatten(1).double()
    total = torch.zeros(2 * HEAD_DIM, 2 * HEAD_DIM, dtype=torch.float64)
    for p in range(30):
        moved = (
            rotate(rows, cos[:, p : p + 1], sin[:, p : p + 1])[:, :, 0].transpose(0, 1).flatten(1).double()
        )
        total += moved.mT @ moved
    assert torch.allclose(rotated_moment(joint.mT @ joint, HEAD_DIM, cos[0], sin[0]), total / 30, atol=1e-5)


def test_rotated_keys_use_white_keys_at_all_positions():
    _, probe = prepared("qwen2", "post_rope")
    basis = LoRC().fit(*prepared("qwen2", "post_rope"), RANKS, 0).keys
    linear = families.decoder_layers(probe.model)[LAYER].self_attn.k_proj
    # (D + 1, h d): of each input alone, and of none
    keys = torch.cat([linear.weight.detach().mT, linear.bias.detach().unsqueeze(0)])
    cos, sin = (x[0] for x in probe.rope(torch.arange(LENGTH).unsqueeze(0), keys))
    heads = keys.unflatten(1, (4, HEAD_DIM)).transpose(0, 1).unsqueeze(2).expand(-1, -1, LENGTH, -1)
    everywhere = rotate(heads, cos, sin).transpose(0, 1).transpose(1, 2).flatten(0, 1).flatten(1).double()
    kept = (everywhere @ basis.columns[0, :, : 4 * 5].double()).square().sum()
    assert float(kept) == pytest.approx(
        float((np.linalg.svd(everywhere.numpy(), compute_uv=False)[: 4 * 5] ** 2).sum()), rel=1e-5
    )
