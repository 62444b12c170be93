"""Plans and families that cannot be exported are refused; files are replaced only when asked."""

from __future__ import annotations

from dataclasses import replace

import pico
import pytest
import torch
from exports import ROWS, build, exported, make, refused, same
from pico import HEAD_DIM

import lowkey
from lowkey.core.types import LowkeyError
from lowkey.export import export_hf
from lowkey.methods import PCA, CalibrationContext, KVHeadSVD, KVLatent


def with_means(plan):
    return replace(
        plan, factors={i: replace(f, k_mean=torch.zeros(4, HEAD_DIM)) for i, f in plan.factors.items()}
    )


def with_one_layer(plan, f):
    return replace(plan, factors={**plan.factors, 1: f})


def spoilt(plan):
    """The key maps of one layer no longer commute, by a thousandth."""
    f = plan.factors[2]
    return replace(
        plan, factors={**plan.factors, 2: replace(f, k_down=f.k_down + 1e-3 * torch.randn(f.k_down.shape))}
    )


REFUSALS = {
    "layer": (
        lambda m: make(m, KVHeadSVD()),
        r"keys=layer .*: it merges the keys of 4 heads and the values of 2; "
        r"compress with .* -O keys=commuting ",
    ),
    "grouped": (
        lambda m: make(m, KVHeadSVD(keys="grouped")),
        "keys=grouped .*: its key maps do not commute with rotary embedding; ",
    ),
    "spoilt": (lambda m: spoilt(make(m)), "key maps do not commute"),
    "two of four": (
        lambda m: make(m, KVHeadSVD(4, "commuting")),
        "latents of width 32 where a head is 16 wide",
    ),
    "pca": (
        lambda m: make(m, PCA()),
        "'pca' .*: it does not keep the channels that a rotary embedding of width 8 rotates",
    ),
    "any channels": (lambda m: make(m, KVLatent("data")), "does not keep the channels"),
    "uneven": (lambda m: make(m, ranks=(8, 16)), "rank 8 of keys and 16 of values"),
    "whole": (lambda m: make(m, ranks=(16, 16)), "every channel of every head"),
    "means": (lambda m: with_means(make(m)), "subtracts means from"),
    "layers differ": (lambda m: with_one_layer(make(m), pico.factors(4)), "other ranks than one another"),
    "frequencies": (lambda m: aware(m), "frequencies of its own; compress with -O rope=kept"),
    "sinks": (
        lambda m: make(m, sinks=4),
        "4 sinks and 0 recent tokens exact; compress with --sinks 0 --recent 0",
    ),
}


def aware(model):
    """KV-Latent's own rotation, which is made after the ranks are known."""
    method = KVLatent(rope="aware")
    plan, context = make(model, method), CalibrationContext(model, ROWS, 2, "post_rope", [8, HEAD_DIM], 0)
    return replace(plan, factors=method.finish(plan.factors, context))


@pytest.mark.parametrize("case", REFUSALS)
def test_a_plan_that_cannot_be_exported_names_the_remedy(tmp_path, case):
    torch.manual_seed(0)
    model, (plan, match) = build("llama"), REFUSALS[case]
    refused(model, plan(model), tmp_path, f"^plan of method .*{match}")


@pytest.mark.parametrize(
    ("name", "match"),
    [("qwen3", "norms keys"), ("olmo2", "norms keys"), ("gemma2-mixed", "2 of its 3 layers")],
)
def test_a_family_that_cannot_hold_it_is_refused(tmp_path, name, match):
    model = lowkey.attach(pico.build(name.removesuffix("-mixed")))
    refused(model, make(model), tmp_path, f"^model of family .*{match}.*; use the plan$")


def test_strided_channels_whose_frequencies_differ_are_refused(tmp_path):
    """YaRN's ramp lies elsewhere in a narrower head."""
    model = build("llama-yarn")
    refused(
        model,
        make(model, KVLatent()),
        tmp_path,
        "does not keep the channels that a rotary embedding of width 8 rotates",
    )


def test_another_models_plan_is_refused(tmp_path):
    model, other = build("llama"), build("llama-mha")
    refused(model, make(other), tmp_path, "was made for model")


def test_files_are_replaced_only_by_force(tmp_path):
    model = build("llama")
    plan = make(model)
    exported(model, plan, tmp_path)
    with pytest.raises(LowkeyError, match="already holds files"):
        exported(model, plan, tmp_path)
    exported(model, plan, tmp_path, force=True)
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(LowkeyError, match="did not write 'thesis"):
            exported(model, plan, tmp_path, force=force)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model, tokenizer = build("llama"), pico.tokenizer()
    plan = make(model)
    export_hf(model, tokenizer, plan, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(LowkeyError, match=r"cannot write .*No space left"):
        export_hf(model, tokenizer, plan, tmp_path / "model", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_factors_in_another_dtype_are_folded_too(tmp_path):
    model = build("llama")
    plan = make(model)
    wide = {i: f.to(torch.empty(0, dtype=torch.float64)) for i, f in plan.factors.items()}
    same(exported(model, replace(plan, factors=wide), tmp_path), model, plan)
