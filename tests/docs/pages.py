"""What the tests of the documentation share: its pages, and the code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCED = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```', re.DOTALL | re.MULTILINE
)
SETTING = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. title: the file that the reader is to write it to, where there is one."""

    language: str
    title: str | None
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCED.finditer(page.read_text(encoding="utf-8")):
        yield Block(found["language"], found["title"], found["text"])


def commands(text: str) -> list[list[str]]:
    """The `lowkey` commands of a shell block as lists of words; comments and other programs are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    plain = [words[1:] if words and SETTING.match(words[0]) else words for words in split]
    return [words[1:] for words in plain if words and words[0] == "lowkey"]


def written() -> list[Path]:
    """README and every page of the site that a person wrote."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
