"""The small model of `benchmarks/small_child.py`: a kill at any moment, and the same child in the end."""

from __future__ import annotations

import os
import signal

import pico
import pytest
from pages import ROOT

from lowkey.core.progress import silent

# what forks may say in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def distil(monkeypatch, tmp_path):
    """Distil two of three layers of a saved model, by its name, into a folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import small_child

    (tmp_path / "text.txt").write_text(" ".join(f"word{i * i % 89}" for i in range(400)))
    for name, own in (("one", {}), ("two", {"initializer_range": 0.1})):
        pico.save(tmp_path / name, pad_token_id=None, **own)

    def run(model, out, progress=silent):
        given = (str(tmp_path / model), tmp_path / out, [tmp_path / "text.txt"])
        small_child.distil(*given, steps=6, kept=[0, 2], length=64, save_every=2, progress=progress)
        return (tmp_path / out / "model.safetensors").read_bytes()

    return run


def dying(items, label, total=None):
    for n, item in enumerate(items):
        if n == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item


def test_a_killed_distillation_ends_with_the_same_child(distil, tmp_path):
    """Another model goes on from nothing that was left for the first."""
    whole, begun = {name: distil(name, f"{name}-whole") for name in ("one", "two")}, []
    for name in whole:
        number = os.fork()
        if not number:
            try:
                distil("one", f"{name}-again", dying)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL

        def counting(items, label, total=None):
            begun.append(total)
            yield from items

        assert distil(name, f"{name}-again", counting) == whole[name]
    assert begun == [4, 6] and whole["one"] != whole["two"]
