"""`lowkey recover` and `lowkey export`: the models that they write, and what they refuse."""

from __future__ import annotations

import json

import pytest
from commands import BARE, SMALL, done, printed, refused


@pytest.fixture(scope="module")
def halved(model, tmp_path_factory):
    """A plan that merges every two KV heads in a form that a plain checkpoint can have."""
    folder = tmp_path_factory.mktemp("halved")
    done("compress", model, folder / "plan", *SMALL, *BARE, "--method", "kv-head-svd", "-O", "keys=commuting")
    return folder / "plan"


def test_export_writes_a_plain_checkpoint_with_half_the_kv_heads(model, halved, here):
    told = printed("export", model, halved, "out")
    assert told == {"model": "out", "format": "hf"}
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert "--force" in refused("export", model, halved, "out")


def test_export_refuses_other_plans_and_formats(model, made, halved, here):
    assert "--sinks 0 --recent 0" in refused("export", model, made[0], "out")
    done("compress", model, "bare", *SMALL, *BARE)
    assert "commuting" in refused("export", model, "bare", "out")
    assert "hf" in refused("export", model, halved, "out", "--format", "gguf")


def test_recover_writes_a_model_and_its_plan(model, halved, here):
    told = printed(
        "recover", model, halved, "better", "--stages", "distill=1,ce=2", "--length", 16, "--batch", 2
    )
    written = json.loads((here / "better" / "losses.json").read_text())["losses"]
    assert told["steps"] == 3 and len(written) == 3
    assert [(s["objective"], s["first"], s["last"]) for s in told["stages"]] == [
        ("distill", written[0]["loss"], written[0]["loss"]),
        ("ce", written[1]["loss"], written[2]["loss"]),
    ]
    assert told["held_out"].keys() == {"full", "before", "after"}
    again = printed(
        "generate", "better", "--prompt", "Once upon a time", "--plan", "better/plan", "--tokens", 3
    )
    assert again["bytes_held"] < again["bytes_full"]
    assert not list(here.glob("*.partial")), "nothing is left of the work"


def test_recover_takes_the_settings_of_kv_latent(model, halved, here):
    """arXiv:2507.11273: two stages with rates of their own, attention in full, adapters on the feed-forward
    maps, KL at 10.
    """
    words = (
        "--stages",
        "distill=1:1e-3,kl=1:2e-5",
        "--full",
        "self_attn.*",
        "--lora",
        "mlp.*",
        "--temperature",
        10,
        "--eps",
        2e-4,
    )
    told = printed("recover", model, halved, "better", *words, "--length", 16, "--batch", 2)
    about = json.loads((here / "better" / "plan" / "plan.json").read_text())["provenance"]["recovered"][
        "settings"
    ]
    assert (about["stages"], about["lrs"], about["temperature"]) == (
        [["distill", 1], ["kl", 1]],
        [1e-3, 2e-5],
        10,
    )
    assert (about["full"], about["lora"], about["eps"]) == (["self_attn.*"], ["mlp.*"], 2e-4) and told[
        "exact"
    ] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stages", "ce"], "name=steps"),
        (["--stages", "sft=3"], "sft"),
        (["--stages", "ce=0"], "at least 1"),
        (["--stages", "ce=3:fast"], "rates are numbers"),
        (["--full", "attn"], "matches no linear layer"),
        (["--lr", "-1"], "lr"),
    ],
)
def test_bad_arguments_of_recover(model, halved, here, words, says):
    assert says in refused("recover", model, halved, "better", *words)
