"""Every attention kind equals another kind where it is a special case of it, and loops over heads."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from variants import HEAD_DIM, HEADS, HIDDEN, alone, attention, build, hidden, ids, logits, put, share

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM

D = HEAD_DIM
EYE = torch.eye(D, dtype=torch.float64)
BY_HAND = 1e-5  # transformers turns angles in fp32


def close(a: Tensor, b: Tensor, limit: float = 1e-10) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < limit)


def heads(weight: Tensor) -> Tensor:
    """A projection's weight (heads d, D), by heads: (heads, d, D)."""
    return weight.detach().unflatten(0, (-1, D))


def equal_models(a: LowkeyForCausalLM, b: LowkeyForCausalLM, limit: float = 1e-10) -> bool:
    return close(logits(a, ids()), logits(b, ids()), limit)


# -- grouped queries


def test_mqa_is_gqa_of_one_head():
    assert equal_models(build("mqa"), share(build("mqa"), build("gqa", seed=1, num_key_value_heads=1)), 1e-15)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gqa_is_mha_with_repeated_heads(groups):
    gqa = build("gqa", num_key_value_heads=groups)
    mha = share(gqa, build("mha", seed=1))
    for layer in range(2):
        for part in ("k_proj", "v_proj"):
            few = heads(getattr(attention(gqa, layer), part).weight)
            put(
                getattr(attention(mha, layer), part).weight,
                few.repeat_interleave(HEADS // groups, 0).flatten(0, 1),
            )
    assert equal_models(gqa, mha)


def test_a_gate_at_zero_halves_and_a_large_one_is_none():
    plain, gated = build("mha"), build("mha", seed=1, attn_output_gate=True)
    share(plain, gated)
    put(attention(gated).gate_proj.weight, torch.tensor(0.0))
    assert close(alone(gated, hidden()), 0.5 * alone(plain, hidden()))
    x = hidden()
    x[..., 0] = 1.0
    attention(gated).gate_proj.weight.data[:, 0] = 50.0
    assert close(alone(gated, x), alone(plain, x))


def test_head_norm_forgets_the_scale_of_values():
    model, plain = build("mha", head_norm="own", rms_norm_eps=1e-30), build("mha")
    before = [alone(m, hidden()) for m in (model, plain)]
    for m in (model, plain):
        heads(attention(m).v_proj.weight).mul_(torch.tensor([0.3, 2.0, 1.0, 7.0])[:, None, None])
    after = [alone(m, hidden()) for m in (model, plain)]
    assert close(before[0], after[0]) and not close(before[1], after[1], 0.1)


def test_shared_head_norm_is_own_head_norm_of_one_weight():
    own, shared = build("mha", head_norm="own"), build("mha", head_norm="shared")
    share(shared, own)
    put(attention(own).head_norm.weight, attention(shared).head_norm.weight.expand(HEADS, D))
    assert close(alone(own, hidden()), alone(shared, hidden()), 1e-15)


# -- low-rank keys and values


@pytest.mark.parametrize("mode", ["full", "latent", "partial"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lrkv_of_rank_0_is_gqa(groups, mode):
    turned = {"qk_rope_head_dim": D, "lrkv_rope_mode": mode}
    gqa = build("gqa", num_key_value_heads=groups, qk_norm=True)
    lrkv = share(gqa, build("lrkv-nothing", seed=1, num_key_value_heads=groups, qk_norm=True, **turned))
    assert torch.equal(logits(gqa, ids()), logits(lrkv, ids()))


@pytest.mark.parametrize("mode", ["full", "latent", "partial"])
def test_lrkv_without_up_maps_is_lrkv_of_rank_0(mode):
    nothing = build("lrkv-nothing", num_key_value_heads=1, lrkv_rope_mode=mode)
    model = share(nothing, build("lrkv-full", seed=1, lrkv_rope_mode=mode))
    for layer in model.model.layers:
        layer.self_attn.k_up.data.zero_()
        layer.self_attn.v_up.data.zero_()
    assert equal_models(model, nothing, 1e-12)


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_lrkv_of_full_rank_is_mha(mode):
    """Shared: the mean head; low-rank part: what is missing, times the identity."""
    mha = build("mha")
    model = share(
        mha,
        build(
            "lrkv-full",
            seed=1,
            lrkv_rank=D,
            lrkv_rope_mode=mode,
            qk_rope_head_dim=0 if mode == "partial" else None,
        ),
    )
    for layer in range(2):
        into, source = attention(model, layer), attention(mha, layer)
        for which in "kv":
            every = heads(getattr(source, f"{which}_proj").weight)
            put(getattr(into, f"{which}_proj").weight, every.mean(0))
            put(getattr(into, f"{which}_down").weight, (every - every.mean(0)).flatten(0, 1))
            put(getattr(into, f"{which}_up"), EYE.expand(HEADS, D, D))
    if mode == "full":
        assert equal_models(model, mha)
    still = torch.zeros(1, 10, dtype=torch.long)  # nothing is rotated at position 0
    assert close(alone(model, hidden(), still), alone(mha, hidden(), still))


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_moving_weight_from_shared_to_low_rank_changes_nothing(mode):
    model, x = build("lrkv-full", lrkv_rope_mode=mode), hidden()
    before, layer = alone(model, x), attention(model)
    wider = share(model, build("lrkv-full", seed=1, lrkv_rope_mode=mode, lrkv_rank=4 + 1))
    put(attention(wider).o_proj.weight, layer.o_proj.weight)
    for which in "kv":
        down, up = getattr(layer, f"{which}_down").weight, getattr(layer, f"{which}_up")
        u, b = torch.randn(HIDDEN, dtype=torch.float64), torch.randn(up.shape[-1], dtype=torch.float64)
        shared = getattr(attention(wider), f"{which}_proj").weight
        shared.data[: len(b)] += torch.outer(b, u)
        every = torch.cat((down.detach().unflatten(0, (HEADS, -1)), -u.expand(HEADS, 1, -1)), 1)
        put(getattr(attention(wider), f"{which}_down").weight, every.flatten(0, 1))
        put(getattr(attention(wider), f"{which}_up"), torch.cat((up.detach(), b.expand(HEADS, 1, -1)), 1))
    assert close(alone(wider, x), before)


def test_rotated_latents_times_the_up_map_are_not_rotated_keys():
    """The published identity; why `full` rebuilds its keys."""
    model, x = build("lrkv-full", lrkv_rank=6), hidden(length=12)
    layer = attention(model)
    latents, up = (x[0] @ layer.k_down.weight.T).unflatten(-1, (HEADS, -1)).transpose(0, 1), layer.k_up
    true, published = turned(latents @ up), turned(latents) @ up
    assert ((true - published).norm() / true.norm()).item() > 0.1


def test_full_rank_rotation_cannot_be_read_absorbed():
    with pytest.raises(StrictDataclassClassValidationError, match=r"decode 'absorbed'.*latent"):
        LowkeyConfig(attention="lrkv", lrkv_rank=4, decode="absorbed")


# -- explicit heads


@pytest.mark.parametrize("norm", ["none", "shared"])
@pytest.mark.parametrize("groups", [2, 4])
def test_mea_of_identity_is_grouped_attention_with_its_head_norm(groups, norm):
    mea = build("mea", num_key_value_heads=groups, head_norm=norm)
    assert equal_models(mea, share(mea, build("gqa", seed=1, num_key_value_heads=groups, head_norm=norm)))


def test_mea_of_one_hot_columns_is_gqa():
    gqa = build("gqa")
    mea = share(gqa, build("mea", seed=1, mea_num_component_heads=2, head_norm="none"))
    choice = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    mixed(mea, choice)
    assert equal_models(mea, gqa)


def test_mea_of_one_component_is_mqa():
    mqa = build("mqa")
    mea = share(mqa, build("mea", seed=1, mea_num_component_heads=1, head_norm="none"))
    mixed(mea, torch.ones(1, HEADS))
    assert equal_models(mea, mqa)


def mixed(model, mix):
    for layer in model.model.layers:
        put(layer.self_attn.k_mix, mix)
        put(layer.self_attn.v_mix, mix)


@pytest.mark.parametrize("name", ["mea", "mea-fewer", "mea-fewer-absorbed", "mea-fewer-expanded"])
def test_the_order_of_components_changes_nothing(name):
    model = build(name)
    randomly_mixed(model)
    before = logits(model, ids())
    for layer in model.model.layers:
        part = layer.self_attn
        order = torch.randperm(part.components)
        for which in "kv":
            weight, mix = getattr(part, f"{which}_proj").weight, getattr(part, f"{which}_mix")
            put(weight, heads(weight)[order].flatten(0, 1))
            put(mix, mix.detach()[order])
    assert close(logits(model, ids()), before)


@pytest.mark.parametrize("groups", [2, 4])
def test_mea_absorbed_is_mea_expanded(groups):
    expanded = build("mea-fewer-expanded", num_key_value_heads=groups, mea_num_component_heads=groups - 1)
    randomly_mixed(expanded)
    absorbed = build(
        "mea-fewer-absorbed", seed=1, num_key_value_heads=groups, mea_num_component_heads=groups - 1
    )
    assert equal_models(expanded, share(expanded, absorbed))


def randomly_mixed(model):
    for layer in model.model.layers:
        for mix in (layer.self_attn.k_mix, layer.self_attn.v_mix):
            put(mix, torch.randn_like(mix))


def test_mea_is_mla_whose_up_map_is_a_mix_of_whole_heads():
    """W_UK = W (x) I, at position 0, where nothing is rotated."""
    mea = build("mea-fewer")
    randomly_mixed(mea)
    source, m = attention(mea), 3
    widths = {"kv_lora_rank": 2 * m * D, "qk_nope_head_dim": D, "qk_rope_head_dim": 0, "v_head_dim": D}
    mla = share(mea, build("mla", seed=1, mla_kv_norm=False, head_norm="shared", **widths))
    into = attention(mla)
    put(into.kv_a_proj.weight, torch.cat((source.k_proj.weight, source.v_proj.weight)))
    up = torch.zeros(HEADS, 2 * D, 2 * m * D, dtype=torch.float64)
    for head in range(HEADS):
        up[head, :D, : m * D] = torch.kron(source.k_mix[:, head].detach()[None], EYE)
        up[head, D:, m * D :] = torch.kron(source.v_mix[:, head].detach()[None], EYE)
    put(into.kv_b_proj.weight, up.flatten(0, 1))
    assert close(alone(mla, hidden()), alone(mea, hidden(), torch.zeros(1, 10, dtype=torch.long)))


# -- latents


def test_mla_absorbed_is_mla_expanded():
    expanded = build("mla-expanded")
    for name in ("mla", "mla-absorbed"):
        assert equal_models(expanded, share(expanded, build(name, seed=1)))


def test_mla_that_is_wide_enough_is_mha_without_positions():
    mha, c = build("mha"), 2 * HEADS * D
    widths = {"kv_lora_rank": c, "qk_nope_head_dim": D, "qk_rope_head_dim": 0, "v_head_dim": D}
    mla = share(mha, build("mla", seed=1, mla_kv_norm=False, **widths))
    into, source = attention(mla), attention(mha)
    put(into.kv_a_proj.weight, torch.cat((source.k_proj.weight, source.v_proj.weight)))
    chosen = torch.eye(c, dtype=torch.float64).unflatten(0, (2, HEADS, D)).transpose(0, 1)
    put(into.kv_b_proj.weight, chosen.flatten(0, 2))
    assert close(alone(mla, hidden()), alone(mha, hidden(), torch.zeros(1, 10, dtype=torch.long)))


def test_latent_scale_is_a_scale_of_the_norms():
    plain, scaled = build("mla", q_lora_rank=10), build("mla-scaled", seed=1)
    share(plain, scaled)
    for norm, width in ((attention(plain).kv_a_norm, 12), (attention(plain).q_proj.norm, 10)):
        norm.weight.data.mul_((HIDDEN / width) ** 0.5)
    assert close(alone(plain, hidden()), alone(scaled, hidden()))


# -- one tensor for keys and values


def test_gta_without_a_rotated_slice_has_keys_equal_to_values():
    gta = build("gta-no-slice", qk_norm=True)
    assert equal_models(gta, share(gta, build("k_eq_v", seed=1, qk_rope_head_dim=0, qk_norm=True)))
    gqa = share(gta, build("gqa", seed=1, qk_norm=True))
    for part in ("k_proj", "v_proj"):
        put(getattr(attention(gqa), part).weight, attention(gta).kv_proj.weight)
    attention(gqa).k_norm = torch.nn.Identity()
    attention(gta).kv_norm = torch.nn.Identity()
    assert close(alone(gta, hidden()), alone(gqa, hidden(), torch.zeros(1, 10, dtype=torch.long)))


# -- written out


def turned(x: Tensor, width: int | None = None, back: bool = False, interleaved: bool = False) -> Tensor:
    """The last `width` dimensions of x (..., t, d) rotated, pair by pair, token by token."""
    width = x.shape[-1] if width is None else width
    out, start = x.clone(), x.shape[-1] - width
    for t in range(x.shape[-2]):
        for i in range(width // 2):
            angle = torch.tensor(t * 10000.0 ** (-2 * i / width), dtype=torch.float64) * (-1 if back else 1)
            a, b = (start + 2 * i, start + 2 * i + 1) if interleaved else (start + i, start + i + width // 2)
            out[..., t, a] = x[..., t, a] * angle.cos() - x[..., t, b] * angle.sin()
            out[..., t, b] = x[..., t, b] * angle.cos() + x[..., t, a] * angle.sin()
    return out


def naive(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One head (t, d), token by token."""
    rows = []
    for t in range(len(query)):
        weights = torch.softmax(torch.stack([query[t] @ key[s] * scale for s in range(t + 1)]), 0)
        rows.append(sum(w * value[s] for s, w in enumerate(weights)))
    return torch.stack(rows)


def queries(layer, x: Tensor) -> Tensor:
    return (x @ layer.q_proj.weight.T).unflatten(-1, (HEADS, -1)).transpose(0, 1)


def together(layer, outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, -1) @ layer.o_proj.weight.T


def lrkv(model, x: Tensor, mode: str, interleaved: bool = False) -> Tensor:
    """arXiv:2601.11471, equations (1) to (4), and our two modes, with the matrices W_shared + U B^T."""
    layer, groups, e = attention(model), model.config.num_key_value_heads, model.config.qk_rope_head_dim
    outputs, q = [], queries(layer, x)
    for i in range(HEADS):
        g = i // (HEADS // groups)
        shared_k, shared_v = (heads(p.weight)[g].T for p in (layer.k_proj, layer.v_proj))
        u_k, u_v = (p.weight.unflatten(0, (HEADS, -1))[i].T for p in (layer.k_down, layer.v_down))
        value = x @ (shared_v + u_v @ layer.v_up[i])
        if mode == "full":
            query, key = (
                turned(q[i], None, False, interleaved),
                turned(x @ (shared_k + u_k @ layer.k_up[i]), None, False, interleaved),
            )
        elif mode == "latent":
            key = torch.cat((turned(x @ shared_k), turned(x @ u_k)), -1)
            query = torch.cat((turned(q[i]), turned(q[i] @ layer.k_up[i].T)), -1)
        else:
            up = torch.cat((layer.k_up[i], torch.zeros(u_k.shape[1], e)), 1)
            query, key = turned(q[i], e), turned(x @ (shared_k + u_k @ up), e)
        outputs.append(naive(query, key, value, D**-0.5))
    return together(layer, outputs)


@pytest.mark.defines("attention kinds", "lrkv")
@pytest.mark.parametrize("decode", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["full", "latent", "partial"])
@torch.no_grad()
def test_lrkv_by_hand(mode, groups, decode):
    if (mode, decode) == ("full", "absorbed"):
        return
    model, x = (
        build("lrkv-full", lrkv_rope_mode=mode, num_key_value_heads=groups, decode=decode),
        hidden(batch=1),
    )
    assert close(alone(model, x)[0], lrkv(model, x[0], mode), BY_HAND)


@torch.no_grad()
def test_rotation_turns_halves_not_neighbours():
    model, x = build("lrkv-full"), hidden(batch=1)
    assert not close(alone(model, x)[0], lrkv(model, x[0], "full", interleaved=True), 1e-2)


@pytest.mark.defines("attention kinds", "mla")
@pytest.mark.parametrize("name", ["mla", "mla-absorbed", "mla-narrow", "mla-nope", "mla-no-slice"])
@torch.no_grad()
def test_mla_by_hand(name):
    model, x = build(name), hidden(batch=1)
    layer, c = attention(model), model.config.kv_lora_rank
    n, e, v = model.config.qk_nope_head_dim, model.config.qk_rope_head_dim, model.config.v_head_dim
    latent, shared = (x[0] @ layer.kv_a_proj.weight.T).split([c, e], -1)
    latent = (
        latent
        / (latent.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        * layer.kv_a_norm.weight
    )
    e_turned = e if model.config.mla_rotate else 0
    outputs = []
    for query, up in zip(
        queries(layer, x[0]), layer.kv_b_proj.weight.unflatten(0, (HEADS, n + v)), strict=True
    ):
        key = torch.cat((latent @ up[:n].T, turned(shared, e_turned)), -1)
        outputs.append(naive(turned(query, e_turned), key, latent @ up[n:].T, (n + e) ** -0.5))
    assert close(alone(model, x)[0], together(layer, outputs), BY_HAND)


@pytest.mark.defines("attention kinds", "mha", "gqa", "mqa")
@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
@torch.no_grad()
def test_grouped_attention_by_hand(name):
    model, x = build(name, qk_norm=False), hidden(batch=1)
    layer, stored = attention(model), model.config.num_key_value_heads
    keys, values = (
        (x[0] @ p.weight.T).unflatten(-1, (stored, D)).transpose(0, 1) for p in (layer.k_proj, layer.v_proj)
    )
    outputs = [
        naive(turned(query), turned(keys[i * stored // HEADS]), values[i * stored // HEADS], D**-0.5)
        for i, query in enumerate(queries(layer, x[0]))
    ]
    assert close(alone(model, x)[0], together(layer, outputs), BY_HAND)


@pytest.mark.defines("attention kinds", "gta")
@torch.no_grad()
def test_gta_by_hand():
    model, x = build("gta", qk_norm=False), hidden(batch=1)
    layer, e = attention(model), model.config.qk_rope_head_dim
    slice_ = turned(x[0] @ layer.k_rope_proj.weight.T)
    tied = (x[0] @ layer.kv_proj.weight.T).unflatten(-1, (2, D)).transpose(0, 1)
    outputs = [
        naive(turned(query, e), torch.cat((tied[i // 2][:, : D - e], slice_), -1), tied[i // 2], D**-0.5)
        for i, query in enumerate(queries(layer, x[0]))
    ]
    assert close(alone(model, x)[0], together(layer, outputs), BY_HAND)


@pytest.mark.defines("attention kinds", "k_eq_v")
@pytest.mark.parametrize("e", [4, 8])
@torch.no_grad()
def test_keys_that_are_values_by_hand(e):
    """Values are seen from the query: turned by the distance, not by the position."""
    model, x = build("k_eq_v", qk_rope_head_dim=e), hidden(batch=1)
    layer = attention(model)
    tied = turned((x[0] @ layer.kv_proj.weight.T).unflatten(-1, (2, D)).transpose(0, 1), e)
    outputs = [
        turned(naive(turned(query, e), tied[i // 2], tied[i // 2], D**-0.5), e, True)
        for i, query in enumerate(queries(layer, x[0]))
    ]
    assert close(alone(model, x)[0], together(layer, outputs), BY_HAND)


@pytest.mark.defines("attention kinds", "mea")
@torch.no_grad()
def test_mea_by_hand():
    model, x = build("mea-fewer"), hidden(batch=1)
    randomly_mixed(model)
    layer = attention(model)
    keys, values = (
        (x[0] @ p.weight.T).unflatten(-1, (3, D)).transpose(0, 1) for p in (layer.k_proj, layer.v_proj)
    )
    outputs = []
    for i, query in enumerate(queries(layer, x[0])):
        key = sum(layer.k_mix[c, i] * keys[c] for c in range(3))
        value = sum(layer.v_mix[c, i] * values[c] for c in range(3))
        out = naive(turned(query), turned(key), value, D**-0.5)
        outputs.append(
            out
            / (out.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
            * layer.head_norm.weight
        )
    assert close(alone(model, x)[0], together(layer, outputs), BY_HAND)
