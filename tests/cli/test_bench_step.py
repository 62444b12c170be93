"""`lowkey bench step`: what it prints."""

from __future__ import annotations

import shutil

import pytest
from commands import done, printed, refused

STEP = ("bench", "step")
SMALL = ("--context", "48,256", "--rounds", 1)


@pytest.fixture(scope="module")
def found(model, made):
    settings = (
        f"stock,full,streamingllm:50%,kivi4,plan:{made[0]},plan:{made[0]}+streamingllm:50%+int8,fastgen"
    )
    return printed(*STEP, model, *SMALL, "--settings", settings, "--threads", "1")


def test_json_has_the_fields_of_the_contract(found, made):
    assert set(found) == {"format", "environment", "rows"} and found["format"] == 1
    fields = ["setting", "context", "threads", "step_ms", "ratio_to_stock", "spread"]
    fields += ["bytes_held", "operations", "value_reads"]
    assert all(list(row) == fields for row in found["rows"])
    plan = f"plan:{made[0]}"
    names = ["stock", "full", "streamingllm:50%", "kivi4", plan, f"{plan}+streamingllm:50%+int8", "fastgen"]
    assert [(r["context"], r["setting"]) for r in found["rows"]] == [(n, s) for n in (48, 256) for s in names]


def test_settings_store_what_they_say(found, made):
    """Names, and bytes in their order: a policy over a plan in integers holds less than each by itself."""
    held = {row["setting"]: row["bytes_held"] for row in found["rows"] if row["context"] == 256}
    plan = f"plan:{made[0]}"
    assert held["stock"] == held["full"]
    assert held["full"] > held["streamingllm:50%"] > held[f"{plan}+streamingllm:50%+int8"]
    assert held["full"] > held["kivi4"] and held["full"] > held[plan] > held[f"{plan}+streamingllm:50%+int8"]


def test_a_table_is_printed(model):
    ran = done(*STEP, model, "--context", 48, "--rounds", 1, "--settings", "int8")
    lines = ran.out.splitlines()
    assert [name for name in ("stock", "int8") if not any(f" {name} " in line for line in lines)] == []
    assert "over stock" in ran.out and "medians of 1 rounds" in ran.out


def test_what_a_model_cannot_do_is_refused(model, other, made):
    assert "512 positions" in refused(*STEP, model, "--context", 1024)
    assert "head scores" in refused(*STEP, model, *SMALL, "--settings", "headkv-r:50%")
    assert "compress this model anew" in refused(*STEP, other, *SMALL, "--settings", f"plan:{made[0]}")


def test_a_damaged_plan_is_refused(model, made, tmp_path):
    place = shutil.copytree(made[0], tmp_path / "plan")
    (place / "plan.json").write_text("{}")
    assert "plan" in refused(*STEP, model, *SMALL, "--settings", f"plan:{place}")
