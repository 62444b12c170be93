"""Files are written whole, by the user's umask; files that lowkey did not write stay."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from pathlib import Path

import pico
import pytest
import torch
from saved_files import entries, plan

import lowkey
from lowkey.core import files
from lowkey.core.files import atomic
from lowkey.core.types import LowkeyError
from lowkey.heads.scores import HeadScores
from lowkey.plan.plan import Plan
from lowkey.pretraining import Recipe
from lowkey.report import write_report

# -- one step


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_everything_has_the_modes_that_the_user_asks_for(tmp_path, umask):
    before = os.umask(umask)
    try:
        plan().save(tmp_path / "plan")
        files.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, "x")
        with files.replacing_folder(tmp_path / "model") as folder:
            pico.save(folder)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert {"plan.safetensors", "model.safetensors", "plan.json", "a.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}


def test_leftovers_of_a_dead_process_with_our_id_are_harmless(tmp_path):
    """In containers the next process often has the number of the last."""
    for kind in ("tmp", "old"):
        (tmp_path / f".plan.{os.getpid()}.{kind}").mkdir()
    plan().save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").ranks == plan().ranks


def _dead(path: Path) -> Path:
    """What a writer of `path` leaves when it is killed."""
    folder, lock = atomic._locked(path)
    (folder / "new").mkdir()
    (folder / "new" / "half").write_text("x")
    os.close(lock)
    return folder


def test_leftovers_are_swept_when_their_writer_is_dead_and_ours(tmp_path):
    dead = _dead(tmp_path / "plan")
    mine = tmp_path / ".plan.0123456789abcdef.tmp"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    living, lock = atomic._locked(tmp_path / "plan")
    plan().save(tmp_path / "plan")
    assert not dead.exists() and mine.exists() and living.exists()
    os.close(lock)
    plan().save(tmp_path / "plan")
    assert entries(tmp_path) == {"plan", mine.name}


@pytest.mark.parametrize("how", ["reader", "writer", "check"])
def test_a_swap_that_was_killed_between_two_renames_is_mended(tmp_path, how):
    plan(6).save(tmp_path / "plan")
    dead = _dead(tmp_path / "plan")
    os.rename(tmp_path / "plan", dead / "old")
    if how == "writer":
        with pytest.raises(ZeroDivisionError), files.replacing_folder(tmp_path / "plan"):
            raise ZeroDivisionError
    if how == "check":
        files.check_writable(tmp_path / "plan")
        assert (tmp_path / "plan").exists()
    assert Plan.load(tmp_path / "plan").ranks == plan(6).ranks


@pytest.mark.parametrize("whole", [True, False], ids=["exchange", "two renames"])
def test_readers_see_one_version_while_it_is_replaced(tmp_path, monkeypatch, whole):
    """Two writers and two readers at once. Where names cannot be exchanged, a writer may be told that the
    other writes there.
    """
    if not whole:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    elif not atomic.exchange(*(made for n in "ab" for made in [tmp_path / n] if made.mkdir() is None)):
        pytest.skip("this file system cannot exchange names")
    plans, trouble, stop, read = [plan(4), plan(6)], [], time.monotonic() + 0.6, []
    plans[0].save(tmp_path / "plan")

    def repeat(act):
        try:
            while time.monotonic() < stop:
                act()
        except Exception as error:
            trouble.append(error)

    acts = [
        *(lambda p=p: p.save(tmp_path / "plan") for p in plans),
        *[lambda: read.append(Plan.load(tmp_path / "plan").ranks[0])] * 2,
    ]
    threads = [threading.Thread(target=repeat, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = "others write there at the same time"
    told = [e for e in trouble if not whole and isinstance(e, LowkeyError) and busy in str(e)]
    assert trouble == told and len(read) > 4 and set(read) <= {(4, 4), (6, 6)}
    assert {n for n in entries(tmp_path) if n.startswith(".")} == set()


def test_damage_is_told_at_once(tmp_path):
    """Only what changes meanwhile is read again."""
    plan().save(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text("{")
    start = time.perf_counter()
    with pytest.raises(LowkeyError, match="damaged"):
        Plan.load(tmp_path / "plan")
    assert time.perf_counter() - start < 1


# -- whose files


SAVES = {
    "plan": lambda path: plan().save(path, force=True),
    "cache": lambda path: lowkey.make_cache(pico.attached("llama")).save(path, force=True),
}


@pytest.mark.parametrize("kind", SAVES)
def test_a_folder_with_anything_else_is_never_replaced(tmp_path, kind):
    for name, harm in {
        "thesis.tex": lambda p: (p / "thesis.tex").write_text("mine"),
        "notes": lambda p: (p / "notes").mkdir(),
        "link": lambda p: (p / "link").symlink_to(tmp_path),
        files.MANIFEST: lambda p: (p / files.MANIFEST).write_text("{}"),
        "plan.json": lambda p: (p / "plan.json").write_text("{}"),
    }.items():
        out = tmp_path / f"{kind}-{name}"
        SAVES[kind](out)
        SAVES[kind](out)
        harm(out)
        before = entries(out)
        with pytest.raises(LowkeyError, match=f"did not write '{name}'"):
            SAVES[kind](out)
        assert entries(out) == before


def test_an_edited_file_of_ours_is_the_users(tmp_path):
    plan().save(tmp_path / "plan")
    with (tmp_path / "plan" / "README.md").open("a") as card:
        card.write("my notes")
    with pytest.raises(LowkeyError, match=r"README\.md"):
        plan().save(tmp_path / "plan", force=True)
    Plan.load(tmp_path / "plan")


def _result(path: Path) -> Path:
    row = {"name": "full", "bytes_held": 2, "bytes_full": 2}
    files.write_json(path, {"format": 1, "model": "m", "environment": {}, "rows": [row]}, "result")
    return path


def _scores() -> HeadScores:
    values = torch.full((12, 3, 8), 0.5).double()
    return HeadScores("copy", "recall", values, (0, 1, 2), 4, 40, "m", "0", "0", 7, {})


SINGLE = {
    "result": _result,
    "heads": lambda path: _scores().save(path),
    "report": lambda path: write_report([_result(path.parent / "other.json")], path),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_file_of_somebody_else_is_never_replaced(tmp_path, kind):
    out = tmp_path / "out"
    SINGLE[kind](out)
    SINGLE[kind](out)  # our own is
    ours = out.read_bytes()
    for mine in (b"dear diary", b"{}", b"", ours + b"and mine", ours.replace(b"m", b"n", 1), ours[:-9]):
        out.write_bytes(mine)
        with pytest.raises(LowkeyError, match="did not write"):
            SINGLE[kind](out)
        assert out.read_bytes() == mine


@pytest.mark.parametrize("there", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_no_output(tmp_path, there):
    out = tmp_path / "out"
    {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda p: p.symlink_to(p)}[there](out)
    with pytest.raises(LowkeyError):
        files.check_file(out, "result", force=True)
    with pytest.raises(LowkeyError):
        _result(out)
    assert entries(tmp_path) == {"out"}


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    for name, save in (("plan", lambda p: plan().save(p)), ("heads.json", lambda p: _scores().save(p))):
        (tmp_path / name).symlink_to(place / name)
        for _ in range(2):
            save(tmp_path / name)
            assert (
                (tmp_path / name).is_symlink() and (place / name).exists() and not (place / name).is_symlink()
            )
    assert Plan.load(tmp_path / "plan").ranks == plan().ranks
    assert entries(tmp_path) == {"disk", "plan", "heads.json"} and entries(place) == {"plan", "heads.json"}


def test_only_an_unchanged_file_of_ours_is_removed(tmp_path):
    place, link = _result(tmp_path / "r.json"), tmp_path / "link.json"
    link.symlink_to(place)
    files.remove_file(tmp_path / "nothing.json", "result")
    with pytest.raises(LowkeyError, match="is no recipe as lowkey wrote it; move it away"):
        files.remove_file(place, "recipe")
    written = place.read_text()
    place.write_text(written.replace("{", "{ ", 1).replace("1", "2", 1))
    for path in (place, link, tmp_path):
        with pytest.raises(LowkeyError, match="is no result"):
            files.remove_file(path, "result")
    place.write_text(written)
    files.remove_file(link, "result")
    assert entries(tmp_path) == {"link.json"} and not place.exists()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(math.nan, torch.float16), (math.inf, torch.float64), (complex(0, math.nan), torch.complex64)],
    ids=str,
)
def test_numbers_of_every_kind_are_seen_to_be_infinite(value, dtype):
    assert not files.all_finite([torch.ones(2), torch.tensor([1, value], dtype=dtype)])
    assert files.all_finite([torch.ones(2, dtype=dtype), torch.ones(2, dtype=torch.int64)])


def test_work_of_somebody_else_stays(tmp_path):
    """`OUT.partial` is for unfinished work, whatever stands there."""
    work = tmp_path / "out.partial"
    job = files.job_folder(work, {"a": 1})
    files.write_work(job, "statistics", {"done": torch.tensor(1)})
    assert files.check_output(tmp_path / "out", force=False) == work
    (job / "training.safetensors").write_text("mine")
    with pytest.raises(LowkeyError, match="holds other or damaged files"):
        files.check_output(tmp_path / "out", force=True)
    files.remove_work(work)
    assert (job / "training.safetensors").read_text() == "mine"
    (job / "training.safetensors").unlink()
    files.remove_work(work)
    assert not work.exists()


def test_work_removed_by_another_process_is_written_again(tmp_path, monkeypatch):
    job, gone = files.job_folder(tmp_path / "work", {"a": 1}), []
    real = atomic.sync

    def sync(path):
        if not gone:
            gone.append(path)
            shutil.rmtree(job)
        real(path)

    monkeypatch.setattr("lowkey.core.files.writing.sync", sync)
    files.write_work(job, "statistics", {"done": torch.tensor(1)})
    assert gone and int(files.read_work(job, "statistics")["done"]) == 1


def test_a_card_may_be_edited_but_nothing_else(tmp_path):
    with files.replacing_folder(tmp_path / "model") as folder:
        pico.save(folder)
        (folder / "README.md").write_text("a card")
    (tmp_path / "model" / "README.md").write_text("a better card")
    files.verify(tmp_path / "model", "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(LowkeyError, match=r"config\.json is not what lowkey wrote"):
        files.verify(tmp_path / "model", "model")


@pytest.mark.parametrize(
    "line", ["x = nan", "x = 1979-05-27", f"x = {10**400}", "x = " + "[" * 200 + "]" * 200, "x = [" * 3000]
)
def test_a_recipe_of_values_that_nobody_means_is_one_line(tmp_path, line):
    (tmp_path / "r.toml").write_text(f"[model]\n{line}\n")
    with pytest.raises(LowkeyError, match="recipe") as error:
        Recipe.read(tmp_path / "r.toml")
    assert "\n" not in str(error.value)
    with pytest.raises(LowkeyError):
        Recipe.read(tmp_path / "r.toml", [f"model.{line.replace(' ', '')}"])


def test_jobs_do_not_read_each_others_work(tmp_path):
    a = files.job_folder(tmp_path, {"seed": 1})
    files.write_work(a, "statistics", {"done": torch.tensor(1)})
    b = files.job_folder(tmp_path, {"seed": 2})
    assert files.read_work(b, "statistics") is None and not a.exists()
    files.write_work(a, "statistics", {"done": torch.tensor(1)})  # as another process might, which goes on
    assert files.read_work(b, "statistics") is None


def test_a_removal_that_is_cut_short_is_finished_by_the_next(tmp_path, monkeypatch):
    """The mark of a staging folder goes last, so that the next writer knows what was left of it."""
    real, place = shutil.rmtree, tmp_path / "a"

    def killed(path, *args, **kwargs):
        real(path, *args, **kwargs)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic.new_folder_beside(place) as folder:
        for name in ("new", "more"):
            (folder / name).mkdir()
        monkeypatch.setattr(shutil, "rmtree", killed)
    monkeypatch.undo()
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    with atomic.new_folder_beside(place):
        pass
    assert list(tmp_path.iterdir()) == []
