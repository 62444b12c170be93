"""The embedded model `tiny` is what its model card says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lowkey.allocation.allocators import Greedy
from lowkey.calibration.calibrate import CalibrationContext, fit_layers
from lowkey.core import text
from lowkey.core.progress import silent
from lowkey.evaluate import recall
from lowkey.evaluate.settings import full
from lowkey.methods import PCA, EigenAttention, StiefAttention
from lowkey.models import families
from lowkey.models.loading import load

FOLDER = Path(recall.__file__).parents[1] / "data" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "float32", "cpu")


def test_it_is_small_and_of_the_promised_shape(tiny):
    shape = families.geometry(tiny[0])
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 10 * 2**20
    assert (
        shape.layers >= 4 and shape.layers * shape.heads >= 24 and shape.head_dim >= 32 and shape.groups == 1
    )
    assert tiny[0].config.model_type == "llama" and tiny[0].config.max_position_embeddings >= 1024


@pytest.mark.parametrize("context", [512, 1024])
def test_it_recalls_facts(tiny, context):
    model, tokenizer = tiny
    haystack = text.encode(tokenizer, text.embedded_text("evaluation")).tolist()
    row = recall.measure_recall(model, tokenizer, [full(model)], haystack, context, 20, 1, silent)["full"]
    assert row["exact_match"] >= 0.95


@torch.no_grad()
def test_it_reads_english(tiny):
    model, tokenizer = tiny
    rows = text.windows(text.encode(tokenizer, text.embedded_text("evaluation")), tokenizer, 1024, "text", 1)[
        :4
    ]
    nats = model(rows, labels=rows).loss.item() * rows[:, 1:].numel()
    size = len("".join(tokenizer.decode(r[1:]) for r in rows).encode())
    assert nats / math.log(2) / size < 2.0


def test_each_key_is_one_token(tiny):
    assert all(len(tiny[1](f" {key}", add_special_tokens=False).input_ids) == 1 for key in recall.KEYS)


def test_the_embedded_texts_are_disjoint():
    lines = [set(text.embedded_text(kind).split("\n")) for kind in ("calibration", "evaluation")]
    assert not {line for line in lines[0] & lines[1] if len(line) > 20}


@pytest.mark.slow
def test_training_on_the_layer_output_beats_the_eigenbases(tiny):
    """At half the bytes, same allocator, same sharing of bases; the held-out windows are of the same text."""
    model, tokenizer = tiny
    rows = text.windows(text.encode(tokenizer, text.embedded_text("calibration")), tokenizer, 256, "text")[
        :16
    ]
    errors = {}
    for method in (PCA(key_bases="shared"), EigenAttention(), StiefAttention(epochs=30)):
        _, profile = fit_layers(
            method, CalibrationContext(model, rows, 4, "post_rope", [8, 16, 24, 32], seed=0)
        )
        chosen = Greedy().under_bytes(
            profile, 0.5 * profile.bytes_per_token([(32, 32)] * profile.layer_count)
        )
        errors[type(method)] = sum(profile.error(i, pair) for i, pair in enumerate(chosen))
    assert errors[StiefAttention] < min(errors[PCA], errors[EigenAttention])
