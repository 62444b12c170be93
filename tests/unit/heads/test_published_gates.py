"""The published gates of Fast KVzip, which read hidden states, as gates of queries, keys and values."""

from __future__ import annotations

import pico
import pytest
import torch
from pico import attached, feed, prompt

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.heads.published_gates import PublishedGates, convert_gates
from lowkey.policies import FastKVzip
from lowkey.policies.allocators import AtLeast
from lowkey.policies.gates import Gates

HEADS, GROUPS = 2, 2  # of the pico model of qwen2, whose projections have biases


def published(hidden=pico.HIDDEN, layers=pico.LAYERS, seed=0):
    """Gates as their authors save them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "k_base": (HEADS, 1, 16, 16),
        "b": (HEADS, 1, GROUPS),
        "q_proj.weight": (HEADS * GROUPS * 16, hidden),
        "q_proj.bias": (HEADS * GROUPS * 16,),
        "k_proj.weight": (HEADS * 16, hidden),
        "q_norm.weight": (16,),
        "k_norm.weight": (16,),
    }
    return [{n: torch.randn(s, generator=generator) for n, s in sizes.items()} for _ in range(layers)]


def saved(path, states, **more):
    torch.save({"module": states, "loss": [0.5], **more}, path)
    return path


def published_scores(state, x, bias=1):
    """The published formula, of hidden states (t, D) as they enter the attention: (h, t)."""

    def normal(y, weight):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    state = {name: t.double() for name, t in state.items()}
    q = (x @ state["q_proj.weight"].T + state["q_proj.bias"]).view(len(x), HEADS, GROUPS, 16)
    k = (x @ state["k_proj.weight"].T).view(len(x), HEADS, 1, 16)
    q, k = normal(q, state["q_norm.weight"]), normal(k, state["k_norm.weight"])
    logit = (q * k).sum(-1) / 4 + bias * state["b"][:, 0]
    base = torch.einsum("thgw,hsw->thgs", q, state["k_base"][:, 0]) / 4
    return (1 / (1 + (base - logit[..., None]).exp().sum(-1))).mean(-1).T


def biased():
    """A model of qwen2 whose biases are not 0, as transformers begins them."""
    model = pico.build("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    return lowkey.attach(model)


@pytest.mark.parametrize("bias", [1, 2])
def test_scores_are_those_of_the_hidden_states(tmp_path, bias):
    model, ids, states = biased(), prompt(30, batch=1), published()
    gates = convert_gates(model, saved(tmp_path / "q2.pt", states), PublishedGates(bias))
    cache = lowkey.make_cache(model, policy=FastKVzip(None, AtLeast(0.0)), gates=gates)
    hidden = []
    handles = [
        layer.input_layernorm.register_forward_hook(lambda m, x, out: hidden.append(out[0].double()))
        for layer in model.model.layers
    ]
    feed(model, ids, cache)
    for handle in handles:
        handle.remove()
    for layer, state, x in zip(cache.evicting, states, hidden, strict=True):
        found = layer.rows_scores.view(HEADS, len(x)).double()
        assert torch.allclose(found, published_scores(state, x, bias), atol=2e-4)
        assert float((found - published_scores(state, x, 3 - bias)).abs().max()) > 0.05
    gates.save(tmp_path / "gates")
    about = Gates.load(tmp_path / "gates").settings
    assert (about["source"], about["bias_factor"]) == ("published", bias) and ":" in about["file_sha256"]


def altered(states, change):
    change(states)
    return states


FILES = {
    "of another number of layers": (published(layers=2), ["no gates of 3 layers"]),
    "of another width": (published(hidden=32), ["layer 0 is not of this model's shape"]),
    "with a tensor too many": (altered(published(), lambda s: s[1].update(b2=torch.ones(1))), ["layer 1"]),
    "without a tensor": (altered(published(), lambda s: s[2].pop("b")), ["layer 2"]),
    "not finite": (altered(published(), lambda s: s[1]["b"].fill_(torch.nan)), ["layer 1", "not finite"]),
    "no list": ({"a": torch.ones(2)}, ["no gates of 3 layers"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_refused(tmp_path, kind):
    states, said = FILES[kind]
    with pytest.raises(LowkeyError) as error:
        convert_gates(attached("qwen2"), saved(tmp_path / "q2.pt", states))
    line = str(error.value)
    assert all(word in line for word in [*said, "published for this model", "lowkey gates"]), line
    assert "\n" not in line


def test_models_that_hide_their_hidden_states_are_refused(tmp_path):
    path = saved(tmp_path / "q2.pt", published())
    for name in ("qwen3", "olmo2", "gemma3_text"):
        with pytest.raises(LowkeyError, match=r"passed a norm; train gates with `lowkey gates"):
            convert_gates(attached(name), path)
    narrow = lowkey.attach(pico.build("llama", num_attention_heads=1, num_key_value_heads=1))
    states = published()
    for state in states:  # one head of 16 channels: 48 numbers of a hidden state of 64
        state |= {"k_base": state["k_base"][:1], "b": state["b"][:1, :, :1]}
        state |= {"q_proj.weight": state["q_proj.weight"][:16], "q_proj.bias": state["q_proj.bias"][:16]}
        state["k_proj.weight"] = state["k_proj.weight"][:16]
    with pytest.raises(LowkeyError, match=r"layer 0 do not tell its hidden state .* of a gate is lost"):
        convert_gates(narrow, saved(tmp_path / "q1.pt", states))
