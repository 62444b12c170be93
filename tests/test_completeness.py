"""Everything that a user can choose is listed in a literal dict, and compared with its definition by a test.

Such a test carries `pytest.mark.defines(kind, *names)`. The marks are read from the source of the tests, so that
this one knows them all wherever it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.attention import ATTENTION, ATTENTION_KINDS
from lowkey.conversion import CONVERSION_FIELDS, CONVERSIONS
from lowkey.core.types import LAYOUTS
from lowkey.methods import DYNAMIC_METHODS, METHODS
from lowkey.policies import POLICIES, SCORES
from lowkey.policies.allocators import TOKEN_ALLOCATORS
from lowkey.storage.packing import SCHEMES

TESTS = Path(__file__).parent
CHOICES = {
    "methods": METHODS,
    "dynamic methods": DYNAMIC_METHODS,
    "policies": POLICIES,
    "packings": SCHEMES,
    "attention kinds": ATTENTION,
    "rank allocators": RANK_ALLOCATORS,
    "token allocators": TOKEN_ALLOCATORS,
}


def defined() -> dict[str, set[str]]:
    """The names that tests define, by kind."""
    found: dict[str, set[str]] = {kind: set() for kind in CHOICES}
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for test in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for mark in (n for d in test.decorator_list for n in ast.walk(d) if isinstance(n, ast.Call)):
                if isinstance(mark.func, ast.Attribute) and mark.func.attr == "defines":
                    kind, *names = (name for part in mark.args for name in named(part, tree))
                    found[kind] |= set(names)
    return found


def named(part: ast.expr, tree: ast.Module) -> Iterator[str]:
    """The text of a literal; for `*TABLE`, the keys of the literal dict of this name in the same file."""
    if isinstance(part, ast.Constant):
        yield str(part.value)
    elif isinstance(part, ast.Starred) and isinstance(part.value, ast.Name):
        tables = [
            n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == part.value.id
        ]
        for key in (key for table in tables if isinstance(table.value, ast.Dict) for key in table.value.keys):
            yield str(ast.literal_eval(key))


@pytest.mark.parametrize("kind", CHOICES)
def test_every_choice_has_a_definition_written_by_hand(kind):
    assert defined()[kind] == set(CHOICES[kind])


def test_tables_of_the_same_choices_have_the_same_names():
    assert tuple(ATTENTION) == ATTENTION_KINDS
    assert set(CONVERSIONS) == set(CONVERSION_FIELDS) <= set(ATTENTION)
    assert set(SCORES) <= set(POLICIES)
    assert {kind.layout for kind in METHODS.values()} <= set(LAYOUTS)
