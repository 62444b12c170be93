"""A conversion reports whether it is exact, what loses something, and which fields would lose nothing."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pico
import pytest
from conversions import GATED, SMALL, D, build, equal, run
from typer.testing import CliRunner

from lowkey.cli.app import app
from lowkey.conversion import ConversionOptions, convert
from lowkey.conversion import exactness as said_of
from lowkey.conversion.convert import checked_configuration
from lowkey.conversion.exactness import Exactness
from lowkey.core.types import LowkeyError

SOURCES = {
    "llama": {},
    "llama-mha": {},
    "llama-mqa": {},
    "llama-yarn": {},
    "qwen2": {},
    "qwen2 with one KV head": {"num_key_value_heads": 1},
    "qwen3": {},
    "phi3": {},
    "own": GATED,
}
FIELDS = {
    "mha": [{}, {"head_norm": "shared"}],
    "gqa": [{"num_key_value_heads": n} for n in (1, 2, 4)],
    "mqa": [{}],
    "lrkv": [
        {"lrkv_rank": rank, "lrkv_rope_mode": mode, "num_key_value_heads": shared}
        for rank, mode, shared in product((4, D), ("full", "latent"), (1, 2, 4))
    ]
    + [
        {"lrkv_rank": 4, "lrkv_rope_mode": "partial", "qk_rope_head_dim": e, "num_key_value_heads": 4}
        for e in (8, D)
    ],
    "mea": [{"mea_num_component_heads": n} for n in (1, 2, 4)]
    + [{"mea_num_component_heads": 1, "head_norm": "own"}],
    "mla": [{"kv_lora_rank": c, "qk_rope_head_dim": e} for c, e in ((D, D), (8, D), (D, 8))]
    + [{"kv_lora_rank": D, "mla_rotate": False}, {"kv_lora_rank": D, "mla_kv_norm": True}],
}


def tried(model: object, kind: str, fields: dict) -> tuple[Exactness, bool] | None:
    """What is said, and whether it is so by the logits; None where the conversion is refused."""
    try:
        config = checked_configuration(model, kind, ConversionOptions(), False, fields)
    except LowkeyError:
        return None
    return said_of(model, config), equal(model, convert(model, kind, **fields))


@pytest.mark.parametrize("name", SOURCES)
def test_reported_exactness_is_true_of_the_logits(name: str) -> None:
    """By logits: exact where it says so, not exact where it does not, and exact with the fields that it names
    instead.
    """
    model, made = build(name.split()[0], **SOURCES[name]), 0
    for kind, settings in FIELDS.items():
        for fields in settings:
            if (found := tried(model, kind, fields)) is None:
                continue
            said, is_so = found
            made += 1
            assert said.exact == is_so, (kind, fields, said)
            if said.exact:
                assert said == Exactness(True) and str(said) == "exact, to rounding"
            else:
                instead = dict(said.instead)
                assert tried(model, instead.pop("attention"), instead) == (Exactness(True), True), (
                    kind,
                    fields,
                    said,
                )
                assert said.why in str(said) and "exact with attention=" in str(said)
    assert made > 8


def test_a_biased_full_rank_start_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Qwen2's keys have biases, of which one shared head cannot hold those of two."""
    model = build("qwen2")
    with caplog.at_level("WARNING", "lowkey.conversion"):
        convert(model, "lrkv", lrkv_rank=D)
    (told,) = (record.getMessage() for record in caplog.records)
    assert "keys have biases" in told and told.endswith(
        "exact with attention=lrkv lrkv_rank=16 lrkv_rope_mode=full num_key_value_heads=2"
    )
    caplog.clear()
    with caplog.at_level("WARNING", "lowkey.conversion"):
        convert(model, "lrkv", lrkv_rank=D, num_key_value_heads=2)
        convert(model, "lrkv", lrkv_rank=2)  # smaller than the source: a loss is what was asked for
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "exact"), [(("-O", "num_key_value_heads=4"), True), (("-O", "num_key_value_heads=2"), False)]
)
def test_command_record_and_card_report_exactness(
    fields: tuple[str, ...], exact: bool, tmp_path: Path
) -> None:
    place, out = pico.save(tmp_path / "model"), tmp_path / "out"
    assert run("convert", place, out, "--attention", "gqa", *fields, *SMALL)[0] == 0
    record, card = json.loads((out / "convert.json").read_text()), (out / "README.md").read_text()
    line = (
        "exact, to rounding"
        if exact
        else "not exact: 2 stored heads stand for the source's 4; "
        "exact with attention=gqa num_key_value_heads=4"
    )
    assert record["exact"] == exact and line in card
    assert record["exact_with"] == (None if exact else {"attention": "gqa", "num_key_value_heads": 4})
    printed = CliRunner().invoke(
        app, ["convert", str(place), str(out), "--attention", "gqa", *fields, *map(str, SMALL), "--force"]
    )
    assert f"the start is {line}" in printed.stderr
