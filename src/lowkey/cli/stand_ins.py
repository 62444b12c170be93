"""Describe dataclasses of options as JSON, and make stand-ins for them from that JSON.

A stand-in is a dataclass with the same field names, types, ranges and defaults, and nothing else of the
class. That is what `lowkey.core.options` needs to check an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, make_dataclass
from types import EllipsisType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lowkey.core.options import Range, defaults_of, hints_of, option, range_of

PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "none": NoneType, "...": Ellipsis}


def fields_described(kind: Any, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Describe the fields of a dataclass as JSON: by name the type, the default and the bounds."""
    hints, defaults = hints_of(kind), defaults_of(kind)
    return {
        f.name: {
            "type": _words(hints.get(f.name, Any)),
            **({"default": defaults[f.name]} if _plain(defaults.get(f.name, object)) else {}),
            **_bounds(f),
        }
        for f in fields(kind)
        if f.init and f.name not in leave_out
    }


def stand_in(name: str, options: Mapping[str, Mapping[str, Any]]) -> type:
    """Make a dataclass of this name from what `fields_described` returned."""
    return make_dataclass(
        name,
        [
            (
                key,
                _hint(known["type"]),
                option(
                    _value(known["default"]) if "default" in known else MISSING,
                    **{bound: x for bound, x in known.items() if bound not in ("type", "default")},
                ),
            )
            for key, known in options.items()
        ],
        kw_only=True,
    )


def _bounds(f: Field) -> dict[str, Any]:
    """The bounds of a field that differ from those of a range that allows everything."""
    return {name: x for name, x in vars(range_of(f)).items() if x != getattr(Range(), name)}


def _plain(value: Any) -> bool:
    """Whether JSON can hold a default."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _value(found: Any) -> Any:
    """A default as read from JSON, with tuples in place of lists."""
    return tuple(map(_value, found)) if isinstance(found, list) else found


def _words(hint: Any) -> Any:
    """A type as JSON: a name, or a list of the kind of type and its arguments."""
    for name, plain in PLAIN_TYPES.items():
        if hint is plain:
            return name
    inside = [_words(x) for x in get_args(hint)]
    if get_origin(hint) is Literal:
        return ["literal", *get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return ["union", *inside]
    if get_origin(hint) is tuple:
        return ["tuple", *inside]
    if get_origin(hint) is Mapping:
        return ["mapping", *inside]
    return "any"


def _hint(words: Any) -> Any:
    """The type that `_words` wrote."""
    if isinstance(words, str):
        return PLAIN_TYPES.get(words, Any)
    kind, *inside = words
    if kind == "literal":
        return Literal[tuple(inside)]
    found: tuple[type | EllipsisType, ...] = tuple(_hint(x) for x in inside)
    kinds: dict[str, Any] = {"union": Union, "tuple": tuple, "mapping": Mapping}
    return kinds[kind][found]
