"""A training that was killed or interrupted resumes to the identical curve; folders are not lost."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from unittest import mock

import forging
import pico
import pytest
import torch
from safetensors.torch import load_file
from trainings import curve, killed, recipe

from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.pretraining import Recipe, pretrain


def test_a_killed_training_goes_on_to_the_identical_curve(tmp_path):
    wanted = recipe(tmp_path)
    whole = pretrain(wanted, tmp_path / "whole", device="cpu")
    killed(wanted, tmp_path / "cut", 13)
    assert [line["step"] for line in curve(tmp_path / "cut")][-1] == 13  # the checkpoint is of step 10
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists() and not (
        tmp_path / "cut" / "result.json"
    ).exists()
    again = pretrain(wanted, tmp_path / "cut", device="cpu")
    assert again.losses == whole.losses and len(whole.losses) == 24
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert again.result["validation"] == whole.result["validation"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interrupted_training_goes_on_from_where_it_was(tmp_path):
    """Ctrl-C in the middle of a step saves that step; Muon's state is kept too."""
    wanted = recipe(tmp_path, optimizer="muon", save_every=100, log_every=5)

    def interrupting(items, label, total=None):
        for item in items:
            if label == "pretraining" and item == 6:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain(wanted, tmp_path / "cut", device="cpu", progress=interrupting)
    assert signal.getsignal(signal.SIGINT) is before
    seen: list[int] = []

    def watching(items, label, total=None):
        for item in items:
            seen.append(item)
            yield item

    again = pretrain(wanted, tmp_path / "cut", device="cpu", progress=watching)
    whole = pretrain(wanted, tmp_path / "whole", device="cpu")
    assert seen == list(range(7, 24))
    assert again.losses == whole.losses and curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_finished_run_is_returned_and_another_refused(tmp_path):
    wanted = recipe(tmp_path, tokens=4 * 128)
    found = pretrain(wanted, tmp_path / "out", device="cpu")
    again = pretrain(wanted, tmp_path / "out", device="cpu", progress=mock.Mock(side_effect=AssertionError))
    assert again.losses == found.losses and again.result == found.result
    assert all(
        torch.equal(a, b) for a, b in zip(again.model.parameters(), found.model.parameters(), strict=True)
    )
    other = replace(wanted, training=replace(wanted.training, lr=0.5))
    with pytest.raises(LowkeyError, match=r"training.lr 0.01 there, 0.5 here.*--force"):
        pretrain(other, tmp_path / "out", device="cpu")
    assert pretrain(wanted, tmp_path / "out", device="cpu").losses == found.losses
    kept = replace(wanted, training=replace(wanted.training, save_every=1, log_every=2))
    # how often to save makes no other run
    assert pretrain(kept, tmp_path / "out", device="cpu").losses == found.losses
    assert pretrain(other, tmp_path / "out", device="cpu", force=True).losses != found.losses
    assert [line["step"] for line in curve(tmp_path / "out")] == [0, 1, 2, 3, 4, 4]


def test_force_keeps_what_is_there_until_there_is_something_new(tmp_path):
    wanted, out = recipe(tmp_path, tokens=4 * 128), tmp_path / "out"
    pretrain(wanted, out, device="cpu")
    shard = out / "model-00001-of-00002.safetensors"
    shard.write_text("somebody's")
    with pytest.raises(LowkeyError, match="did not write 'model-00001"):
        pretrain(wanted, out, device="cpu", force=True)
    older = {shard.name: [files.file_checksum(shard)]}  # of an earlier run
    forging.edit_json(out / files.MANIFEST, lambda known: known["files"].update(older))
    there = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(LowkeyError, match="micro_batch 3"):
        pretrain(
            replace(wanted, training=replace(wanted.training, micro_batch=3)), out, device="cpu", force=True
        )
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == there

    def dying(items, label, total=None):
        for n, item in enumerate(items):
            if label == "pretraining" and n == 2:
                raise RuntimeError
            yield item

    other = replace(wanted, training=replace(wanted.training, seed=5))
    with pytest.raises(RuntimeError):
        pretrain(other, out, device="cpu", force=True, progress=dying)
    assert (out / "model.safetensors").read_bytes() == there["model.safetensors"]
    pretrain(other, out, device="cpu")
    assert (out / "model.safetensors").read_bytes() != there["model.safetensors"]
    assert [p.name for p in out.glob("model*safetensors*")] == ["model.safetensors"]


def test_a_start_that_fails_leaves_the_folder_free(tmp_path):
    for wrong in ({"micro_batch": 3}, {"length": 2048, "batch_tokens": 2048 * 4, "tokens": 2048 * 4}):
        with pytest.raises(LowkeyError):
            pretrain(recipe(tmp_path, **wrong), tmp_path / "out", device="cpu")
    assert len(pretrain(recipe(tmp_path, tokens=2 * 128), tmp_path / "out", device="cpu").losses) == 2


def test_a_model_is_not_trained_over_itself(tmp_path):
    place = pico.save(tmp_path / "model")
    with pytest.raises(LowkeyError, match=r"is the model of model.path.*choose another folder"):
        pretrain(Recipe.of({"model": {"path": str(place)}}), tmp_path / "model", device="cpu", force=True)
    assert (place / "model.safetensors").exists()


def test_damaged_files_of_a_run_are_one_line(tmp_path):
    wanted, out = recipe(tmp_path, tokens=4 * 128), tmp_path / "out"
    pretrain(wanted, out, device="cpu")
    for harm in (
        lambda: (out / "model.safetensors").unlink(),
        lambda: (out / "result.json").write_text("{}"),
    ):
        harm()
        with pytest.raises(LowkeyError, match=r"a finished run that is damaged .*--force") as error:
            pretrain(wanted, out, device="cpu")
        assert "\n" not in str(error.value)
    (out / "result.json").unlink()
    files.write_tensors(out / "checkpoint.safetensors", {"weights": torch.zeros(2)}, "checkpoint")
    with pytest.raises(LowkeyError, match=r"lacks about.*--force"):
        pretrain(wanted, out, device="cpu")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(LowkeyError, match="already holds files"):
        pretrain(recipe(tmp_path), tmp_path / "mine", device="cpu")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
