"""What the tests of the documentation share: its pages, and the code in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCED = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The `lowkey` commands of a shell block as lists of words; comments and other commands are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "lowkey"]


def written_pages() -> list[Path]:
    """README and every page that a person wrote."""
    return [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md"))]
