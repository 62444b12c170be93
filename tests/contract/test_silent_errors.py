"""Situations that would give wrong results without an error.

Adapters, masks, sliding layers beside evicting ones, and state that is used after its time.
"""

from __future__ import annotations

import copy
import json

import pico
import pytest
import torch
from torch import nn

import lowkey
from lowkey.cache.cache import load_cache, make_cache
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.sinks import find_sinks
from lowkey.core.types import LowkeyError
from lowkey.methods.kvlatent import KVLatent
from lowkey.models.fingerprint import model_fingerprint
from lowkey.models.projections import projections
from lowkey.policies import POLICIES
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.storage.exact import Exact

TEXT = "".join(
    chr(97 + int(i) % 26) for i in torch.randint(0, 26, (3000,), generator=torch.Generator().manual_seed(0))
)
SLIDING = [
    ["full_attention", "sliding_attention", "full_attention"],
    ["sliding_attention", "full_attention", "full_attention"],
]


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> bool:
    return bool((a - b).abs().max() < limit)


@pytest.mark.parametrize("types", SLIDING)
@pytest.mark.parametrize(("policy", "question"), [("snapkv", 6), ("kvzip", 0)])
def test_sliding_layers_forget_what_only_scores(types, policy, question):
    model = lowkey.attach(pico.build("gemma3_text", layer_types=types, sliding_window=8))
    context, asked, more = pico.prompt(30, 1), pico.prompt(6, 1, seed=2), pico.prompt(5, 1, seed=3)
    cache = make_cache(model, policy=POLICIES[policy]("100%"))
    lowkey.prefill(
        model, pico.tokenizer(), cache, torch.cat([context, asked], 1) if question else context, question
    )
    assert cache.nbytes() == cache.predicted_nbytes()
    got = pico.feed(model, torch.cat([asked, more], 1), cache)
    assert close(got, pico.feed(model, torch.cat([context, asked, more], 1))[:, 30:])


def test_a_mask_that_hides_what_is_stored_is_refused():
    """Padding is not held by a cache with a policy, so an earlier token cannot be told from it."""
    model, cache = (
        pico.attached("llama"),
        make_cache(pico.attached("llama"), policy=POLICIES["snapkv"]("100%")),
    )
    pico.feed(model, pico.prompt(30), cache, [4, 0], [10, 20])
    pico.feed(model, pico.prompt(4), cache, [4, 0], [3, 1])
    mask = torch.ones(2, 38).long()
    mask[:, :10] = 0
    with pytest.raises(LowkeyError, match="differs from that of earlier turns"):
        model(pico.prompt(4), attention_mask=mask, past_key_values=cache)


def test_a_prompt_padded_on_the_right_is_refused():
    mask = torch.ones(2, 60).long()
    mask[0, 40:] = 0
    cache = make_cache(pico.attached("llama"), policy=POLICIES["snapkv"]("20 tokens"))
    with pytest.raises(LowkeyError, match="pad on the left"):
        pico.attached("llama")(pico.prompt(60), attention_mask=mask, past_key_values=cache)


def test_sinks_are_sought_with_causal_attention():
    """Eager attention without a mask would look ahead."""
    model, rows = pico.build("llama"), pico.prompt(40, 4)
    model.set_attn_implementation("eager")
    want = [hidden.clone() for _, hidden in layer_inputs(pico.attached("llama"), rows, 4)]
    with pytest.warns(UserWarning, match="no attention sinks"):
        find_sinks(model, rows)
    assert all(
        close(got, hidden) for (_, got), hidden in zip(layer_inputs(model, rows, 4), want, strict=True)
    )


def test_hadamard_does_not_mix_channels_of_different_frequencies():
    model, ids = pico.attached("llama"), pico.prompt(40, 1)
    plan = calibrate(
        model, pico.tokenizer(), TEXT, method=KVLatent(rope="aware"), budget="50%", sample=Sample(4, 64)
    )
    want = pico.feed(model, ids, make_cache(model, plan))
    assert close(pico.feed(model, ids, make_cache(model, plan, bits="hadamard8")), want, 0.1)


class TrainableModel(nn.Module):
    """What peft makes of a linear map."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.active_adapters, self.disable_adapters = base, ["a"], False
        self.more = nn.Parameter(
            torch.randn(base.weight.shape, generator=torch.Generator().manual_seed(base.out_features)) * 0.1
        )
        self.in_features, self.weight, self.bias = base.in_features, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.more.mT


def adapted(merge: bool) -> nn.Module:
    model = pico.build("qwen2")  # with biases
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wrapped = TrainableModel(getattr(layer.self_attn, name))
            if merge:
                wrapped.base_layer.weight.data.add_(wrapped.more.data)
            else:
                setattr(layer.self_attn, name, wrapped)
    return lowkey.attach(model)


def test_weights_are_those_of_the_module_with_its_adapter():
    with_adapter, merged = (projections(adapted(m), 1) for m in (False, True))
    for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"):
        assert close(getattr(with_adapter, name), getattr(merged, name), 1e-5), name


def test_a_model_with_another_adapter_is_another_model():
    model = adapted(merge=False)
    found = {model_fingerprint(model)}
    layer = model.model.layers[0].self_attn.q_proj
    layer.active_adapters = ["b"]
    found.add(model_fingerprint(model))
    layer.disable_adapters = True
    found.add(model_fingerprint(model))
    assert len(found) == 3


def test_quantised_weights_are_not_calibrated():
    model = pico.build("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.ones(96, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(LowkeyError, match=r"mlp.up_proj.weight of layer 0 is quantised"):
        lowkey.probes.layer_probe.layer_in_fp32(model, 0)


def test_a_reset_cache_evicts_again():
    model, cache = (
        pico.attached("llama"),
        make_cache(pico.attached("llama"), policy=POLICIES["snapkv"]("20 tokens")),
    )
    lowkey.prefill(model, pico.tokenizer(), cache, pico.prompt(60, 1), 5)
    cache.reset()
    pico.feed(model, pico.prompt(60, 1), cache)
    assert sum(len(kept) for kept in cache.kept_positions(0)) == 4 * 20


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_a_saved_cache_remembers_how_chunks_see_themselves(policy, tmp_path):
    model = pico.attached("llama")
    cache = make_cache(model, pico.plan(model), POLICIES[policy]("20 tokens") if policy else None)
    cache.exact_prefill(True)
    pico.feed(model, pico.prompt(30), cache)
    cache.save(tmp_path / "cache")
    again = load_cache(tmp_path / "cache", model)
    assert torch.equal(
        pico.feed(model, pico.prompt(9, seed=3), again), pico.feed(model, pico.prompt(9, seed=3), cache)
    )


def test_a_calibration_goes_on_with_the_same_batches_only(tmp_path):
    model, work = pico.attached("llama"), tmp_path / "work"

    def stopping(items, label, total=None):
        for n, item in enumerate(items):
            if n == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, pico.tokenizer(), TEXT, sample=Sample(16, 32, batch=1), work=work, progress=stopping)
    assert json.loads(next(work.glob("*/job.json")).read_text())["job"]["batch"] == 1


def test_calibration_is_not_done_with_dropout():
    model = copy.deepcopy(pico.attached("llama")).train()
    with pytest.raises(LowkeyError, match=r"model.eval\(\)"):
        calibrate(lowkey.attach(model), pico.tokenizer(), TEXT, sample=Sample(4, 32))


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: POLICIES["snapkv"]("50%", window=0), "window 0"),
        (lambda: POLICIES["think"]("50%", looked=0), "looked 0"),
        (lambda: Exact(prefill="Exact"), "prefill 'Exact'"),
        (lambda: Exact(recent=-1), "recent -1"),
        (lambda: calibrate(pico.attached("llama"), pico.tokenizer(), []), "tokens are too few"),
    ],
)
def test_values_that_mean_nothing_are_refused(act, says):
    with pytest.raises(LowkeyError, match=says):
        act()
