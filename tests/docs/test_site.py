"""The documentation site builds without a warning: links lead somewhere, names of the reference exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = sorted(path.parent.name for path in (ROOT / "src" / "lowkey").glob("*/__init__.py"))
HIDDEN = {"cli", "data"}  # commands have a page of their own; data holds files only


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed; pip install 'lowkey[docs]'")
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | quiet())
    assert built.returncode == 0, built.stderr[-4000:]
    page = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "--budget" in page and "lowkey compress" in page


def quiet() -> dict[str, str]:
    """The theme's note about its successor is no warning of ours."""
    return {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}


def test_the_page_of_the_code_orders_rooms_as_the_linter_does():
    contract = (ROOT / ".importlinter").read_text(encoding="utf-8").split("layers =\n")[1].split("\n\n")[0]
    layers = [{room.strip() for room in line.split("|")} for line in contract.splitlines()]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    rows = [set(re.findall(r"`(\w+)`", cell)) for cell in table]
    assert rows == [layer for layer in layers if layer != {"version"}]


def test_every_room_has_a_page_of_the_reference():
    pages = {path.stem for path in (ROOT / "docs" / "reference" / "api").glob("*.md")}
    assert pages == set(ROOMS) - HIDDEN | {"lowkey"}
