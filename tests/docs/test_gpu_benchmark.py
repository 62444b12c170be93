"""`benchmarks/gpu.py` at toy size on the CPU: every part writes its figures, and what fails is told."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from pages import ROOT

from lowkey.backends import triton_gpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def rows(path, part):
    return json.loads(path.read_text(encoding="utf-8"))[part]


def test_all_parts_write_what_they_find(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SETTINGS", ("int4", "joint:50%"))
    monkeypatch.setattr(gpu, "FORMS", gpu.FORMS[::3])
    out = tmp_path / "gpu.json"
    gpu.main(out, "cpu", True, ",".join(gpu.PARTS), 5.0)
    assert not any("error" in row for part in gpu.PARTS for row in rows(out, part))
    assert all(row["right"] for row in rows(out, "kernels")) and rows(out, "kernels")[-1]["rotated"]
    assert {"read", "flash", "token4, token4"} <= {row["what"] for row in rows(out, "bandwidth")}
    assert [row["setting"] for row in rows(out, "steps")] == ["preparation", "int4", "joint:50%"]
    assert all(row["ratio_to_stock"] > 0 for row in rows(out, "steps")[1:])
    assert rows(out, "calibration")[0]["seconds"] > 0 and rows(out, "two-gpus")[0]["right"]


def test_a_wrong_kernel_fails_the_run(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FORMS", gpu.FORMS[:2])
    right = triton_gpu.Segments.attend

    def wrong(self, *args, **options):
        out = right(self, *args, **options)
        return (*out[:3], out[3] + 0.5)

    monkeypatch.setattr(triton_gpu.Segments, "attend", wrong)
    with pytest.raises(typer.Exit) as stopped:
        gpu.main(tmp_path / "gpu.json", "cpu", True, "kernels", 5.0)
    assert stopped.value.exit_code == 1
    assert not any(row["right"] for row in rows(tmp_path / "gpu.json", "kernels"))


def test_a_failure_costs_nothing_else_and_late_parts_wait(gpu, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(gpu, "attention", fail)
    with pytest.raises(typer.Exit) as stopped:
        gpu.main(tmp_path / "gpu.json", "cpu", True, "bandwidth", 5.0)
    assert stopped.value.exit_code == 1
    found = rows(tmp_path / "gpu.json", "bandwidth")
    assert [row["error"] for row in found[2:]] == ["RuntimeError: no kernel image"] * 4
    assert found[1]["what"] == "flash" and found[1]["ms"] > 0
    gpu.main(tmp_path / "late.json", "cpu", True, "two-gpus", 0.0)
    assert rows(tmp_path / "late.json", "two-gpus")[0]["skipped"] == "no time was left"


@pytest.mark.parametrize(
    ("device", "toy", "parts", "message"),
    [
        ("cuda", False, "kernels", "torch finds no GPU here"),
        ("cpu", False, "kernels", "add --toy"),
        ("tpu", True, "kernels", "choose cuda"),
        ("cpu", True, "kernel", "choose from kernels"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(gpu, tmp_path, capsys, device, toy, parts, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(typer.Exit) as stopped:
        gpu.main(tmp_path / "gpu.json", device, toy, parts, 5.0)
    line = capsys.readouterr().err
    assert stopped.value.exit_code == 2 and message in line and line.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()
