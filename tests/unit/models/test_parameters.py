"""Parameters counted from a config, against models that are built from it and published numbers."""

from __future__ import annotations

import itertools
import statistics

import pico
import pytest
import variants
from latent_models import FAMILIES as LATENT
from latent_models import build as build_latent
from transformers import AutoConfig

from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.parameters import Parameters, count_parameters


def numbers(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", pico.NAMES)
@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}]
)
def test_every_family(name, fields):
    model = pico.build(name, **fields)
    assert count_parameters(model.config).total == numbers(model)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_attention_of_our_own(name):
    model = variants.build(name)
    assert count_parameters(model.config).total == numbers(model)


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize(
    "fields",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"q_lora_rank": None}, {"first_k_dense_replace": 3}],
)
def test_families_that_store_latents(name, fields):
    model = build_latent(name, **fields)
    found = count_parameters(model.config)
    experts = (p.numel() for key, p in model.named_parameters() if ".mlp.experts." in key)
    assert (found.total, found.experts) == (numbers(model), sum(experts))


def test_what_a_step_reads_of_a_dense_model():
    tied, untied = (
        count_parameters(pico.build("llama", tie_word_embeddings=t).config) for t in (True, False)
    )
    assert tied.read(1) == tied.read(9) == tied.total
    assert untied.read(1) == untied.total - pico.VOCAB * pico.HIDDEN == tied.total


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_experts_that_a_step_reads(tokens):
    """Three of five experts for each token: the mean over everything that the tokens can choose."""
    choices = list(itertools.combinations(range(5), 3))
    met = statistics.mean(len(set().union(*drawn)) for drawn in itertools.product(choices, repeat=tokens))
    found = Parameters(total=1000, experts=500, experts_used=3 / 5)
    assert found.read(tokens) == pytest.approx(500 + 100 * met)


def test_other_families_are_refused():
    config = AutoConfig.for_model("gpt2")
    with pytest.raises(LowkeyError, match="not supported"):
        count_parameters(config)
    assert not families.stores_latents(config)
