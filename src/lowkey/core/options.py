"""Options and their ranges, stated once, beside the field that they bound.

    epochs: int = option(100, at_least=0, at_most=10**6)

declares a field of a dataclass. `check_options` then holds a whole object to its declarations, and the same
declarations are what the command line prints as ranges and reads `-O epochs=5` with. Annotations count as
declarations too: a `Literal` is a list of words, a `bool` is true or false, and numbers must be finite.
Fields without a declared range are only held to their annotation.
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

RANGE = "lowkey.range"  # where a field's metadata has its Range
LARGEST_INTEGER = 2**63 - 1  # whole numbers end here, as they do in tensors, files and seeds
TYPE_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
}
CHARACTERS_SHOWN = 60  # characters of a value in a message
LISTED = 40  # names in a message
OUTSIDE = " or package.module:Class"  # what else may stand for a method, a policy or an allocator


@dataclass(frozen=True)
class Range:
    """What a value may be. Numbers are always finite, and whole numbers never beyond 2^63 - 1.

    choices: the words that are allowed. odd: only odd numbers. any_text: a text that has no wrong values
    here, such as a path.
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
        low = [
            f"{word} {_number(x)}"
            for word, x in (("at least", self.at_least), ("above", self.above))
            if x is not None
        ]
        high = [
            f"{word} {_number(x)}"
            for word, x in (("at most", self.at_most), ("below", self.below))
            if x is not None
        ]
        bounds = " and ".join([*low, *high])
        return ", ".join([*(["odd"] if self.odd else []), *([bounds] if bounds else [])])

    def holds(self, value: object) -> bool:
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
    """A dataclass field with a default and a range. In a list, the range is that of each of its numbers or
    words.
    """
    allowed = Range(at_least, above, at_most, below, tuple(choices), odd, any_text)
    return field(default=default, default_factory=default_factory, metadata={RANGE: allowed})


class Checked:
    """A base for dataclasses of options: making an object checks it. Errors: LowkeyError."""

    def __post_init__(self) -> None:
        check_options(self)


def check_options(options: Any, prefix: str = "") -> None:
    """Hold every field to its annotation and range; numbers are turned into the type of their annotation (5
    into 5.0, 8.0 into 8).

    prefix: what precedes the name in messages, like `training.`. Errors: LowkeyError that names the field,
    its value, the rule and the default.
    """
    hints = hints_of(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        # a default needs no check, and outside classes may have one that their annotation does not allow
        if value is not f.default:
            object.__setattr__(
                options,
                f.name,
                checked(prefix + f.name, value, hints.get(f.name, Any), range_of(f), _default(f)),
            )


def check_field(kind: Any, name: str, value: Any, shown_as: str | None = None) -> Any:
    """One value of a field, before there is an object; the command line calls it by another name at times.
    Errors: LowkeyError.
    """
    f = next(f for f in fields(kind) if f.name == name)
    return checked(shown_as or name, value, hints_of(kind).get(name, Any), range_of(f), _default(f))


def checked(name: str, value: Any, hint: Any, allowed: Range = Range(), default: Any = MISSING) -> Any:
    """The value in the type of its annotation. Errors: LowkeyError when it has another type or lies outside
    `allowed`.
    """
    if get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {key: checked(f"{name}.{key}", x, get_args(hint)[1], allowed) for key, x in value.items()}
    return _held(f"{name} {shown(value)}", value, hint, allowed, default)


def _held(label: str, value: Any, hint: Any, allowed: Range, default: Any) -> Any:
    """As `checked`; messages begin with `label`, which names the option and its value."""
    words = _literal(hint)
    allowed = Range(choices=words) if words else allowed
    try:
        found = _typed(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise LowkeyError(
            f"{label}: must be {_kind(hint, allowed)}; {_remedy(value, allowed, default)}"
        ) from None
    for leaf in _leaves(found):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise LowkeyError(f"{label}: must be {_kind(hint, allowed)}; {_remedy(leaf, allowed, default)}")
        if not allowed.holds(leaf):
            raise LowkeyError(f"{label}: must be {allowed}; {_remedy(leaf, allowed, default)}")
        if isinstance(leaf, int) and abs(leaf) > LARGEST_INTEGER:
            raise LowkeyError(
                f"{label}: must be at most {LARGEST_INTEGER}; {_remedy(leaf, allowed, default)}"
            )
    return found


def read_option(kind: type, name: str, text: str, what: str = "") -> Any:
    """The value of field `name` that was written as text on a command line. what: whose option it is, for
    messages.
    """
    f = next(f for f in fields(kind) if f.name == name)
    hint, label = (
        hints_of(kind).get(name, Any),
        f"option {name}={shown(text)}" + (f" of {what}" if what else ""),
    )
    hint = type(f.default) if hint is Any and type(f.default) in (bool, int, float, str) else hint
    if not _literal(hint) and not {bool, int, float, str} & set(_members(hint)):
        raise LowkeyError(f"{label}: cannot be given as text; pass the object in Python")
    return _held(label, _from_text(text, hint), hint, range_of(f), _default(f))


def ranges(kind: Any) -> dict[str, str]:
    """What every field may be, in words, by name; empty where there is nothing to say."""
    hints = hints_of(kind)
    return {f.name: described(hints.get(f.name, Any), range_of(f)) for f in fields(kind)}


def described(hint: Any, allowed: Range) -> str:
    """A range in words, for help texts and tables."""
    words = _literal(hint)
    return str(Range(choices=words)) if words else TYPE_WORDS[bool] if hint is bool else str(allowed)


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of those fields that have one."""
    return {f.name: default for f in fields(kind) if (default := _default(f)) is not MISSING}


def range_of(f: Field) -> Range:
    return f.metadata.get(RANGE, Range())


def hints_of(kind: Any) -> Mapping[str, Any]:
    """Annotations of a class, resolved; none where that fails, as it may for a class from outside."""
    try:
        return get_type_hints(kind)
    except Exception:  # resolving runs what the annotations say
        return {}


def nearest_name(name: str, known: Any, also: str = "") -> str:
    """The remedy for a name that is not known: the most similar known name, else all of them (or the first
    LISTED of more).

    also: what else may be given, in words that follow the list.
    """
    names = list(known)
    near = get_close_matches(str(name), names, 1)
    rest = ", ..." if len(names) > LISTED else ""
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names[:LISTED])}{rest}{also}"


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises: LowkeyError for the first of the option names `given` that `what` does not have, with the most
    similar name that it has.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LowkeyError(
                f"option {shown(name)} of {what} is unknown; it has {', '.join(known) or 'none'}{hint}"
            )


def shown(value: object) -> str:
    """A value for a message: short, and with nothing in it that a terminal would obey."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        text = "(a number of thousands of digits)"
    return text if len(text) <= CHARACTERS_SHOWN else text[: CHARACTERS_SHOWN - 3] + "..."


# -- types


def _typed(value: Any, hint: Any) -> Any:
    """Errors: TypeError, ValueError or OverflowError when the value is not of the annotated type."""
    if hint is bool or hint is str or hint is NoneType:
        if not isinstance(value, hint):
            raise TypeError
        return value
    if hint is int or hint is float:
        return _numeric(value, hint)
    if get_origin(hint) is tuple:
        return _listed(value, get_args(hint))
    if get_origin(hint) is Mapping:
        raise TypeError  # one that is a table was taken apart before
    if _literal(hint):
        if not isinstance(value, str):
            raise TypeError
        return value
    members = _members(hint)
    if len(members) < 2:
        return value  # a class of another kind, which nothing is known of
    return _either(value, members)


def _numeric(value: Any, hint: type) -> int | float:
    """Numbers of other libraries count as well: what has `__index__` is whole, what has `__float__` is a
    number; text is neither.
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
    if not isinstance(value, list | tuple):
        raise TypeError
    if len(inside) == 2 and inside[1] is Ellipsis:
        return tuple(_typed(v, inside[0]) for v in value)
    if len(value) != len(inside):
        raise ValueError
    return tuple(_typed(v, hint) for v, hint in zip(value, inside, strict=True))


def _either(value: Any, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return _typed(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError


def _from_text(text: str, hint: Any) -> Any:
    """A number or a truth where the annotation wants one and the text is one; else the text, for `checked` to
    judge.
    """
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
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _literal(hint: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, tuple) else [value]


# -- words


def _kind(hint: Any, allowed: Range) -> str:
    """What the annotation and the range ask for."""
    if allowed.choices or hint is bool:
        return described(hint, allowed)
    if get_origin(hint) is tuple:
        return _list_of(get_args(hint), allowed)
    if get_origin(hint) is Mapping:
        return "a table" if get_args(hint)[1] is Any else f"a table, each {_kind(get_args(hint)[1], allowed)}"
    words = next((TYPE_WORDS[m] for m in _members(hint) if m in TYPE_WORDS), "of another type")
    return ", ".join(filter(None, [words, str(allowed)]))


def _list_of(inside: tuple[Any, ...], allowed: Range) -> str:
    if Ellipsis in inside:
        return f"a list, each {_kind(inside[0], allowed)}"
    return f"a list of {len(inside)}, each {_kind(inside[0], allowed)}"


def _remedy(value: object, allowed: Range, default: Any) -> str:
    near = get_close_matches(value, allowed.choices, 1) if isinstance(value, str) else []
    if near:
        return f"did you mean {near[0]!r}?"
    return "give another" if default is MISSING else f"leave it out for {shown(default)}"


def _default(f: Field) -> Any:
    return (
        f.default
        if f.default is not MISSING
        else f.default_factory()
        if f.default_factory is not MISSING
        else MISSING
    )


def _number(x: float) -> str:
    return f"{x:.12g}" if isinstance(x, float) else str(x)
