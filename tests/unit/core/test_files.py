"""Files are written whole, under names of their own, by the user's umask; what lowkey did not write stays;
readers see one version.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import forging
import pico
import pytest
import torch

import lowkey
from lowkey.cli import app
from lowkey.core import files
from lowkey.core.files import atomic, outputs
from lowkey.core.types import LowkeyError
from lowkey.heads.scores import HeadScores
from lowkey.plan.plan import Plan
from lowkey.pretraining import Recipe, pretrain
from lowkey.report import write_report


def plan(rank: int = 6) -> Plan:
    return pico.plan(pico.stock("llama"), rank, rank)


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


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


def test_leftovers_of_a_dead_process_of_the_same_number_harm_nobody(tmp_path):
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


def test_work_of_somebody_else_stays(tmp_path):
    """`OUT.partial` is for unfinished work, whatever stands there."""
    work = tmp_path / "out.partial"
    job = files.job_folder(work, {"a": 1})
    files.write_work(job, "statistics", {"done": torch.tensor(1)})
    assert files.check_output(tmp_path / "out", force=False) == work
    (job / "training.safetensors").write_text("mine")
    with pytest.raises(LowkeyError, match="holds other files"):
        files.check_output(tmp_path / "out", force=True)
    files.remove_work(work)
    assert (job / "training.safetensors").read_text() == "mine"
    (job / "training.safetensors").unlink()
    files.remove_work(work)
    assert not work.exists()


def test_work_that_another_process_at_it_clears_away_is_written_again(tmp_path, monkeypatch):
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


# -- before the work


@pytest.mark.parametrize("out", ["file/under", "x" * 300, "a\0b", "/proc/nothing", "/dev/null/x"])
def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for check in (
        lambda p: files.check_folder(p, True),
        files.check_file,
        lambda p: files.check_output(p, False),
    ):
        with pytest.raises(LowkeyError, match="output") as error:
            check(Path(out))
        assert "\n" not in str(error.value)
    assert entries(tmp_path) == {"file"}


COMMANDS = {
    "compress": ["M", "OUT", "--windows", "4", "--context", "16"],
    "dynamic": ["M", "OUT"],
    "recover": ["M", "P", "OUT"],
    "convert": ["M", "OUT", "--attention", "mqa"],
    "export": ["M", "P", "OUT"],
    "profile": ["M", "-o", "OUT"],
    "heads": ["M", "-o", "OUT"],
    "diversity": ["M", "-o", "OUT"],
    "eval": ["M", "--out", "OUT"],
    "pretrain": ["R", "-o", "OUT"],
    "report": ["RESULT", "-o", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_its_output_first(tmp_path, monkeypatch, capsys, command):
    """Neither a place that cannot be written nor a file of the user's costs any work: no model is loaded."""
    (tmp_path / "full").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "r.toml").write_text("[model]\nhidden_size = 32\nnum_hidden_layers = 1\n")
    words = {"M": "tiny", "P": str(tmp_path / "plan"), "R": str(tmp_path / "r.toml"), "RESULT": str(tmp_path)}
    monkeypatch.setattr("lowkey.models.loading.load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("lowkey.pretraining.loop.prepare", lambda *a, **k: pytest.fail("text was read"))
    for out in (tmp_path / "full" / "under", tmp_path / "mine", tmp_path / "full"):
        if out.name == "full" and command == "pretrain":
            continue
        monkeypatch.setattr(
            sys,
            "argv",
            ["lowkey", command, *(words.get(w, w) if w != "OUT" else str(out) for w in COMMANDS[command])],
        )
        with pytest.raises(SystemExit) as status:
            app.main()
        told = capsys.readouterr().err
        assert status.value.code == 2 and str(out) in told and len(told.splitlines()) == 1
    assert (tmp_path / "full").read_text() == "mine" and entries(tmp_path / "mine") == {"thesis.tex"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LowkeyError, match="cannot be written"):
        files.check_folder(tmp_path / "out", force=False)


# -- the disk is full


@pytest.mark.parametrize("at", ["tokens", "tokenizer", "checkpoint", "log", "model"])
def test_a_full_disk_in_pretraining_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch, at):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    training = {"tokens": 64, "batch_tokens": 32, "length": 16, "save_every": 1, "precision": "fp32"}
    wanted = Recipe.of(
        {
            "model": sizes,
            "data": {"path": str(tmp_path / "text.txt"), "vocab_size": 260},
            "training": training,
        }
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        # as the tokenizers library has it
        raise Exception("No space left on device (os error 28)") if at == "tokenizer" else full

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    spots = {
        "tokens": ("lowkey.pretraining.corpus.np.save", fail),
        "tokenizer": (f"{PreTrainedTokenizerFast.__module__}.PreTrainedTokenizerFast.save_pretrained", fail),
        "checkpoint": ("safetensors.torch.save_file", fail),
        "log": ("lowkey.pretraining.log.Path.open", fail),
        "model": (f"{PreTrainedModel.__module__}.PreTrainedModel.save_pretrained", fail),
    }
    with monkeypatch.context() as here:
        here.setattr(*spots[at])
        with pytest.raises(LowkeyError, match=r"[Nn]o space left") as error:
            pretrain(wanted, tmp_path / "out", device="cpu")
        assert "\n" not in str(error.value)
    assert len(pretrain(wanted, tmp_path / "out", device="cpu").losses) == 2


# -- what is read


@pytest.mark.parametrize(
    "harm", ["pipe", "zeros", "folder", "sparse", "loop", "text", "deep", "twice", "digits", "nan"]
)
def test_what_is_no_json_of_ours_is_refused_at_once(tmp_path, harm):
    file = tmp_path / "r.json"
    written = {
        "text": b"\xff\xfe",
        "deep": b'{"a":' * 10**5,
        "twice": b'{"format": 1, "format": 1}',
        "digits": b'{"format": 1' + b"0" * 400 + b"}",
        "nan": b'{"format": NaN}',
    }
    act = {
        "pipe": os.mkfifo,
        "zeros": lambda p: p.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "sparse": lambda p: [p.touch(), os.truncate(p, 2**42)],
        "loop": lambda p: p.symlink_to(p),
    }
    act.get(harm, lambda p: p.write_bytes(written[harm]))(file)
    start = time.perf_counter()
    with pytest.raises(LowkeyError) as error:
        files.read_json(file, "result", "result", 1)
    assert "\n" not in str(error.value) and time.perf_counter() - start < 2


@pytest.mark.parametrize("number", [10**8, 10**30, -1, 1.5, "4", None, True])
@pytest.mark.parametrize("name", ["sinks", "recent"])
def test_counts_of_a_plan_are_bounded(tmp_path, name, number):
    plan().save(tmp_path / "plan")
    forging.edit_json(tmp_path / "plan" / "plan.json", **{name: number})
    with pytest.raises(LowkeyError):
        Plan.load(tmp_path / "plan")


def test_a_file_of_another_size_is_not_read_to_its_end(tmp_path):
    """A sparse file of 4 TiB would take an hour to read: its size alone says that it is not what was written."""
    (tmp_path / "whole").write_bytes(b"tokens")
    known = [files.file_checksum(tmp_path / "whole")]
    assert known == [f"6:{hashlib.sha256(b'tokens').hexdigest()}"]
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    began = time.monotonic()
    assert outputs.unchanged(tmp_path / "whole", known) and not outputs.unchanged(tmp_path / "sparse", known)
    assert time.monotonic() - began < 5


def test_a_finished_run_without_a_weight_is_damaged(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    training = {"tokens": 32, "batch_tokens": 32, "length": 16, "precision": "fp32"}
    wanted = Recipe.of(
        {
            "model": sizes,
            "data": {"path": str(tmp_path / "text.txt"), "vocab_size": 260},
            "training": training,
        }
    )
    out = tmp_path / "out"
    pretrain(wanted, out, device="cpu")
    from safetensors.torch import load_file, save_file

    weights = load_file(out / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowkeyError, match="changed since"):
        pretrain(wanted, out, device="cpu")
    forging.edit_json(
        out / files.MANIFEST,
        lambda m: m["files"].update({"model.safetensors": [files.file_checksum(out / "model.safetensors")]}),
    )
    with pytest.raises(LowkeyError, match=r"damaged .*lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        pretrain(wanted, out, device="cpu")


def test_a_model_that_lowkey_wrote_and_somebody_damaged_is_refused(tmp_path):
    with files.replacing_folder(tmp_path / "model") as folder:
        pico.save(folder)
    loaded, _ = lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")
    assert loaded.config.hidden_size == pico.HIDDEN
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(LowkeyError, match=r"model\.safetensors is not what lowkey wrote"):
        lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")
    (tmp_path / "model" / files.MANIFEST).unlink()
    lowkey.models.loading.load(str(tmp_path / "model"), device="cpu")


def test_a_plan_inside_a_cache_is_the_one_it_was_made_with(tmp_path):
    model = pico.attached("llama")
    cache = lowkey.make_cache(model, plan=pico.plan(model, 6, 6))
    pico.feed(model, pico.prompt(8), cache)
    cache.save(tmp_path / "c")
    other = pico.plan(model, 6, 6)
    replace(other, factors={i: pico.factors(4, 6, 6, seed=9) for i in range(3)}).save(tmp_path / "c" / "plan")
    with pytest.raises(LowkeyError, match="another one than it was made with"):
        lowkey.load_cache(tmp_path / "c", model)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    """Its leftovers are swept, whoever is killed and how."""
    script = "import os, signal, sys; from pathlib import Path; from lowkey.core.files import atomic\n"
    script += "atomic._locked(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert len(entries(tmp_path)) == 1
    files.write_text(tmp_path / "a", "x")
    assert entries(tmp_path) == {"a"}
