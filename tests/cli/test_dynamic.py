"""`lowkey dynamic`: plans in which every token has its own rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pico
import pytest
import torch
from commands import done, printed, refused, tree, truncate
from dynamic_plans import former_folder

from lowkey.cache.cache import make_cache
from lowkey.core import text
from lowkey.models import loading
from lowkey.plan.plan import Plan
from lowkey.plan.reading import PLAN_TENSORS

LEVELLED = (
    "--layout",
    "pre_rope",
    "--key-bases",
    "per_head",
    "--steps",
    2,
    "--windows",
    8,
    "--context",
    32,
    "--seed",
    3,
)


@pytest.fixture(scope="module")
def levelled(model, tmp_path_factory):
    """(dynamic plan folder, what `dynamic --json` printed)."""
    out = tmp_path_factory.mktemp("levelled") / "plan"
    return out, printed("dynamic", model, out, "--budget", "40%", *LEVELLED)


def test_dynamic_prints_the_plan_it_wrote(model, levelled):
    out, told = levelled
    held = Plan.load(out, loading.load(str(model), device="cpu")[0])
    assert (told["plan"], told["method"], told["budget"], told["layout"]) == (
        str(out),
        "dynakv",
        "40%",
        "pre_rope",
    )
    assert (
        held.token_ranks.training["target"],
        held.token_ranks.training["steps"],
        held.token_ranks.training["seed"],
        held.provenance["seed"],
    ) == (0.4, 2, 3, 3)
    assert held.provenance["tokens"] == 8 * 32 and held.factors[0].k_down.shape[0] == 4, (
        "a key basis for each head"
    )
    share = held.token_ranks.share
    assert share == told["share"] <= 0.4 + 1e-6 and told["layers"] == [0, 1, 2]
    assert told["levels"] == [16, 8, 4, 2] and told["training"] == held.token_ranks.training
    assert told["divergence"] == held.token_ranks.divergence and told["geometry"]["head_dim"] == 16
    assert told["bytes_per_token"]["bfloat16"] == 3 * (share * 2 * 4 * 16 * 2 + 4)
    assert printed("inspect", out) == told
    said = done("inspect", out).out
    assert "16, 8, 4 or 2 of 16" in said and f"{100 * share:.1f}%" in said and str(out) in said


def test_eval_measures_a_dynamic_plan_beside_others(model, made, levelled, here):
    words = ("--windows", 2, "--context", 192, "--cases", 1, "--task", "perplexity,layers,recall")
    rows = printed("eval", model, "--plan", levelled[0], "--plan", made[0], *words, "--out", "r.json")["rows"]
    assert [r["name"] for r in rows] == ["full", "dynakv 40%", "pca 50%", "int8", "int4"]
    row = rows[1]
    assert (row["method"], row["plan"], row["budget"], row["layout"]) == (
        "dynakv",
        str(levelled[0]),
        "40%",
        "pre_rope",
    )
    loaded, tokenizer = loading.load(str(model), device="cpu")
    plan = Plan.load(levelled[0], loaded)
    ids = text.windows(text.encode(tokenizer, text.embedded_text("evaluation")), tokenizer, 192, "data")[:2]
    with torch.no_grad():
        scores = loaded(ids, past_key_values=make_cache(loaded, plan)).logits[:, :-1]
        loaded(ids[:1], past_key_values=(past := make_cache(loaded, plan)))
    assert row["perplexity"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores.mT, ids[:, 1:]).exp()), rel=1e-4
    )
    assert (
        row["bytes_held"]
        == row["bytes_predicted"]
        == past.nbytes()
        < rows[0]["bytes_held"]
        == row["bytes_full"]
    )
    assert row["layer_error"] > 0 and row["exact_match"] is not None
    assert "dynakv 40%" in (done("report", "r.json", "-o", "page.html") and (here / "page.html").read_text())


def test_generate_over_a_dynamic_plan(model, levelled):
    told = printed("generate", model, "--prompt", "Once upon a time", "--plan", levelled[0], "--tokens", 5)
    loaded, tokenizer = loading.load(str(model), device="cpu")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    past = make_cache(loaded, Plan.load(levelled[0], loaded))
    assert told["text"] == tokenizer.decode(pico.generate(loaded, ids, 5, past)[0], skip_special_tokens=True)
    assert told["bytes_held"] == past.nbytes() < told["bytes_full"]


def test_commands_take_a_folder_of_the_former_kind(model, levelled, here):
    former = former_folder(here / "former", Plan.load(levelled[0]))
    told, expected = printed("inspect", former), levelled[1]
    assert told == {**expected, "plan": str(former)}
    words = ("--prompt", "Once upon a time", "--tokens", 5, "--plan")
    texts = {printed("generate", model, *words, folder)["text"] for folder in (former, levelled[0])}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (["--budget", "64 KiB/token"], ["budget 64 KiB/token", "mean share", "50%"]),
        (["--budget", "512 tokens"], ["budget 512 tokens", "50%"]),
        (["--budget", "0.5"], ["budget '0.5'", "50%"]),
        (["--budget", "10%"], ["budget of 10%", "2 of 16", "12.5%"]),
        (["--layout", "rope"], ["layout 'rope'", "did you mean 'pre_rope'?"]),
        (["--key-bases", "own"], ["key bases 'own'", "shared, per_head"]),
        (["--steps", -1], ["steps -1", "at least 0"]),
        (["--windows", 3], ["windows 3", "at least 4"]),
        (["--context", 4], ["context 4", "at least 8"]),
        (["--calibration", "none.txt"], ["none.txt", "no such file"]),
        (["--dtype", "banana"], ["dtype 'banana'", "bfloat16"]),
    ],
    ids=str,
)
def test_bad_arguments_of_dynamic(model, here, words, says):
    before = tree(here)
    line = refused("dynamic", model, "out", *words)
    assert [s for s in says if s not in line] == []
    assert tree(here) == before


def test_dynamic_replaces_a_folder_only_when_told_to(model, levelled, here):
    shutil.copytree(levelled[0], here / "out")
    before = tree(here)
    assert "--force" in refused("dynamic", model, "out", *LEVELLED)
    assert tree(here) == before
    assert "KL" in done("dynamic", model, "out", *LEVELLED, "--force").out
    assert Plan.load(here / "out").budget == "50%"


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--bits", "int4", "--plan"],
        ["eval", "--policy", "snapkv", "--budget", "50%", "--plan"],
        ["eval", "--sinks", 4, "--plan"],
        ["generate", "--prompt", "a", "--bits", "int4", "--plan"],
        ["generate", "--prompt", "a", "--policy", "snapkv", "--budget", "50%", "--plan"],
        ["recover"],
        ["export"],
    ],
    ids=lambda w: " ".join(map(str, w[:3])),
)
def test_what_a_dynamic_plan_cannot_do_is_refused(model, levelled, here, words):
    before = tree(here)
    line = refused(words[0], model, *words[1:], levelled[0], *([] if "--plan" in words else ["out"]))
    assert (
        f"plan {str(levelled[0])!r}" in line
        and "only eval and generate" in line
        and "lowkey compress" in line
    )
    assert tree(here) == before


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "a"]], ids=lambda w: w[0])
def test_another_models_dynamic_plan_is_refused(other, levelled, here, words):
    assert "was made for model" in refused(words[0], other, *words[1:], "--plan", levelled[0])


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
def test_a_damaged_dynamic_plan(model, here, levelled, command):
    folder = Path(shutil.copytree(levelled[0], here / "plan"))
    truncate(folder / PLAN_TENSORS)
    words = {
        "inspect": [folder],
        "eval": [model, "--plan", folder],
        "generate": [model, "--prompt", "a", "--plan", folder],
    }[command]
    line = refused(command, *words)
    assert str(folder) in line and "damaged" in line
