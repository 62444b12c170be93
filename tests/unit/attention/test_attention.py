"""Models of every attention kind give the same logits however the text is fed, stored or compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import yarn_apply_mscale
from variants import (
    LAYERS,
    ONE_OF_EACH,
    UNROTATED,
    VARIANTS,
    VOCAB,
    attention,
    build,
    config,
    empty_cache,
    ids,
    logits,
)

from lowkey.attention import register
from lowkey.attention.modeling_lowkey import LowkeyForCausalLM, LowkeyModel

each = pytest.mark.parametrize("name", VARIANTS)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
EXACT, ROUNDED = 1e-9, 1e-4  # transformers turns angles in fp32: other positions are other roundings


def close(a: torch.Tensor, b: torch.Tensor, limit: float = EXACT) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < limit)


# -- decoding


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each
def test_decoding_is_the_full_forward(name, cache):
    """Token by token, in chunks, batch 2 of which one row is padded on the left, and a second text after the
    first.
    """
    model, tokens, pads = build(name), ids(14), [4, 0]
    full = pico.feed(model, tokens, pads=pads)
    for splits in ([1] * 14, [5, 3, 1, 1, 4], [14]):
        got = pico.feed(model, tokens, empty_cache(cache, model), pads, splits)
        assert close(pico.real(got, pads), pico.real(full, pads)), splits
    past = empty_cache(cache, model)
    pico.feed(model, tokens[:, :8], past, pads, [7, 1])
    assert close(pico.feed(model, tokens[:, 8:], past, pads, [4, 1, 1]), full[:, 8:])


@each
def test_padding_changes_nothing(name):
    model, tokens = build(name), ids(10, batch=1)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), 1)
    assert close(pico.feed(model, padded, pads=[3])[:, 3:], pico.feed(model, tokens))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each
def test_padding_between_two_turns_changes_nothing(name, cache):
    """A second turn padded on the left, in one piece or several, of which some end in padding or are nothing
    else.
    """
    model, tokens = build(name), ids(14)
    mask = torch.ones_like(tokens)
    mask[0, 8:11] = 0
    alone = pico.feed(model, tokens[:1][:, mask[0] == 1])[0]
    for splits in ([8, 6], [8, 3, 3], [6, 4, 4], [9, 1, 1, 1, 2]):
        got = pico.feed(model, tokens, empty_cache(cache, model), splits=splits, mask=mask)
        assert close(got[0][mask[0] == 1], alone), splits
        assert close(got[1:], pico.feed(model, tokens[1:])), splits


@each
def test_eager_attention_gives_the_same(name):
    model, tokens = build(name).float(), ids()
    fused = pico.feed(model, tokens, pads=[2, 0])
    model.set_attn_implementation("eager")
    assert close(pico.feed(model, tokens, pads=[2, 0])[:, 2:], fused[:, 2:], ROUNDED)


@one_of_each
def test_generate_on_both_caches_and_with_beams(name):
    model, tokens = build(name), ids(9)
    greedy = pico.generate(model, tokens, 5, pads=[3, 0])
    assert torch.equal(greedy, pico.generate(model, tokens, 5, pads=[3, 0], cache_implementation="static"))
    beams = pico.generate(model, tokens, 5, pads=[3, 0], num_beams=3)
    for row, start in enumerate([3, 0]):
        single = tokens[row : row + 1, start:]
        assert torch.equal(greedy[row], pico.generate(model, single, 5)[0])
        assert torch.equal(beams[row], pico.generate(model, single, 5, num_beams=3)[0])


# -- positions

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}


@each
def test_what_a_token_alone_reads_does_not_depend_on_rotation(name):
    """It sees itself only, so its output is its value, whatever rotations are scaled by."""
    plain, scaled = build(name), build(name, rope_parameters=YARN)
    rope = scaled.model.rotary_emb(torch.ones(1, 1, 1), torch.zeros(1, 1))
    assert rope.cos.numel() == 0 or rope.scaling > 1.2
    assert close(logits(plain, ids(1)), logits(scaled, ids(1)), ROUNDED / 100)


@pytest.mark.parametrize("mscale", [None, 1.0])
def test_latent_attention_has_deepseeks_temperature(mscale):
    rope = YARN | ({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {})
    assert attention(build("mla", rope_parameters=rope)).scaling == pytest.approx(
        yarn_apply_mscale(rope, 10**-0.5)
    )


@each
def test_shifting_all_positions_changes_nothing(name):
    model, tokens, positions = build(name), ids(), torch.arange(12)[None]
    plain = logits(model, tokens)
    assert close(logits(model, tokens, position_ids=positions + 17), plain, ROUNDED)
    # stretched positions, told to the layers alone: transformers takes gaps for new documents
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(stretched(model), with_kwargs=True)
    assert close(logits(model, tokens), plain, ROUNDED) == (name in UNROTATED)


def stretched(model):
    def hook(module, args, kwargs):
        positions = 5 * kwargs["position_ids"]
        return args, kwargs | {
            "position_ids": positions,
            "position_embeddings": model.model.rotary_emb(kwargs["hidden_states"], positions),
        }

    return hook


@each
def test_attention_is_causal(name):
    model, tokens = build(name), ids(batch=1)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] - 1) % (VOCAB - 2) + 2
    moved = (logits(model, tokens) - logits(model, changed)).abs().amax(-1)[0]
    assert (moved[:6] == 0).all() and (moved[6:] > 1e-6).all()


@each
def test_packed_documents_do_not_see_each_other(name):
    model, first, second = build(name), ids(5, batch=1), ids(8, batch=1, seed=1)
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    packed = logits(model, torch.cat((first, second), 1), position_ids=positions)
    assert close(packed, torch.cat((logits(model, first), logits(model, second)), 1))


# -- training


@pytest.mark.parametrize("name", ONE_OF_EACH[1:])  # mha is gqa
def test_compiled_training_is_training(name):
    model, tokens = build(name, num_hidden_layers=1).train(), ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    packed = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    losses = [m(tokens, labels=tokens, position_ids=packed, use_cache=False).loss for m in (model, compiled)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert close(losses[0], losses[1], 1e-12)
    assert all(close(a, b, 1e-12) for a, b in zip(*grads, strict=True))


@each
def test_gradients_reach_every_parameter(name):
    model, tokens = build(name).train(), ids()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@each
def test_dropout_acts_in_training_in_every_form(name):
    model, tokens = build(name, attention_dropout=0.5, num_hidden_layers=1), ids()
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    model.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))


def test_an_adapter_around_the_up_map_takes_effect():
    """Absorbed reading takes the weight apart; what is wrapped around it is heard when it is called."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    wrapped, tokens = build("mla"), ids()
    for layer in wrapped.model.layers:
        layer.self_attn.kv_b_proj.__class__ = Adapter
    full = pico.feed(wrapped, tokens)
    assert not close(full, pico.feed(build("mla"), tokens))
    assert close(pico.feed(wrapped, tokens, empty_cache("dynamic", wrapped), splits=[8, 1, 1, 1, 1]), full)
    wrapped.config.decode = "absorbed"
    with pytest.raises(
        ValueError, match=r"decode 'absorbed': kv_b_proj is wrapped \(Adapter\).*use decode='auto'"
    ):
        logits(wrapped, tokens)


@one_of_each
def test_checkpointed_gradients_are_gradients(name):
    model, tokens = build(name).train(), ids()
    plain = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters()))
    assert all(close(a, b, 1e-12) for a, b in zip(plain, again, strict=True))


@one_of_each
def test_gradients_match_finite_differences(name):
    """Of the attention's own parameters, along one random direction each, against central differences."""
    model, tokens, step = build(name, num_hidden_layers=1), ids(6, batch=1), 1e-5
    parameters = {key: p for key, p in model.named_parameters() if "self_attn" in key}
    grads = torch.autograd.grad(model(tokens).logits.log_softmax(-1)[..., 0].sum(), list(parameters.values()))
    for (key, p), grad in zip(parameters.items(), grads, strict=True):
        way, ends = torch.randn_like(p), []
        for move in (step, -2 * step, step):
            p.data.add_(way, alpha=move)
            ends.append(logits(model, tokens).log_softmax(-1)[..., 0].sum())
        assert torch.isclose((ends[0] - ends[1]) / (2 * step), (grad * way).sum(), rtol=1e-5, atol=1e-6), key


@one_of_each
def test_bfloat16_autocast_trains_without_a_warning(name):
    model, tokens = build(name).float().train(), ids()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(tokens, labels=tokens, use_cache=False).loss
    narrow.backward()
    assert close(narrow, model(tokens, labels=tokens, use_cache=False).loss, 0.3)


# -- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@one_of_each
def test_a_saved_model_is_the_model(name, dtype, tmp_path):
    register()
    build(name, tie_word_embeddings=name == "mea-fewer").to(dtype).save_pretrained(tmp_path / "first")
    # `.to` narrows the rotation too
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto"), ids()
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto")
    assert type(again) is LowkeyForCausalLM and again.dtype == dtype
    assert {k: v for k, v in again.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"
    }
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    inner = AutoModel.from_pretrained(tmp_path / "first", dtype="auto")
    assert type(inner) is LowkeyModel
    assert torch.equal(
        inner(tokens).last_hidden_state, model(tokens, output_hidden_states=True).hidden_states[-1]
    )
    assert torch.equal(pico.generate(model, tokens, 4), pico.generate(again, tokens, 4))


STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lowkey":
            raise ModuleNotFoundError("lowkey is not installed here")

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModel, AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    tokens = torch.load(f"{folder}/tokens.pt")
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert type(inner).__name__ == "LowkeyModel"
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        assert torch.equal(inner(tokens).last_hidden_state, states[-1])
        new = model.generate(tokens, max_new_tokens=4, do_sample=False)
        torch.save({"logits": model(tokens).logits, "new": new}, f"{folder}/out.pt")
assert not [m for m in sys.modules if m.split(".")[0] == "lowkey"]
"""


def test_a_checkpoint_loads_where_lowkey_is_not_installed(tmp_path):
    """The code lies beside the weights: a process that cannot import lowkey loads a kind of every file."""
    register()
    models = {
        name: build(name) for name in ("gqa-controls", "mla", "lrkv-latent", "mea-fewer", "gta", "lrkv-some")
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        torch.save(ids(), tmp_path / name / "tokens.pt")
    places = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    folders = [str(tmp_path / name) for name in models]
    done = subprocess.run(
        [sys.executable, script, *folders],
        env=os.environ | places,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        out = torch.load(Path(tmp_path / name / "out.pt"))
        assert torch.equal(out["logits"], logits(model, ids())), name
        assert torch.equal(out["new"], model.generate(ids(), max_new_tokens=4, do_sample=False)), name


def test_every_layer_has_the_attention_that_was_asked_for():
    assert len(build("mla").model.layers) == LAYERS
    assert {type(layer.self_attn).__name__ for layer in build("mla").model.layers} == {"LatentAttention"}
    assert [type(layer.self_attn).__name__ for layer in build("mla-some").model.layers] == [
        "LatentAttention",
        "LowRankKV",
    ]
    assert [type(layer.self_attn).__name__ for layer in build("mea-some").model.layers] == [
        "ExplicitAttention",
        "GroupedQuery",
    ]


HALVES = [("half", 48, range(11, 35)), ("half", 6, [1, 2, 3]), ("half", 4, [1, 2]), ("half", 2, [1])]


@pytest.mark.parametrize(
    ("layers", "count", "meant"), [*HALVES, ("deep", 48, range(3, 48)), ([3, 1], 4, [1, 3]), (None, 4, None)]
)
def test_names_of_subsets_are_the_papers(layers, count, meant):
    """arXiv:2601.19611: the 12th to the 35th of 48 layers, and all but the first three."""
    found = config("mea", attention_layers=layers, num_hidden_layers=count).attention_layers
    assert found == (None if meant is None else list(meant))


def test_layers_left_out_store_what_mea_composes_or_every_head():
    """And nothing of the kind that is named: no head norm, no latents."""
    mea, lrkv = (
        config(name, attention_layers=[0], other_attention=None).others for name in ("mea-some", "lrkv-some")
    )
    assert (mea.attention, mea.num_key_value_heads, mea.head_norm) == ("gqa", 2, "none")
    assert (lrkv.attention, lrkv.num_key_value_heads, lrkv.lrkv_rank) == ("gqa", 4, 0)


def test_layers_left_out_follow_the_models_choice_of_a_kernel():
    model = build("mea-some")
    fused, other = logits(model, ids()), model.model.layers[1].self_attn
    model.set_attn_implementation("eager")
    assert other.whole is model.config and close(logits(model, ids()), fused, ROUNDED)
    with torch.no_grad():
        weights = model(ids(), output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, 4, 12, 12)] * 2
