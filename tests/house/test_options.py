"""Every option has a range and a one-line description, and the command line shows both."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest

import lowkey
from lowkey import catalog
from lowkey.allocation.allocators import RANK_ALLOCATORS as RANK_ALLOCATORS
from lowkey.conversion import ConversionOptions
from lowkey.core import options
from lowkey.core.options import Range, checked, option
from lowkey.core.types import Budget, LowkeyError
from lowkey.evaluate import decode_bench
from lowkey.evaluate.result import Task
from lowkey.evaluate.step_bench import StepTiming
from lowkey.heads.diversity import Compared
from lowkey.heads.needles import Drawing
from lowkey.methods import KQSVD, METHODS, Method, StiefAttention
from lowkey.methods.dynakv import GateTraining
from lowkey.planner.plan_for import Search
from lowkey.policies import SCORES, SnapKV
from lowkey.policies.allocators import TOKEN_ALLOCATORS as TOKEN_ALLOCATORS
from lowkey.policies.allocators import Ada
from lowkey.pretraining.recipe import Data, Training

SETTABLE = {
    *(*METHODS.values(), *RANK_ALLOCATORS.values(), *TOKEN_ALLOCATORS.values(), *SCORES.values()),
    *(
        Budget,
        lowkey.Exact,
        lowkey.Sample,
        lowkey.Recovery,
        GateTraining,
        ConversionOptions,
        Data,
        Training,
        Task,
        decode_bench.DecodeShape,
        StepTiming,
        Compared,
        Drawing,
        Search,
    ),
}
FREE = {  # of another kind than numbers and words, and checked where they are used
    ("Policy", "budget"),
    ("Policy", "allocator"),
    ("Exact", "rule"),
    ("Data", "options"),
}
SETTINGS = sorted(
    ((kind, f) for kind in SETTABLE for f in fields(kind)),
    key=lambda found: (found[0].__qualname__, found[1].name),
)
by_field = pytest.mark.parametrize(
    ("kind", "field"), SETTINGS, ids=lambda x: getattr(x, "__qualname__", getattr(x, "name", ""))
)


def leaves(hint: Any) -> set[Any]:
    return (
        {leaf for part in get_args(hint) for leaf in leaves(part)}
        if get_args(hint) and get_origin(hint) is not Literal
        else {hint}
    )


def declared(kind: type, field: Any) -> bool:
    """Whether a field has a range, or is of a kind that needs none."""
    if any((base.__name__, field.name) in FREE for base in kind.__mro__):
        return True
    parts, allowed = (
        leaves(options.hints_of(kind).get(field.name, Any)) - {type(None), Ellipsis},
        options.range_of(field),
    )
    bounded, worded = (
        allowed.at_least is not None or allowed.above is not None,
        bool(allowed.choices or allowed.any_text),
    )
    known = {bool: True, int: bounded, float: bounded, str: worded or bounded}
    return bool(parts) and all(get_origin(part) is Literal or known.get(part, False) for part in parts)


@by_field
def test_every_field_a_user_can_set_has_a_range(kind, field):
    assert declared(kind, field), (
        f"{kind.__qualname__}.{field.name} has no range: declare it with lowkey.core.options.option"
    )


def test_a_field_without_a_range_would_be_found():
    @dataclass(frozen=True)
    class New(Method):
        count: int = 3
        name: str = "x"
        flag: bool = True

    New.__annotations__ = {"count": int, "name": str, "flag": bool}
    assert [declared(New, f) for f in fields(New)] == [False, False, True]


def made(kind: type, given: dict) -> Any:
    """An object with what has no default filled in."""
    needed = {"budget": "50%", "amount": 50.0, "unit": "%", "texts": {"a": "a"}}
    names = {f.name for f in fields(kind)}
    return kind(**({k: v for k, v in needed.items() if k in names} | given))


def outside(kind: type, field: Any) -> list[Any]:
    """Values that the declaration forbids."""
    hint, allowed = options.hints_of(kind)[field.name], options.range_of(field)
    if hint is bool:
        return ["true", 1, None]
    if get_origin(hint) is Literal or allowed.choices:
        return ["no-such-word", 1, None, ""]
    if hint is str:
        return [3, None, b"x"]
    if hint not in (int, float):
        return []
    wrong = [math.nan, math.inf, -math.inf, "3", True, None, [1], 10**400, -(10**400)]
    wrong += [allowed.at_least - 1] if allowed.at_least is not None else [allowed.above]
    wrong += [] if allowed.at_most is None else [allowed.at_most * 2 + 1]
    wrong += [] if allowed.below is None else [allowed.below]
    return wrong + ([2.5] if hint is int else []) + ([allowed.at_least + 1] if allowed.odd else [])


@by_field
def test_values_out_of_range_are_refused_in_one_line(kind, field):
    if any((base.__name__, field.name) in FREE for base in kind.__mro__):
        pytest.skip("no number and no word")
    for value in outside(kind, field):
        with pytest.raises(LowkeyError) as refusal:
            made(kind, {field.name: value})
        line = str(refusal.value)
        assert field.name in line and "must be" in line and "\n" not in line and len(line) < 300, line


@pytest.mark.parametrize("kind", sorted(SETTABLE, key=lambda k: k.__qualname__), ids=lambda k: k.__qualname__)
def test_defaults_are_in_range(kind):
    """They are not checked when an object is made, so they are checked here."""
    for f in fields(kind):
        default = options._default(f)
        if default is not options.MISSING:
            checked(f.name, default, options.hints_of(kind)[f.name], options.range_of(f))


def test_a_message_names_option_value_rule_and_remedy():
    with pytest.raises(
        LowkeyError, match=r"^epochs -1: must be at least 0 and at most 1000000; leave it out for 0$"
    ):
        StiefAttention(epochs=-1)
    with pytest.raises(
        LowkeyError, match=r"^parametrisation 'fre': must be one of mlp, free; did you mean 'free'[?]$"
    ):
        StiefAttention(parametrisation="fre")
    with pytest.raises(LowkeyError, match=r"^budget '10000000000000000000 KiB/token': no cache takes more"):
        Budget.parse("10000000000000000000 KiB/token")


def test_of_many_names_a_message_lists_the_first_few():
    assert options.nearest_name("x", ["one", "two"]) == "choose one of one, two"
    many = options.nearest_name("x", [f"name{i}" for i in range(10_000)])
    assert many.startswith("choose one of name0, name1, ") and many.endswith(", ...") and len(many) < 1000


def test_numbers_take_the_type_of_their_annotation():
    method = KQSVD(ridge=1, group=2.0)
    assert (method.ridge, type(method.ridge), method.group, type(method.group)) == (1.0, float, 2, int)
    assert Training(tokens=1e7, betas=[0, 0.5]).betas == (0.0, 0.5)


def test_a_changed_copy_is_checked_too():
    with pytest.raises(LowkeyError, match="alpha 2"):
        replace(Ada(), alpha=2)
    with pytest.raises(LowkeyError, match="kernel 4: must be odd"):
        replace(SnapKV("10%"), kernel=4)


# -- classes from outside


@dataclass(frozen=True)
class Plain(StiefAttention):
    """An outside method without any declaration, with a default that its annotation does not allow."""

    summary: ClassVar[str] = "x"
    share: float = None  # type: ignore[assignment]
    count: int = 3
    anything: object = None


def test_outside_classes_need_no_declarations():
    assert Plain().share is None and Plain(count=10**6, anything=[]).anything == []
    assert catalog.make_method(f"{__name__}:Plain", {"count": "7"}).count == 7


def test_an_annotation_that_cannot_be_resolved_is_no_error():
    @dataclass(frozen=True)
    class Local(Method):
        count: NoSuchName = 3  # type: ignore[name-defined] # noqa: F821
        ranged: NoSuchName = option(3, at_least=1)  # type: ignore[name-defined] # noqa: F821

        def fit(self, *args):
            raise NotImplementedError

    assert Local(count="x").count == "x" and is_dataclass(Local)
    with pytest.raises(LowkeyError, match="ranged 0"):
        Local(ranged=0)


# -- text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "nan",
        "inf",
        "-1",
        "1e400",
        "x",
        "1_0",
        "\u0663",
        "\x1b[2J",
        "9" * 5000,
        "true",
        "None",
        "0x1",
    ],
)
def test_text_that_is_no_such_number(text):
    for name in ("group", "ridge"):
        with pytest.raises(LowkeyError, match=f"option {name}=.* of method 'kq-svd': must be") as refusal:
            catalog.make_method("kq-svd", {name: text})
        assert "\x1b" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_options_of_an_allocator_of_tokens():
    policy = catalog.make_policy("snapkv", "10%", {"allocator": "pyramid", "beta": "2"})
    assert policy.resolved_allocator().beta == 2.0
    same = catalog.make_policy("curdkv", "10%", {"allocator": "headkv", "kind": "keys"}, {"kind": "copy"})
    assert (same.kind, same.resolved_allocator().kind) == ("keys", "copy")
    with pytest.raises(
        LowkeyError, match="option 'beta' of the allocator of policy 'snapkv' is unknown; it has none"
    ):
        catalog.make_policy("snapkv", "10%", {}, {"beta": "2"})


def test_options_of_an_allocator_of_ranks():
    assert catalog.make_allocator("threshold", {"energy": "singular", "step": "0.05"}).step == 0.05
    with pytest.raises(LowkeyError, match="option step='0' of allocator 'threshold'"):
        catalog.make_allocator("threshold", {"step": "0"})
    with pytest.raises(LowkeyError, match="allocator 'treshold' is unknown; did you mean 'threshold'"):
        catalog.make_allocator("treshold", {})


def test_a_range_in_words():
    assert str(Range(at_least=0, below=1)) == "at least 0 and below 1"
    assert str(Range(odd=True, at_least=1)) == "odd, at least 1"
    assert str(Range(choices=("a", "b"))) == "one of a, b"
