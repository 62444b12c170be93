"""Everything that a user can choose is in a literal dict, and a test compares it with its definition.

Such a test carries `pytest.mark.defines(kind, *names)`. The marks are read from the source of the tests, so
that this one knows them all wherever it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from attention_kinds import KINDS
from pico import DIFFERENCES
from variants import VARIANTS

import lowkey
from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.attention import ATTENTION, ATTENTION_KINDS
from lowkey.conversion import CONVERSION_FIELDS, CONVERSIONS
from lowkey.core.types import LAYOUTS
from lowkey.methods import DYNAMIC_METHODS, METHODS
from lowkey.models.families import FAMILIES
from lowkey.policies import POLICIES, SCORES
from lowkey.policies.allocators import TOKEN_ALLOCATORS
from lowkey.storage.packing import SCHEMES

TESTS = Path(__file__).parents[1]
SOURCE = Path(lowkey.__file__).parent
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


def test_tests_of_all_families_and_attention_kinds_run_over_each():
    """A family's definition is transformers' own model of it, which `pico` builds from these differences."""
    assert set(DIFFERENCES) == set(FAMILIES)
    assert {variant["attention"] for variant in VARIANTS.values()} == set(ATTENTION)
    assert {kind["attention"] for kind in KINDS.values()} == set(ATTENTION)


def test_tables_of_the_same_choices_have_the_same_names():
    assert tuple(ATTENTION) == ATTENTION_KINDS
    assert set(CONVERSIONS) == set(CONVERSION_FIELDS) <= set(ATTENTION)
    assert set(SCORES) <= set(POLICIES)
    assert {kind.layout for kind in METHODS.values()} <= set(LAYOUTS)


TABLES = {
    "allocation/allocators.py": ["RANK_ALLOCATORS"],
    "attention/modeling_lowkey.py": ["ATTENTION"],
    "cache/cache.py": ["EVICTING_LAYERS"],
    "calibration/limits.py": ["JUDGES"],
    "calibration/objectives.py": ["OBJECTIVES"],
    "calibration/sensitivity.py": ["SIGNALS"],
    "conversion/kinds.py": ["CONVERSIONS"],
    "conversion/target.py": ["CONVERSION_FIELDS"],
    "core/layouts.py": ["LAYOUTS"],
    "evaluate/recall.py": ["FORMS"],
    "evaluate/result.py": ["TASKS"],
    "export/__init__.py": ["FORMATS"],
    "heads/induction.py": ["ECHOES"],
    "heads/needles.py": ["NEEDLE_TASKS"],
    "heads/retrieval.py": ["SCORE_KINDS"],
    "methods/__init__.py": ["METHODS", "DYNAMIC_METHODS"],
    "models/families.py": ["FAMILIES", "REFUSED"],
    "policies/__init__.py": ["SCORES", "POLICIES"],
    "policies/allocators.py": ["TOKEN_ALLOCATORS"],
    "storage/packing.py": ["SCHEMES"],
}


def test_what_can_be_chosen_stands_in_a_literal_dict():
    for path, names in TABLES.items():
        tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
        values = {
            ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]): node.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
        }
        assert all(isinstance(values[name], ast.Dict) for name in names), path


def test_nothing_is_added_to_a_table_afterwards():
    names = {name for tables in TABLES.values() for name in tables}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        stored = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Subscript) and not isinstance(n.ctx, ast.Load)
        ]
        changes = ("update", "setdefault", "pop", "clear")
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in changes]
        changed = {ast.unparse(n).rpartition(".")[2] for n in [*stored, *(n.value for n in calls)]}
        assert not changed & names, path
