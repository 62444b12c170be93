"""`make bench`: it runs, and names the steps that have become slower than in the committed run."""

from __future__ import annotations

import json
import subprocess

import pytest
import typer
from pages import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench

    return bench


def row(setting, quotient, context=1024, spread=0.01):
    quartiles = [quotient - spread, quotient + spread]
    own = {"setting": setting, "context": context, "threads": 1}
    return own | {"ratio_to_stock": quotient, "spread": quartiles}


@pytest.fixture
def old():
    rows = [row("stock", 1), row("int4", 0.8), row("int4", 0.7, 4096), row("kivi2", 1.5)]
    models = {name: {"rows": list(rows)} for name in ("tiny", "smollm2")}
    return {"environment": {"processor": "A"}, "models": models}


def test_a_run_on_the_embedded_model_writes_every_kind(bench, tmp_path):
    bench.main(tmp_path / "new.json", quick=True)
    found = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))
    assert {"processor", "cores", "memory_gib", "load", "torch"} <= set(found["environment"])
    rows = found["models"]["tiny"]["rows"]
    bars = {name for known in bench.BARS.values() for name in known}
    assert bars | {"stock", "full", "int8"} == {r["setting"] for r in rows}
    assert bench.slower(found, found) == [] and all(r["ratio_to_stock"] > 0 for r in rows)


def test_steps_that_got_slower_are_named(bench, old):
    new = json.loads(json.dumps(old))
    new["models"]["smollm2"]["rows"][2] = row("int4", 0.78, 4096)
    new["models"]["smollm2"]["rows"][3] = row("kivi2", 1.64)  # 9 %
    assert bench.slower(new, old) == [
        "smollm2, 4096 tokens, 1 thread, int4: 0.78 of stock's time, 0.70 before"
    ]
    new["models"]["smollm2"]["rows"][2] = row("int4", 0.78, 4096, spread=0.1)  # within the noise
    assert bench.slower(new, old) == []
    assert bench.slower(old, {"models": {}}) == []


def test_missed_bars_are_named(bench, old):
    assert bench.missed_bars(old) == [
        "smollm2, 1024 tokens, 1 thread, kivi2: 1.50 of stock's time, its bar is 1.10"
    ]
    slow = {"models": {"smollm2": {"rows": [row("joint:50%", 1.02, 8192), row("int8", 9, 8192)]}}}
    assert [line.split(":")[0] for line in bench.missed_bars(slow)] == [
        "smollm2, 8192 tokens, 1 thread, joint"
    ]


def commit(root, name, content):
    place = root / "docs" / "results" / "bench" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content), encoding="utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", name]):
        subprocess.run(["git", "-C", root, *words], check=True)


def test_the_committed_run_of_the_same_name_comes_first(bench, tmp_path):
    assert bench.committed(tmp_path, tmp_path / "a.json") is None  # no repository
    commit(tmp_path, "a.json", {"a": 1})
    commit(tmp_path, "b.json", {"b": 1})
    commit(tmp_path, "a.json", {"a": 2})
    commit(tmp_path, "c.json", {"c": 1})
    (tmp_path / "docs" / "results" / "bench" / "a.json").write_text("{}")  # not committed
    name = "docs/results/bench/{}.json".format
    assert bench.committed(tmp_path, tmp_path / "a.json") == (name("a"), {"a": 2})
    assert bench.committed(tmp_path, tmp_path / "new.json") == (name("c"), {"c": 1})


@pytest.mark.parametrize("quotient", [0.7, 0.8])
def test_the_exit_status_is_1_if_a_step_got_slower(bench, old, tmp_path, monkeypatch, capsys, quotient):
    rows = [row("stock", 1), row("int4", quotient, 4096)]
    monkeypatch.setattr(bench, "open_model", lambda *given: (None, None))
    monkeypatch.setattr(bench, "settings", lambda *given: {})
    monkeypatch.setattr(bench, "show_steps", lambda found: None)
    monkeypatch.setattr(bench, "step_bench", lambda *given: {"rows": rows})
    monkeypatch.setattr(bench, "committed", lambda *given: ("old.json", old))
    out = tmp_path / "new.json"
    if quotient > 0.77:
        with pytest.raises(typer.Exit) as stop:
            bench.main(out, ["smollm2"], "4k")
        assert stop.value.exit_code == 1
        assert "slower than old.json:\nsmollm2, 4096 tokens, 1 thread, int4: 0.80" in capsys.readouterr().out
    else:
        bench.main(out, ["smollm2"], "4k")
        said = capsys.readouterr().out
        assert "no step is 10 % slower" in said and "another machine (A)" in said
    assert json.loads(out.read_text())["models"]["smollm2"]["rows"] == rows


def test_a_stopped_run_goes_on_behind_what_it_finished(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "open_model", lambda *given: (None, None))
    monkeypatch.setattr(bench, "settings", lambda *given: {})
    monkeypatch.setattr(bench, "show_steps", lambda found: None)
    monkeypatch.setattr(bench, "committed", lambda *given: None)
    asked, out = [], tmp_path / "new.json"

    def step_bench(model, tokenizer, makers, timing, progress):
        asked.append(*timing.contexts)
        if asked == [1024, 4096]:
            raise KeyboardInterrupt
        return {"rows": [row("stock", 1, *timing.contexts)]}

    monkeypatch.setattr(bench, "step_bench", step_bench)
    with pytest.raises(KeyboardInterrupt):
        bench.main(out, ["smollm2"], "1k,4k")
    assert not out.exists()
    bench.main(out, ["smollm2"], "1k,4k")
    assert asked == [1024, 4096, 4096] and not (tmp_path / "new.json.partial").exists()
    rows = json.loads(out.read_text())["models"]["smollm2"]["rows"]
    assert [r["context"] for r in rows] == [1024, 4096]
