"""Recipes, schedules, what goes to which optimizer, and when a loss has diverged."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch import nn

from lowkey.core.types import LowkeyError
from lowkey.pretraining import Recipe, models
from lowkey.pretraining.health import diverged, spikes
from lowkey.pretraining.optim import optimizers, rate, split_parameters
from lowkey.pretraining.recipe import Training

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_of_the_project_are_read_and_written_back(path):
    found = Recipe.read(path)
    assert found.training.steps > 10 and Recipe.of(tomllib.loads(found.toml())) == found


def test_every_kind_of_value_survives_a_file():
    tables = {
        "model": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "layer_types": ["a", "b"],
            "x": 'quo"te\\ é',
        },
        "data": {"path": "some 'where'", "options": {"data_files": ["a", "b"]}},
        "training": {
            "tokens": 1e6,
            "lr": 1,
            "betas": [0.9, 0.99],
            "log_with": ["tensorboard"],
            "compile": True,
            "min_lr": 1e-5,
        },
    }
    found = Recipe.of(tables)
    assert (
        found.training.tokens == 1_000_000
        and type(found.training.tokens) is int
        and type(found.training.lr) is float
    )
    assert Recipe.of(tomllib.loads(found.toml())) == found


def test_settings_replace_fields(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[training]\nlr = 1.0\n")
    settings = [
        "training.lr=1e-4",
        "data.path=/some/where",
        "model.hidden_size=64",
        "training.log_with=['trackio']",
    ]
    found = Recipe.read(path, settings)
    assert (found.training.lr, found.data.path, found.model, found.training.log_with) == (
        1e-4,
        "/some/where",
        {"hidden_size": 64},
        ("trackio",),
    )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trainig": {}}, "did you mean 'training'"),
        ({"training": 3}, "is a table"),
        ({"training": {"batch_token": 1}}, "did you mean 'batch_tokens'"),
        ({"data": {"file": "x"}}, "choose one of path"),
        ({"training": {"lr": "fast"}}, "must be a finite number"),
        ({"training": {"seed": True}}, "must be a whole number"),
        ({"training": {"seed": 1.5}}, "must be a whole number"),
        ({"training": {"compile": 1}}, "true or false"),
        ({"training": {"betas": [0.9]}}, "a list of 2"),
        ({"training": {"seed": 2**63}}, "at most 9223372036854775807"),
        ({"training": {"tokens": 1e30}}, "at most 9223372036854775807"),
        ({"training": {"log_with": "tensorboard"}}, "must be a list, each text"),
        ({"model": {"path": 5}}, "model.path 5: must be text"),
        (
            {"model": {"path": "tiny"}, "data": {"vocab_size": 1024}},
            "data.vocab_size 1024: the model of model.path has its own tokenizer",
        ),
        ({"training": {"betas": [0.9, 1.0]}}, "below 1"),
        ({"training": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"training": {"lr": 0.0}}, "above 0"),
        ({"training": {"lr": float("nan")}}, "must be a finite number, above 0"),
        ({"training": {"length": 300}}, "multiple of length"),
        ({"training": {"tokens": 8191}}, "fewer than batch_tokens"),
        ({"training": {"warmup": 0.9}}, "longer than all"),
        ({"training": {"save_every": 0}}, "at least 1"),
        ({"data": {"held_out": 0.95}}, "below 0.9"),
        ({"data": {"vocab_size": 100}}, "at least 260"),
        ({"data": {"vocab_size": 300, "tokenizer": "x"}}, "drop one"),
    ],
)
def test_bad_recipes_are_one_line(tables, message):
    with pytest.raises(LowkeyError, match=message) as error:
        Recipe.of(tables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("[training", "cannot be read"), ("", "as table.field=value")],
)
def test_bad_files_and_settings_are_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.toml").write_text(text)
    with pytest.raises(LowkeyError, match=message):
        Recipe.read(tmp_path / "r.toml", ["training=3"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "is empty"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"model_type": "lama", "hidden_size": 32}, "did you mean 'llama'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "is refused"),
        ({"hidden_size": "x"}, "hidden_size 'x': must be a whole number"),
        *[({name: 0}, f"{name} 0: must be a whole number of at least 1") for name in models.SIZE_FIELDS],
        ({"attention": "lrkv", "lrkv_rank": 10**6}, "lrkv_rank 1000000: must be at most 65536"),
        ({"attention": "gqa", "num_hidden_layers": -1}, "num_hidden_layers -1: must be"),
        (
            {"hidden_size": 32, "attention_dropout": 1.0},
            "attention_dropout 1.0: must be a number from 0 and below 1",
        ),
        ({"hidden_size": 32, "dtype": "int8"}, "dtype 'int8': weights are trained in fp32"),
        ({"hidden_size": 32, "hidden_act": "foo"}, "no model can be made of"),
        (
            {"attention": "gqa", "model_type": "bert"},
            "model_type 'bert': a model with attention 'gqa' is lowkey's own",
        ),
        ({"path": "./nowhere"}, "model './nowhere': no such folder"),
        ({"hidden_size": 32, "vocab_size": 50}, "the tokenizer's ids go up to 96"),
        ({"hidden_size": 32, "max_position_embeddings": 8}, "the model has 8 positions"),
    ],
)
def test_bad_models_are_one_line(table, message):
    with pytest.raises(LowkeyError, match=message) as error:
        models.build(table, pico.tokenizer(), 16)
    assert "\n" not in str(error.value)


def test_a_model_takes_what_the_tokenizer_and_the_rows_say():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = models.build(small, pico.tokenizer(), 16).config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (
        97,
        0,
        None,
        16,
    )
    assert models.build({**small, "model_type": "qwen3"}, pico.tokenizer(), 16).config.model_type == "qwen3"


# -- schedules: 100 steps


def rates(**training: object) -> np.ndarray:
    settings = Training(tokens=100 * 256, batch_tokens=256, **training)
    return np.array([rate(settings)(step) for step in range(100)])


def test_wsd_rises_stays_and_falls_in_lines():
    found = rates(schedule="wsd", warmup=0.1, decay=0.2, min_lr=0.0)
    wanted = [*((k + 1) / 10 for k in range(10)), *[1.0] * 70, *((20 - k) / 20 for k in range(20))]
    assert np.allclose(found, wanted)
    assert (rates(schedule="wsd", warmup=5, decay=0.0)[4:] == 1).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_cosine_and_linear_fall_from_the_peak_to_the_least(schedule):
    found = rates(schedule=schedule, warmup=10, min_lr=0.1)
    assert np.allclose(found[:10], np.arange(1, 11) / 10) and (np.diff(found[9:]) < 0).all()
    share = np.arange(0, 91) / 91
    falling = 0.5 + 0.5 * np.cos(np.pi * share) if schedule == "cosine" else 1 - share
    assert np.allclose(found[9:], 0.1 + 0.9 * falling)


# -- what goes where


class Odd(nn.Module):
    """Stands for an attention with thin factors."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_down, self.gate_proj = (nn.Linear(8, n, bias=True) for n in (8, 6, 8))
        self.k_up, self.k_mix = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.eye(2))


@pytest.mark.parametrize("tied", [True, False])
def test_only_hidden_matrices_are_decayed_and_go_to_muon(tied):
    model = pico.build("llama", tie_word_embeddings=tied)
    model.model.layers[0].self_attn = Odd()
    hidden, others = split_parameters(model)
    assert set(hidden) | set(others) == {name for name, _ in model.named_parameters()} and not set(
        hidden
    ) & set(others)
    first = {name.removeprefix("model.layers.0.") for name in hidden if ".0." in name}
    assert first == {f"self_attn.{n}.weight" for n in ("q_proj", "k_down")} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    ends = {name.rsplit(".", 1)[-1] if "layers" in name else name for name in others}
    assert ends - {"weight", "bias", "k_up", "k_mix", "lm_head.weight"} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    for name, count in (("adamw", 1), ("muon", 2)):
        made = optimizers(model, Training(optimizer=name, weight_decay=0.3))
        groups = [g for optimizer in made for g in optimizer.param_groups]
        assert len(made) == count and [g["weight_decay"] for g in groups] == [0.3, 0.0]
        assert [{id(p) for p in g["params"]} for g in groups] == [
            {id(p) for p in part.values()} for part in (hidden, others)
        ]


# -- health: 1000 steps, smoothed over 50


def noisy(level: np.ndarray, seed: int = 0) -> list[float]:
    return (level + 0.05 * np.random.default_rng(seed).standard_normal(len(level))).tolist()


@pytest.mark.parametrize(
    ("level", "bad"),
    [
        (np.linspace(7, 3, 1000), False),
        (np.full(1000, 3.0), False),  # continued training that gains nothing
        (np.concatenate([np.linspace(7, 4, 500), np.full(500, 8.0)]), True),
        # it came back
        (np.concatenate([np.linspace(7, 4, 500), np.full(100, 8.0), np.linspace(4, 3, 400)]), False),
        (np.concatenate([np.linspace(7, 4, 950), np.full(50, 8.0)]), False),  # not long enough
    ],
)
def test_divergence_is_a_loss_above_that_of_the_first_fifth(level, bad):
    assert diverged(noisy(level), 1000) is bad


def test_a_healthy_run_is_never_called_diverged_on_its_way():
    for seed in range(5):
        losses = noisy(4 + 3 * np.exp(-np.arange(400) / 100), seed)
        flat = noisy(np.full(400, 4.0), seed)
        assert not any(diverged(x[:n], 400) for x in (losses, flat) for n in range(1, 401, 7))


def test_divergence_is_noticed_early_and_infinity_at_once():
    losses = noisy(np.concatenate([np.linspace(7, 4, 500), np.full(500, 8.0)]))
    assert min(n for n in range(1, 1001) if diverged(losses[:n], 1000)) < 700
    assert diverged([5.0, float("nan")], 1000) and diverged([float("inf")], 3) and not diverged([], 3)


def test_spikes_are_counted_against_the_steps_before():
    losses = (4 + 0.01 * np.sin(np.arange(300))).tolist()
    assert spikes(losses) == 0
    for n in (60, 200, 299):
        losses[n] += 1
    assert spikes(losses) == 3 and spikes([1.0, 9.0]) == 0
