"""Arguments that docstrings describe exist. Several may share a line: `rows, batch: not used.`"""

from __future__ import annotations

import ast
import re

from pages import ROOT

SOURCE = ROOT / "src"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
CLASSES = {
    node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
}
SECTION = re.compile(r"^(?:Args|Attributes):\n((?: .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ", re.MULTILINE)
Described = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def described(node: Described) -> set[str]:
    """The names in the sections of a docstring."""
    text = (ast.get_docstring(node) or "") + "\n"
    entries = [entry for section in SECTION.findall(text) for entry in ENTRY.findall(section)]
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a class, those under a condition too."""
    under = [flat([*part.body, *part.orelse]) for part in body if isinstance(part, ast.If)]
    return [*body, *(part for parts in under for part in parts)]


def known(node: Described) -> set[str]:
    """The parameters of a function; the fields, properties and parameters of a class and of its bases."""
    if not isinstance(node, ast.ClassDef):
        given = node.args
        named = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
        return {arg.arg for arg in named if arg is not None}
    names: set[str] = set()
    for part in flat(node.body):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.add(part.target.id)
        elif isinstance(part, ast.FunctionDef):
            names |= known(part) if part.name == "__init__" else {part.name}
            names |= {
                n.attr
                for n in ast.walk(part)
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            }
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
        names |= known(CLASSES[name]) if name in CLASSES and CLASSES[name] is not node else set()
    return names


def test_described_arguments_exist():
    wrong = {
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}": sorted(described(node) - known(node))
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, Described) and described(node) - known(node)
    }
    assert wrong == {}


def test_an_argument_that_does_not_exist_is_seen():
    tree = ast.parse(
        'def f(a, *b):\n    """Do.\n\n    Args:\n        a, c: two.\n        b: more.\n    """\n'
    )
    (function,) = tree.body
    assert described(function) - known(function) == {"c"}
