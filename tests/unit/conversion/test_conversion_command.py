"""`lowkey convert`: the folder it writes, the losses it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pico
import pytest
import torch
from conversions import ALIGNED, GATED, IDS, SMALL, D, build, logits, run
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lowkey.attention import LowkeyForCausalLM, register
from lowkey.conversion import ConversionOptions, convert, input_moments, starting_loss
from lowkey.core.types import LowkeyError
from lowkey.models.loading import load

# -- refusals


WIDE = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
REFUSED = [
    ("gemma2", {}, "mha", {}, "scales its embeddings"),
    ("granite", {}, "mha", {}, "scales embeddings"),
    ("olmo2", {}, "mha", {}, "norms stand after"),
    ("mistral", {"sliding_window": 16}, "mha", {}, "sliding window"),
    ("phi3-partial", {}, "mha", {}, "rotates 8 of 16"),
    ("llama", {}, "gta", {}, "there is no conversion into it"),
    ("llama", {}, "gqa", {}, "needs num_key_value_heads"),
    ("llama", {}, "gqa", {"num_key_value_heads": 3}, "divide num_attention_heads 8"),
    ("llama", {}, "gqa", {"num_key_value_head": 2}, "did you mean 'num_key_value_heads'"),
    ("llama", {}, "mqa", {"lrkv_rank": 2}, "is not one of attention 'mqa'"),
    ("llama", {}, "lrkv", {"lrkv_rank": "2"}, "must be of type int"),
    ("llama", {}, "lrkv", {"lrkv_rank": D + 1}, "must be at most the head dim 16"),
    ("llama", {}, "lrkv", {"lrkv_rank": 3, "lrkv_rope_mode": "latent"}, "give an even rank"),
    ("llama", {}, "lrkv", {"lrkv_rank": 4, "qk_rope_head_dim": 4}, "is for lrkv_rope_mode='partial'"),
    (
        "llama",
        {},
        "lrkv",
        {"lrkv_rank": 4, "qk_rope_head_dim": 0, "lrkv_rope_mode": "partial"},
        "must be at least 2",
    ),
    ("llama", {}, "mea", {"mea_num_component_heads": 5}, "at most the source's 4"),
    ("llama", {}, "mea", {"mea_num_component_heads": 0}, "must be at least 1"),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 18}, "at most the source's head dim"),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "qk_nope_head_dim": 5}, "give 16 or 0"),
    (
        "llama",
        {},
        "lrkv",
        {"lrkv_rank": 2, "lrkv_rope_mode": "partial", "qk_rope_head_dim": D},
        "would reach none of 16 channels",
    ),
    ("llama", {}, "mla", {"kv_lora_rank": 2 * 4 * D + 1}, "kv_lora_rank 129: must be at most 128"),
    ("llama", WIDE, "mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 8}, "heads of width 16 alone"),
    ("qwen3", {}, "mla", {"kv_lora_rank": 8}, "norms its keys after their projection"),
    ("qwen3", {}, "mea", {"mea_num_component_heads": 2}, "normed apart"),
    ("qwen3", {}, "lrkv", {"lrkv_rank": 4, "lrkv_rope_mode": "latent"}, "normed apart"),
    ("qwen3", {}, "mqa", {"options": ALIGNED}, "cannot be aligned"),
    ("own", GATED, "mqa", {"options": ALIGNED}, "cannot be aligned"),
    ("own", {**GATED, "attention_bias": True}, "lrkv", {"lrkv_rank": 2}, "none can be moved"),
    ("own", GATED, "mha", {"head_norm": "shared"}, "the source has 'own'"),
    ("own", {"attention": "lrkv", "lrkv_rank": 2}, "mha", {}, "attention 'lrkv' cannot be converted"),
    ("own", {"attention": "mha", "attention_layers": [0]}, "mha", {}, "layers must be of one kind"),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "attention_layers": "most"},
        "attention_layers 'most': must be of type list",
    ),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "attention_layers": [7]},
        r"layers 0 to 2, each once, or half or deep",
    ),
    ("llama", {}, "mla", {"kv_lora_rank": 8, "options": ALIGNED}, "does not mix heads"),
    (
        "llama",
        {},
        "mea",
        {"mea_num_component_heads": 2, "options": ConversionOptions(heads="first")},
        "pools no heads",
    ),
    ("llama", {}, "mha", {"options": ConversionOptions(frequencies="spread")}, "rotated whole"),
    (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        "gqa",
        {"num_key_value_heads": 3, "options": ALIGNED},
        "no multiple",
    ),
]


@pytest.mark.parametrize(("name", "overrides", "kind", "fields", "message"), REFUSED)
def test_impossible_conversions_are_refused_in_one_line(
    name: str, overrides: dict, kind: str, fields: dict, message: str
) -> None:
    with pytest.raises(LowkeyError) as caught:
        convert(build(name, **overrides), kind, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_moments_that_nothing_reads_are_refused() -> None:
    model = build("llama")
    with pytest.raises(LowkeyError, match="made from weights alone"):
        convert(model, "mqa", moments=input_moments(model, IDS))


# -- measured, written, read again


def test_the_source_stays_and_the_result_can_be_trained() -> None:
    model = pico.build("llama", tie_word_embeddings=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = convert(model, "lrkv", lrkv_rank=4).train()
    made(IDS, labels=IDS).loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in made.parameters()
    )
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_starting_loss_by_loops() -> None:
    model, tokenizer = build("llama"), pico.tokenizer()
    corpus = "the quick brown fox jumps over the lazy dog\n" * 4
    found = starting_loss(model, tokenizer, corpus, context=16, windows=3, batch=2)
    ids, nats, n = tokenizer(corpus, add_special_tokens=False).input_ids, 0.0, 0
    for start in range(0, 45, 15):
        row = [tokenizer.bos_token_id, *ids[start : start + 15]]
        steps = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for i in range(15):
            nats, n = nats - float(steps[i, row[i + 1]]), n + 1
    assert found.tokens == n == 45 and found.nats == pytest.approx(nats / n, rel=1e-5)


WAYS = {
    "lrkv": ("-O", "lrkv_rank=4", "--whiten", "--basis", "aligned"),
    "mea": ("-O", "mea_num_component_heads=2", "-O", "head_norm=shared"),
    "mla": (
        "-O",
        "kv_lora_rank=24",
        "-O",
        "qk_rope_head_dim=8",
        "-O",
        "mla_rotate=true",
        "-O",
        "attention_layers=0,2-2",
        "--frequencies",
        "spread",
    ),
    "gqa": ("-O", "num_key_value_heads=2", "--heads", "first"),
}


@pytest.mark.parametrize("kind", WAYS)
def test_the_command_writes_what_it_says(kind: str, tmp_path: Path) -> None:
    place, out = pico.save(tmp_path / "model"), tmp_path / "out"
    status, printed, error = run("convert", place, out, "--attention", kind, *WAYS[kind], *SMALL, "--json")
    assert status == 0, error
    told, kept = json.loads(printed), json.loads((out / "convert.json").read_text())
    assert told.items() <= {"model": str(out), **kept}.items() and kept["attention"] == kind
    register()
    made = AutoModelForCausalLM.from_pretrained(out).eval()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(out)
    assert made.config.attention == kind and type(made) is LowkeyForCausalLM
    for which, m in (("source", model), ("converted", made)):
        loss = starting_loss(m, tokenizer, context=64, windows=4)
        assert (
            kept["loss"][which] == pytest.approx(loss.nats, rel=1e-5)
            and kept["loss"]["tokens"] == loss.tokens == 4 * 63
        )
        assert kept["parameters"][which] == sum(p.numel() for p in m.parameters())
        cache = DynamicCache(config=m.config)
        m(IDS, past_key_values=cache)
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert kept["cache_bytes_per_token"][which] == held / IDS.numel()
    assert (kept["whitened"] is not None) == ("--whiten" in WAYS[kind])
    reloaded, _ = load(str(out), device="cpu")
    torch.testing.assert_close(logits(reloaded), logits(made))
    snippet = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("THIS FOLDER", str(out)), found := {})
    torch.testing.assert_close(logits(found["model"]), logits(made))
    named = json.loads((out / "config.json").read_text())["auto_map"]
    assert set(named) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert torch.equal(
        AutoModel.from_pretrained(out)(IDS).last_hidden_state, made.model(IDS).last_hidden_state
    )


def test_the_command_prints_a_table_and_replaces_only_when_told(tmp_path: Path) -> None:
    place, out = pico.save(tmp_path / "model"), tmp_path / "out"
    status, printed, error = run("convert", place, out, "--attention", "mqa", *SMALL)
    assert status == 0, error
    assert "25.0%" in printed and "loss (nats/token)" in printed
    again = ("convert", place, out, "--attention", "mha", *SMALL)
    assert "already holds files" in run(*again)[2]
    assert json.loads((out / "convert.json").read_text())["attention"] == "mqa"
    assert run(*again, "--force")[0] == 0
    assert json.loads((out / "convert.json").read_text())["attention"] == "mha"


WRONG = [
    (("--attention", "mha", "--calibration", "x.txt"), "is for --whiten"),
    (("--attention", "gqa", "-O", "num_key_value_heads=two"), "must be a whole number"),
    (("--attention", "mqa", "-O", "attention_layers=1-x"), "must be layers like 3-8,11, or half or deep"),
    (("--attention", "gqa", "-O", "num_key_value_heads=\u00b2"), "must be a whole number"),
    (("--attention", "mla", "-O", "mla_rotate=maybe"), "must be true or false"),
    (("--attention", "mha", "--data", "missing.txt"), "no such file"),
    (("--attention", "mha", "--context", 4), "must be at least 8"),
    (
        ("--attention", "mqa", "--whiten", *SMALL),
        "moments (--whiten): attention 'mqa' is made from weights alone",
    ),
]


def test_impossible_conversions_are_refused_before_reading_text(tmp_path: Path) -> None:
    place = pico.save(tmp_path / "model")
    with mock.patch("lowkey.conversion.input_moments", side_effect=AssertionError):
        error = run(
            "convert",
            place,
            tmp_path / "out",
            "--attention",
            "mla",
            "-O",
            "kv_lora_rank=0",
            "--whiten",
            *SMALL,
        )[2]
    assert "kv_lora_rank 0" in error


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(words: tuple, message: str, tmp_path: Path) -> None:
    place = pico.save(tmp_path / "model")
    status, _, error = run("convert", place, tmp_path / "out", *words)
    assert status != 0 and message in error and "\n" not in error
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
