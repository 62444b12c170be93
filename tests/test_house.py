"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted(SOURCE.rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

by_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))


def functions(path: Path) -> list[FUNCTION]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, FUNCTION)]


def test_there_is_something_to_check():
    assert len(FILES) > 20


@by_file
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@by_file
def test_no_function_is_longer_than_60_lines(path):
    assert [f.name for f in functions(path) if f.end_lineno - f.lineno >= 60] == []


@by_file
@pytest.mark.parametrize("word", ["register_forward_hook", "register_forward_pre_hook", "compression_ratio", "torch.load"])
def test_banned_words(path, word):
    assert word not in path.read_text(encoding="utf-8")


@by_file
@pytest.mark.parametrize("module", ["pickle", "shelve", "marshal", "requests"])
def test_banned_modules(path, module):
    imports = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in imports for a in n.names} | {n.module for n in imports if isinstance(n, ast.ImportFrom)}
    assert module not in {(name or "").split(".")[0] for name in names}


@by_file
def test_public_functions_are_annotated(path):
    if path.stem.endswith("_kernel"):
        pytest.skip("a kernel's types are its compiler's")
    assert [f.name for f in functions(path) if not f.name.startswith("_") and not annotated(f)] == []


def annotated(f: FUNCTION) -> bool:
    arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, [f.args.vararg, f.args.kwarg])]
    return f.returns is not None and all(a.annotation for a in arguments if a.arg not in ("self", "cls"))


@by_file
def test_nothing_is_evaluated_from_text(path):
    calls = [
        n.func.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert not {"eval", "exec"} & set(calls)


@by_file
def test_the_module_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))
