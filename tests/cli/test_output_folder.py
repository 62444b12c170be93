"""What a command writes: folders are replaced only with --force, and a full disk leaves what was there."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import SCORE, SMALL, done, refused, tree

from lowkey.core import files
from lowkey.plan.plan import Plan
from lowkey.plan.reading import PLAN_JSON, PLAN_TENSORS


def test_a_folder_that_holds_files_is_kept(model, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    before = tree(here)
    for more in ([], ["--force"]):
        assert "did not write 'thesis.tex'" in refused("compress", model, "out", *SMALL, *more)
        assert tree(here) == before


def test_force_replaces_a_folder(model, here):
    done("compress", model, "out", *SMALL)
    before = tree(here / "out")
    assert "--force" in refused("compress", model, "out", *SMALL, "--seed", 1)
    assert tree(here / "out") == before
    done("compress", model, "out", *SMALL, "--force", "--seed", 1)
    assert {p.name for p in (here / "out").iterdir()} == {
        PLAN_JSON,
        PLAN_TENSORS,
        "README.md",
        files.MANIFEST,
    } and tree(here / "out") != before
    assert {p.name for p in here.iterdir()} == {"out", "notes.txt"}


@pytest.mark.parametrize("out", [".", "..", "/", "notes.txt"])
def test_an_output_that_cannot_be_a_plan_folder(model, here, out):
    before = tree(here)
    assert f"output {out!r}" in refused("compress", model, out, *SMALL, "--force")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["layer-x.safetensors", "model.safetensors", "thesis.tex"])
def test_a_partial_folder_of_the_users_is_kept(model, here, name):
    (here / "out.partial").mkdir()
    (here / "out.partial" / name).write_text("mine")
    before = tree(here)
    assert "out.partial" in refused("compress", model, "out", *SMALL)
    assert tree(here) == before


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The write of the file of this name finds the disk full."""
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a, **k: full_disk() if name in self.name else write(self, *a, **k)
    )


@pytest.mark.parametrize("at", [PLAN_JSON, "README.md", "job.json"])
def test_a_full_disk_keeps_the_old_plan(model, plan, monkeypatch, at):
    before = tree(plan)
    fail_at(monkeypatch, at)
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force", "--seed", 1)
    assert tree(plan) == before
    Plan.load(plan)


def test_a_full_disk_for_tensors_keeps_the_old_plan(model, plan, monkeypatch):
    before = tree(plan)
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force")
    assert tree(plan) == before


def test_the_old_plan_is_restored_when_the_new_one_fails_to_move(model, plan, monkeypatch):
    """Where names cannot be exchanged in one step."""
    before, rename = tree(plan), os.rename
    monkeypatch.setattr("lowkey.core.files.atomic.exchange", lambda a, b: False)
    monkeypatch.setattr(
        os, "rename", lambda a, b: full_disk() if Path(a).name == "new" and b == plan else rename(a, b)
    )
    assert "No space left" in refused("compress", model, plan, *SMALL, "--force")
    assert tree(plan) == before


def test_a_full_disk_leaves_no_result(model, here, monkeypatch):
    before = tree(here)
    fail_at(monkeypatch, "r.json")
    assert "No space left" in refused("eval", model, "--task", "speed", *SCORE, "--out", "r.json")
    assert {
        name: held for name, held in tree(here).items() if not str(name).startswith("r.json.partial")
    } == before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    # goes on with what was measured
    assert done("eval", model, "--task", "speed", *SCORE, "--out", "r.json").status == 0
    assert {str(name) for name in tree(here)} == {"r.json", *map(str, before)}


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_cuts_short(model, here):
    with files_end_at(4096):
        line = refused("compress", model, "out", *SMALL)
    assert "cannot write" in line and "another place" in line
    assert not (here / "out").exists()
