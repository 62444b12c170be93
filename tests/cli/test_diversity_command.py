"""`lowkey bench diversity`: the numbers, files and figures that it writes."""

from __future__ import annotations

import json

import pico
import pytest
from attention_kinds import KINDS, own
from commands import done, printed, refused

from lowkey.cli.tables import show_diversity
from lowkey.heads.diversity import diversity
from lowkey.report.diversity import cosines_figure, diversity_figure


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("diversity") / "pico", pad_token_id=None)


def test_the_command_prints_numbers_and_writes_them_and_figures(saved, tmp_path):
    found = printed(
        "diversity", saved, "--windows", 2, "--context", 16, "--inits", 2, "--out", tmp_path / "out"
    )
    assert (
        found.items() <= json.loads((tmp_path / "out" / "diversity.json").read_text()).items()
        and found["data"] == "embedded"
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "diversity.json",
        "diversity.png",
        "cosines.png",
        ".lowkey.json",
    }
    assert all(
        (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for name in ("diversity", "cosines")
    )
    layer = found["layers"][0]
    assert (
        len(layer["qk"]["cosines"]) == 8
        and layer["init"]["vo_centred"]["low"] <= layer["init"]["vo_centred"]["high"]
    )


def test_the_command_takes_our_own_models_and_other_text(tmp_path):
    """The table: numbers, in brackets those at random, and what lrkv's parts are to each other."""
    model = own(**KINDS["lrkv-full"])
    for part in (model, pico.tokenizer()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 8)
    words = (
        "--windows",
        2,
        "--context",
        16,
        "--inits",
        1,
        "--data",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "out",
    )
    shown = done("diversity", tmp_path / "model", *words).out
    layer = json.loads((tmp_path / "out" / "diversity.json").read_text())["layers"][1]
    assert (
        f"{layer['qk']['centred']:.3f} ({layer['init']['qk_centred']['mean']:.3f})" in shown
        and "mean" in shown
    )
    assert f"{layer['residual']['keys']['shared_over_residual']:.2f}" in shown


def test_figures_without_random_forms(tmp_path):
    found = diversity(
        pico.build("llama"),
        pico.tokenizer(),
        "It was a dark and stormy night. " * 8,
        windows=1,
        context=16,
        inits=0,
    )
    assert found["layers"][0]["init"] is None and found["mean"]["init"] is None
    show_diversity(found)
    for draw in (diversity_figure, cosines_figure):
        draw(found).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--inits", -1), "inits -1"), (("--context", 1), "context 1"), (("--data", "none.txt"), "none.txt")],
)
def test_bad_arguments(saved, tmp_path, words, says):
    assert says in refused("diversity", saved, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
