"""Options and their ranges, stated once, beside the field that they bound.

    epochs: int = option(100, at_least=0, at_most=10**6)

declares a field of a dataclass. `check_options` holds a whole object to its declarations. The command line
prints the same declarations as ranges and reads `-O epochs=5` with them. Annotations are declarations too: a
`Literal` is a list of words, a `bool` is true or false, and numbers must be finite. Fields without a declared
range are only held to their annotation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lowkey.core.errors import LowkeyError

RANGE = "lowkey.range"  # the key of a field's metadata under which its Range is kept
LARGEST_INTEGER = 2**63 - 1  # whole numbers end here, as they do in tensors, files and seeds
TYPE_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
}
CHARACTERS_SHOWN = 60  # of a value in a message
LISTED = 40  # names in a message
OUTSIDE = " or package.module:Class"  # what else may stand for a method, a policy or an allocator


@dataclass(frozen=True)
class Range:
    """The values that an option may have.

    Numbers are always finite, and whole numbers never beyond 2^63 - 1.

    Args:
        at_least: the smallest number that is allowed.
        above: numbers must be larger than this.
        at_most: the largest number that is allowed.
        below: numbers must be smaller than this.
        choices: the words that are allowed; empty for any text.
        odd: whether numbers must be odd.
        any_text: whether any text is right, as for a path. It declares that no range was forgotten.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    odd: bool = False
    any_text: bool = False

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        limits = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        bounds = " and ".join(f"{words} {_number(limit)}" for words, limit in limits if limit is not None)
        return ", ".join([*(["odd"] if self.odd else []), *([bounds] if bounds else [])])

    def holds(self, value: object) -> bool:
        """Whether a number or text is allowed; values of other types always are."""
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (not self.odd or value % 2 == 1)
        )


def option(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    odd: bool = False,
    any_text: bool = False,
) -> Any:
    """A dataclass field with a default and a range.

    In a list, the range holds for each of its numbers or words. For the range see `Range`.

    Args:
        default: of the field.
        default_factory: makes the default, if it is not given.
    """
    allowed = Range(at_least, above, at_most, below, tuple(choices), odd, any_text)
    return field(default=default, default_factory=default_factory, metadata={RANGE: allowed})


class Checked:
    """A base for dataclasses of options: every object is checked when it is made. Raises: LowkeyError."""

    def __post_init__(self) -> None:
        check_options(self)


def check_options(options: Any, prefix: str = "") -> None:
    """Hold every field of an object to its annotation and range.

    Numbers are turned into the type of their annotation: 5 into 5.0, 8.0 into 8.

    Args:
        options: a dataclass object.
        prefix: what precedes field names in messages, like `training.`.

    Raises:
        LowkeyError: that names the field, its value, the rule and the default.
    """
    hints = hints_of(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        # a default needs no check, and outside classes may have one that their annotation does not allow
        if value is not f.default:
            # options are frozen dataclasses, whose own __setattr__ refuses
            object.__setattr__(
                options,
                f.name,
                checked(prefix + f.name, value, hints.get(f.name, Any), range_of(f), _default(f)),
            )


def check_field(kind: Any, name: str, value: Any, shown_as: str | None = None) -> Any:
    """Check one value of a field before there is an object.

    Args:
        kind: the dataclass.
        name: of the field.
        value: to be checked.
        shown_as: what the command line calls the field, if it has another name there.

    Returns:
        The value in the type of its annotation.

    Raises:
        LowkeyError: see `check_options`.
    """
    f = next(f for f in fields(kind) if f.name == name)
    return checked(shown_as or name, value, hints_of(kind).get(name, Any), range_of(f), _default(f))


def checked(name: str, value: Any, hint: Any, allowed: Range = Range(), default: Any = MISSING) -> Any:
    """Check a value against an annotation and a range.

    Args:
        name: what the value is called in messages.
        value: to be checked.
        hint: the annotation.
        allowed: the range.
        default: for the remedy in messages.

    Returns:
        The value in the type of its annotation.

    Raises:
        LowkeyError: if it has another type or lies outside the range.
    """
    if get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {key: checked(f"{name}.{key}", x, get_args(hint)[1], allowed) for key, x in value.items()}
    return _checked(f"{name} {shown(value)}", value, hint, allowed, default)


def _checked(label: str, value: Any, hint: Any, allowed: Range, default: Any) -> Any:
    """As `checked`. Messages begin with `label`, which names the option and its value."""
    words = _literal(hint)
    allowed = Range(choices=words) if words else allowed
    try:
        typed = _typed(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise LowkeyError(
            f"{label}: must be {_kind(hint, allowed)}; {_remedy(value, allowed, default)}"
        ) from None
    # the range of a list holds for each of its items
    for leaf in _leaves(typed):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise LowkeyError(f"{label}: must be {_kind(hint, allowed)}; {_remedy(leaf, allowed, default)}")
        if not allowed.holds(leaf):
            raise LowkeyError(f"{label}: must be {allowed}; {_remedy(leaf, allowed, default)}")
        if isinstance(leaf, int) and abs(leaf) > LARGEST_INTEGER:
            raise LowkeyError(
                f"{label}: must be at most {LARGEST_INTEGER}; {_remedy(leaf, allowed, default)}"
            )
    return typed


def read_option(kind: type, name: str, text: str, what: str = "") -> Any:
    """Read the value of a field from text on a command line.

    Args:
        kind: the dataclass.
        name: of the field.
        text: the value as it was typed.
        what: whose option it is, for messages.

    Returns:
        The value in the type of its annotation.

    Raises:
        LowkeyError: for a value that is not allowed, or a field whose type cannot be typed.
    """
    f = next(f for f in fields(kind) if f.name == name)
    hint = hints_of(kind).get(name, Any)
    label = f"option {name}={shown(text)}" + (f" of {what}" if what else "")
    # without an annotation, a field is of the type of its default
    hint = type(f.default) if hint is Any and type(f.default) in (bool, int, float, str) else hint
    if not _literal(hint) and not {bool, int, float, str} & set(_members(hint)):
        raise LowkeyError(f"{label}: cannot be given as text; pass the object in Python")
    return _checked(label, _from_text(text, hint), hint, range_of(f), _default(f))


def ranges(kind: Any) -> dict[str, str]:
    """The range of every field of a dataclass, in words; empty where there is nothing to say."""
    hints = hints_of(kind)
    return {f.name: described(hints.get(f.name, Any), range_of(f)) for f in fields(kind)}


def described(hint: Any, allowed: Range) -> str:
    """An annotation and a range in words, for help texts and tables."""
    words = _literal(hint)
    return str(Range(choices=words)) if words else TYPE_WORDS[bool] if hint is bool else str(allowed)


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of those fields of a dataclass that have one."""
    return {f.name: default for f in fields(kind) if (default := _default(f)) is not MISSING}


def range_of(f: Field) -> Range:
    """The range that was declared for a field; one that allows everything if none was."""
    return f.metadata.get(RANGE, Range())


def hints_of(kind: Any) -> Mapping[str, Any]:
    """The annotations of a class, resolved. None if that fails, as it may for a class from outside."""
    try:
        return get_type_hints(kind)
    except Exception:  # resolving evaluates annotations, which may raise anything
        return {}


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar known name, upper and lower case taken as the same; None if none is similar."""
    by_lower_case = {str(word).lower(): word for word in known}
    near = get_close_matches(str(name).lower(), list(by_lower_case), 1)
    return by_lower_case[near[0]] if near else None


def nearest_name(name: str, known: Any, also: str = "") -> str:
    """The remedy for an unknown name.

    Args:
        name: that is not known.
        known: the names that are.
        also: what else may be given, in words that follow the list.

    Returns:
        The most similar known name, or a list of all (of many, the first).
    """
    names = list(known)
    near = closest(name, names)
    rest = ", ..." if len(names) > LISTED else ""
    return f"did you mean {near!r}?" if near else f"choose one of {', '.join(names[:LISTED])}{rest}{also}"


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names of options that something does not have.

    Args:
        what: whose options they are, for messages.
        given: the names.
        known: the names that it has.

    Raises:
        LowkeyError: for the first unknown name, with the most similar known one.
    """
    for name in given:
        if name not in known:
            near = closest(name, known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise LowkeyError(
                f"option {shown(name)} of {what} is unknown; it has {', '.join(known) or 'none'}{hint}"
            )


def shown(value: object) -> str:
    """A value for a message: short, and without characters that a terminal would obey."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        text = "(a number of thousands of digits)"
    return text if len(text) <= CHARACTERS_SHOWN else text[: CHARACTERS_SHOWN - 3] + "..."


# -- types


def _typed(value: Any, hint: Any) -> Any:
    """The value in the annotated type.

    Raises:
        TypeError, ValueError or OverflowError: if it is not of that type.
    """
    if hint is bool or hint is str or hint is NoneType:
        if not isinstance(value, hint):
            raise TypeError
        return value
    if hint is int or hint is float:
        return _numeric(value, hint)
    if get_origin(hint) is tuple:
        return _listed(value, get_args(hint))
    if get_origin(hint) is Mapping:
        raise TypeError  # `checked` takes tables apart, so this is none
    if _literal(hint):
        if not isinstance(value, str):
            raise TypeError
        return value
    members = _members(hint)
    if len(members) < 2:
        return value  # some other class, of which nothing is known here
    return _first_that_fits(value, members)


def _numeric(value: Any, hint: type) -> int | float:
    """A number in the annotated type.

    Numbers of other libraries count, too: what has `__index__` is whole, what has `__float__` is a number.
    """
    if (
        isinstance(value, bool | str | bytes)
        or not hasattr(value, "__float__")
        or getattr(value, "ndim", None)
    ):
        raise TypeError
    if hint is float:
        return value if type(value) is float else float(value)
    if hasattr(value, "__index__"):
        return value if type(value) is int else int(value)
    if float(value).is_integer():
        return int(value)
    raise ValueError


def _listed(value: Any, inside: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list as a tuple, each item in the annotated type."""
    if not isinstance(value, list | tuple):
        raise TypeError
    if len(inside) == 2 and inside[1] is Ellipsis:
        return tuple(_typed(v, inside[0]) for v in value)
    if len(value) != len(inside):
        raise ValueError
    return tuple(_typed(v, hint) for v, hint in zip(value, inside, strict=True))


def _first_that_fits(value: Any, members: tuple[Any, ...]) -> Any:
    """The value in the first type of a union that it fits."""
    for member in members:
        try:
            return _typed(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError


def _from_text(text: str, hint: Any) -> Any:
    """The number or truth value that a text stands for, if the annotation wants one; else the text itself."""
    members = _members(hint)
    if NoneType in members and text == "none":
        return None
    if bool in members and text in ("true", "false"):
        return text == "true"
    if int in members and re.fullmatch(r"[+-]?\d{1,400}", text, re.ASCII):
        return int(text)
    if float in members:
        try:
            return float(text) if text.isascii() and "_" not in text else text
        except ValueError:
            return text
    return text


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another annotation, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _literal(hint: Any) -> tuple[str, ...]:
    """The words of a `Literal`; none for another annotation."""
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


def _leaves(value: Any) -> list[Any]:
    """All items of nested tuples."""
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, tuple) else [value]


# -- words


def _kind(hint: Any, allowed: Range) -> str:
    """What an annotation and a range ask for, in words."""
    if allowed.choices or hint is bool:
        return described(hint, allowed)
    inside = get_args(hint)
    if get_origin(hint) is tuple:
        count = "a list" if Ellipsis in inside else f"a list of {len(inside)}"
        return f"{count}, each {_kind(inside[0], allowed)}"
    if get_origin(hint) is Mapping:
        return "a table" if inside[1] is Any else f"a table, each {_kind(inside[1], allowed)}"
    words = next((TYPE_WORDS[m] for m in _members(hint) if m in TYPE_WORDS), "of another type")
    return ", ".join(filter(None, [words, str(allowed)]))


def _remedy(value: object, allowed: Range, default: Any) -> str:
    near = closest(value, allowed.choices) if isinstance(value, str) else None
    if near:
        return f"did you mean {near!r}?"
    if default is MISSING:
        return "give another"
    return "leave it out" if default is None else f"leave it out for {shown(default)}"


def _default(f: Field) -> Any:
    """The default of a field, or MISSING."""
    if f.default is MISSING and f.default_factory is not MISSING:
        return f.default_factory()
    return f.default


def _number(x: float) -> str:
    return f"{x:.12g}" if isinstance(x, float) else str(x)
