"""What the documentation shows works: every command and every line of Python of the pages is run.

Commands run in this process, on the embedded model and at small sizes, each page in a folder of its own.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import typer
from pages import DOCS, ROOT, Block, blocks, commands, name_of, written
from typer.testing import CliRunner

from lowkey.cli.app import app

RUN = [  # pages with something to run
    page
    for page in (ROOT / "README.md", DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md")))
    if any(block.language in ("bash", "python") for block in blocks(page))
]
SMALL = {  # given to a verb besides, so that a page runs in seconds; of two equal options the last counts
    "bench": "--context 64 --rounds 1",
    "compress": "--windows 4 --context 64",
    "convert": "--windows 4 --context 64",
    "diversity": "--windows 1 --context 32 --inits 0",
    "eval": "--windows 1 --context 128 --cases 1",
    "generate": "--tokens 3",
    "heads": "--cases 10 --context 512",
    "plan": "--windows 4 --compare-windows 1 --held-out-windows 1 --window-tokens 64 --no-recall",
    "pretrain": "--set training.tokens=4096",
    "recover": "--batch 1 --length 64",
    "serve": "--dry-run",
}
NOVEL = ROOT / "src" / "lowkey" / "data" / "time_machine.txt"
TEXTS = ("train.txt", "chapter-1.txt", "chapter-2.txt")  # that pages suppose the reader to have


@pytest.mark.timeout(900)  # seconds on an idle machine; the README calibrates at full size
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for files that the reader writes
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for name in TEXTS:
        Path(name).write_text(NOVEL.read_text(encoding="utf-8"), encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        run(block, names)


def test_the_pages_that_show_commands_are_run():
    assert {"README.md", "docs/tutorial.md", "docs/how-to/choose-a-method.md"} <= set(map(name_of, RUN))


def run(block: Block, names: dict[str, object]) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, "<page>", "exec"), names)
    elif block.language == "bash":
        for words in commands(block.text):
            ran = CliRunner().invoke(app, small(words))
            assert ran.exit_code == 0, (words, ran.output, ran.exception)


def small(words: list[str]) -> list[str]:
    """A command on the embedded model and at a small size."""
    onto_tiny = ["tiny" if word in ("MODEL", "smollm2") else word for word in words]
    steps = [re.sub(r"^(distill|kl|ce)=\d+|(?<=,)(distill|kl|ce)=\d+", fewer, word) for word in onto_tiny]
    return steps + SMALL.get(words[0], "").split()


def fewer(found: re.Match[str]) -> str:
    """One step of a stage of recovery."""
    return f"{found[1] or found[2]}=1"


def test_every_command_of_every_page_parses():
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="lowkey")
    shown = [block.text for page in written() for block in blocks(page) if block.language == "bash"]
    for words in (words for text in shown for words in commands(text)):
        if not words[0].startswith("-"):  # an option of all commands, like --version
            command = root.get_command(context, words[0])
            assert command is not None, words
            command.make_context(words[0], words[1:], parent=context)


def test_examples_import_what_packages_export():
    """A type checker refuses a name that a package imports for itself alone."""
    code = [b.text for page in written() for b in blocks(page) if b.language == "python"]
    imported = [
        (node.module, name.name)
        for text in code
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lowkey"
        for name in node.names
    ]
    packages = [(importlib.import_module(module), name) for module, name in imported]
    assert ("lowkey.policies", "SnapKV") in imported
    assert not [
        (m.__name__, name) for m, name in packages if hasattr(m, "__path__") and name not in m.__all__
    ]
