"""Compiled kernels are kept between processes, wherever there is room, and imports compile nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowkey.backends import numba_cpu

pytestmark = pytest.mark.skipif(not numba_cpu.available(), reason="numba is not installed")

CPU_SECONDS = (
    3.0  # of every public name beyond torch and transformers; the aim is 1, which a busy machine blurs
)
IMPORTS = """
import json, sys, time
import lowkey
alone = sorted({"torch", "transformers", "numba"} & set(sys.modules))
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM  # and all that any model needs
start = time.process_time()
for name in lowkey.__all__:
    getattr(lowkey, name)
print(json.dumps([alone, "numba" in sys.modules, time.process_time() - start]))
"""
# a small kernel, and how often it was found and missed in the cache
SMALL = """
import json
from lowkey.backends.numba_cache import kept_njit, kernel_folder

@kept_njit()
def doubled(x):
    return x + x

assert doubled(4) == 8
stats = doubled.stats
print(json.dumps([str(kernel_folder()), sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
"""
# all kernels that a step over plain rows needs
STEP = """
import json
import torch
from lowkey.backends import numba_cpu, numba_kernel
keys = torch.randn(9, 64)
numba_cpu.ragged(torch.randn(1, 1, 64), keys, keys, torch.tensor([0, 9]), 1.0)
stats = numba_kernel.decode_rows.stats
hits = [numba_kernel.scorer(1, "float32").cache_hits, sum(stats.cache_hits.values())]
print(json.dumps([hits, sum(stats.cache_misses.values())]))
"""


def run(code, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout), ran.stderr


@pytest.fixture
def kept(monkeypatch):
    """The module, as if it had not looked for its folder nor said anything yet."""
    from lowkey.backends import numba_cache

    for cached in (numba_cache.kernel_folder, numba_cache._say_once):
        cached.cache_clear()
    monkeypatch.setattr(numba_cache._settings(), "CACHE_DIR", "")
    monkeypatch.delenv("LOWKEY_HOME", raising=False)
    yield numba_cache
    for cached in (numba_cache.kernel_folder, numba_cache._say_once):
        cached.cache_clear()


# -- imports


def test_imports_are_light_and_compile_nothing():
    (alone, compiles, seconds), _ = run(IMPORTS)
    assert alone == [] and not compiles
    assert seconds < CPU_SECONDS


# -- where kernels are kept


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    code = f"import runpy; runpy.run_path({str(script)!r})"
    (place, *first), _ = run(code, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
    assert Path(place).parent == tmp_path / "kept" and first == [0, 1]
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path / "kept"))[0] == [place, 1, 0]


@pytest.mark.slow
def test_a_second_process_compiles_no_kernel_of_a_step(tmp_path):
    (hits, misses), said = run(STEP, NUMBA_CACHE_DIR=str(tmp_path))
    assert (hits, misses) == ([0, 0], 1)
    assert said.count("compiling attention kernels") == 1 and str(tmp_path) in said and said.count("\n") == 1
    assert run(STEP, NUMBA_CACHE_DIR=str(tmp_path)) == ([[1, 1], 0], "")


def test_any_change_of_a_kernel_file_means_another_folder(kept, tmp_path, monkeypatch):
    names = []
    for file in sorted(kept.HERE.glob("numba_*.py")):
        copy = tmp_path / file.stem
        shutil.copytree(kept.HERE, copy, ignore=lambda *_: ["__pycache__"])
        (copy / file.name).write_text(file.read_text() + "\n# changed\n")
        monkeypatch.setattr(kept, "HERE", copy)
        kept.kernel_folder.cache_clear()
        names.append(kept.kernel_folder().name)
    assert len(set(names)) == len(names) >= 5


def test_a_package_that_cannot_be_written_to(kept, tmp_path, monkeypatch, caplog):
    """A file in the place of a folder refuses everybody, root as well."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "HERE", tmp_path / "file")
    monkeypatch.setenv("LOWKEY_HOME", str(tmp_path / "home"))
    assert kept.kernel_folder().parent == tmp_path / "home" and caplog.text == ""


@pytest.mark.parametrize("at_all", [True, False])
def test_no_place_at_all_is_said_once_and_refuses_nothing(kept, tmp_path, monkeypatch, caplog, at_all):
    (tmp_path / "file").write_text("")
    for name in ("LOWKEY_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(kept, "HERE", tmp_path / "file")
    if not at_all:
        monkeypatch.setattr(kept._settings(), "CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "lowkey"):
        doubled = kept.kept_njit()(lambda x: x + x)
        assert doubled(4) == 8 and doubled.stats.cache_path is None
        kept.kept_njit()(lambda x: x)
    (record,) = caplog.records
    assert "NUMBA_CACHE_DIR" in record.message and "\n" not in record.message


def test_other_functions_are_kept_where_they_were(kept, tmp_path):
    settings = kept._settings()
    with kept._kept() as can_keep:
        assert can_keep and str(kept.kernel_folder()) == settings.CACHE_DIR
    assert settings.CACHE_DIR == ""
    with pytest.raises(KeyError), kept._kept():
        raise KeyError
    assert settings.CACHE_DIR == ""


# -- what is said


@pytest.mark.parametrize(
    ("seconds", "unfinished", "lines"), [(0.3, True, 1), (0.3, False, 0), (0.0, True, 0)]
)
def test_a_long_compilation_is_told(kept, monkeypatch, caplog, seconds, unfinished, lines):
    monkeypatch.setattr(kept, "QUIET_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, "lowkey"):
        for _ in range(2):
            with kept.telling(lambda: unfinished):
                time.sleep(seconds)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "compiling attention kernels for this CPU"
    ] * lines
    assert all(str(kept.kernel_folder()) in record.message for record in caplog.records)
