"""Check the arguments of commands before torch is imported and a model is loaded.

Every function raises LowkeyError, in one line, for a value that is not allowed. Classes that a user names as
`package.module:Class` are imported and checked later, together with torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.cli import choices
from lowkey.core import files, options, text
from lowkey.core.budget import LARGEST_BUDGET, UNITS, Budget, too_few_tokens
from lowkey.core.errors import LowkeyError
from lowkey.core.layouts import HEADS, LAYOUTS, Heads, Layout
from lowkey.core.options import nearest_name, ranges, shown
from lowkey.models.names import check_device, check_dtype, check_name

# -- words and numbers


def check_word(what: str, word: str, known: Iterable[str], also: str = "") -> None:
    """Check that a word is one of a list.

    Args:
        what: the argument, for the message.
        word: as it was given.
        known: the words that are allowed.
        also: what else may be given, in words that follow the list.

    Raises:
        LowkeyError: for any other word.
    """
    known = list(known)
    if word not in known:
        raise LowkeyError(f"{what} {shown(word)} is unknown; {nearest_name(word, known, also)}")


def parse_layout(name: str) -> Layout:
    """The layout of this name."""
    check_word("layout", name, LAYOUTS)
    return next(known for known in LAYOUTS if name == known)


def parse_key_bases(name: str) -> Heads:
    """Whether heads share a basis of their keys, by this name."""
    check_word("key bases", name, HEADS)
    return next(known for known in HEADS if name == known)


def check_bits(bits: str | None, also: Iterable[str] = ()) -> None:
    """Check the name of a packing of integers. 8, 4 and 2 stand for int8, int4 and int2.

    Args:
        bits: the name; None is allowed.
        also: other words that are allowed.
    """
    if bits is not None:
        name = f"int{bits}" if bits.isdigit() else bits
        if name not in (known := [*choices.SCHEMES, *also]):
            raise LowkeyError(f"bits {shown(bits)} are unknown; {nearest_name(bits, known)}")


def with_range(settings: str, field: str, help: str) -> str:
    """A help text with the range of the field that the option becomes."""
    return f"{help} ({ranges(choices.settings(settings))[field]})"


def check_settings(settings: str, option_names: Mapping[str, str] = {}, /, **given: Any) -> None:
    """Check options against the ranges of the fields that they become.

    Args:
        settings: the name of a dataclass in `choices`.
        option_names: the name of the option, for each field whose option has another name.
        given: a value by the name of its field; None is not checked.
    """
    for field, value in given.items():
        if value is not None:
            kind = choices.settings(settings)
            options.check_field(kind, field, value, option_names.get(field, field))


def check_sample(windows: int, context: int | None, seed: int) -> None:
    """Check what to calibrate on: the fields of `Sample`."""
    check_settings("Sample", {"length": "context"}, windows=windows, length=context, seed=seed)


def parse_share(budget: str) -> float:
    """Read a budget that must be a share. Returns: the share, above 0 and up to 1."""
    parsed = Budget.parse(budget)
    if parsed.unit != "%":
        raise LowkeyError(
            f"budget {parsed}: every token gets a rank of its own, so the budget must be a mean share; give "
            "it as '50%'"
        )
    return parsed.amount / 100


def parse_bytes(what: str, size: str) -> float:
    """Read a number of bytes, like `2GiB`, `512 MiB` or `4096`.

    Args:
        what: the argument, for messages.
        size: as it was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)?\s*", size, re.ASCII)
    unit = (found[2] or "B") if found else ""
    if not found or unit not in UNITS:
        raise LowkeyError(f"{what} {options.shown(size)}: write it as '2GiB', '512MiB' or '4096' bytes")
    number = float(found[1]) * UNITS[unit]
    if not 1 <= number <= LARGEST_BUDGET:
        raise LowkeyError(f"{what} {options.shown(size)}: must be at least a byte and at most 2^50 of them")
    return number


def parse_tokens(what: str, count: str) -> int:
    """Read a number of tokens, like `4096` or `32k`, in which k is 1024.

    Args:
        what: the argument, for messages.
        count: as it was given.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*([kK]?)\s*", count, re.ASCII)
    if not found:
        raise LowkeyError(f"{what} {options.shown(count)}: write it as '4096' or '32k'")
    number = int(found[1]) * (1024 if found[2] else 1)
    return options.checked(what, number, int, options.Range(at_least=1, at_most=2**24))


def parse_numbers(what: str, numbers: str, settings: str, field: str) -> tuple[int, ...]:
    """Read whole numbers that are separated by commas, like `1,2` or `512,4k`, in which k is 1024.

    Args:
        what: the argument, for messages.
        numbers: as they were given.
        settings: the name of a dataclass in `choices`.
        field: its field that the numbers become, whose range each of them must be in.

    Returns:
        The numbers in their order, each once.
    """
    allowed = options.range_of(next(f for f in fields(choices.settings(settings)) if f.name == field))
    found: dict[int, None] = {}
    for part in numbers.split(","):
        number = re.fullmatch(r"\s*(\d{1,9})\s*([kK]?)\s*", part, re.ASCII)
        if not number:
            raise LowkeyError(
                f"{what} {shown(numbers)}: write whole numbers, separated by commas, like '1,2' or '512,4k'"
            )
        count = int(number[1]) * (1024 if number[2] else 1)
        found[options.checked(what, count, int, allowed)] = None
    return tuple(found)


# -- models, files and folders


def check_model_options(name: str, dtype: str, device: str) -> None:
    """Check the name of a model, and how it is loaded."""
    check_name(name)
    check_dtype(dtype)
    check_device(device)


def read_corpus(path: Path | None, argument: str = "calibration") -> str | None:
    """Read a text file. Returns: its text, or None without a path, which stands for the embedded text."""
    return text.read_text(path, argument) if path else None


def check_plan(path: Path) -> None:
    """Check that a plan folder exists. Its contents are checked when it is loaded."""
    files.read_consistently(path, lambda: _find_plan(path))


def _find_plan(path: Path) -> None:
    if not any((path / name).exists() for name in choices.PLAN_FILES):
        missing = str(path / choices.PLAN_FILES[0])
        raise LowkeyError(f"plan {missing!r} does not exist; give the folder that lowkey compress wrote")


def check_head_files(paths: Iterable[Path] | None) -> None:
    """Check that files of head scores exist. Their contents are checked when they are loaded."""
    for path in paths or ():
        if not path.is_file():
            raise LowkeyError(
                f"head scores {str(path)!r}: no such file; write it with `lowkey heads MODEL --out {path}`"
            )


# -- methods, allocators and policies


def parse_pairs(pairs: list[str] | None, what: str = "option") -> dict[str, str]:
    """Read options that are written as name=value. what: what they are called in messages."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise LowkeyError(f"{what} {shown(pair)}: write it as name=value, like epochs=5")
        if name in found:
            raise LowkeyError(f"{what} {shown(pair)}: {name} is given twice; give it once")
        found[name] = value
    return found


def check_method(name: str, given: Mapping[str, str]) -> None:
    """Check the name of a method, and options of it that are given as text."""
    if not _is_outside("method", name):
        check_word("method", name, choices.METHODS, options.OUTSIDE)
        _check_options(choices.method_options(name), f"method {name!r}", given)


def check_rank_allocator(name: str, given: Mapping[str, str]) -> None:
    """Check the name of a rank allocator, and options of it that are given as text."""
    if not _is_outside("allocator", name):
        check_word("allocator", name, RANK_ALLOCATORS, options.OUTSIDE)
        _check_options(RANK_ALLOCATORS[name], f"allocator {name!r}", given)


def _is_outside(what: str, name: str) -> bool:
    """Whether a name is that of a class outside lowkey, `package.module:Class`.

    Raises: LowkeyError for such a name whose package is not installed. The class itself is imported later.
    """
    if ":" not in name:
        return False
    module, _, attribute = name.partition(":")
    if not all(map(str.isidentifier, [*module.split("."), attribute])):
        raise LowkeyError(f"{what} {shown(name)}: is not written package.module:Class")
    package = module.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:
        raise LowkeyError(
            f"{what} {shown(name)}: no module named {package!r} is found; install it, put its folder on "
            "PYTHONPATH, or give another package.module:Class"
        )
    return True


def _check_options(kind: type, what: str, given: Mapping[str, str]) -> None:
    options.check_names(what, given, list(ranges(kind)))
    for key, value in given.items():
        options.read_option(kind, key, value, what)


def check_policies(
    names: str | None,
    budgets: str | None,
    given: list[str] | None,
    allocator_given: list[str] | None,
    heads: list[Path] | None,
    gates: list[Path] | None,
    small_model: str | None = None,
) -> None:
    """Check eviction policies and what is given for them.

    Args:
        names: policies, separated by commas. `none` is none of them. Without one, none of the others may be
            given.
        budgets: budgets, separated by commas.
        given: options of the policies, as name=value.
        allocator_given: options of their allocators, as name=value.
        heads: files of head scores.
        gates: folders of gates.
        small_model: a model that reads along.
    """
    chosen = [] if names is None else [name for name in names.split(",") if name != choices.NO_POLICY]
    if not chosen:
        remedy = "leave it out" if names else "give --policy too, or leave it out"
        for what, value in (
            ("budget", budgets),
            ("option", given),
            ("allocator option", allocator_given),
            ("heads", heads),
            ("gates", gates),
            ("small model", small_model),
        ):
            if value is not None:
                word = value if isinstance(value, str) else value[0]
                raise LowkeyError(f"{what} {shown(str(word))}: is for a policy; {remedy}")
        return
    check_head_files(heads)
    for path in gates or ():
        if not path.is_dir():
            raise LowkeyError(
                f"gates {str(path)!r}: no such folder; write it with `lowkey gates MODEL {path}`"
            )
    if small_model is not None:
        check_name(small_model)
    own, of_allocator = parse_pairs(given), parse_pairs(allocator_given, "allocator option")
    for name in chosen:
        for budget in budgets.split(",") if budgets is not None else [None]:
            _check_policy(name, budget, own, of_allocator)


def _check_policy(
    name: str, budget: str | None, given: Mapping[str, str], allocator_given: Mapping[str, str]
) -> None:
    kept = None if budget is None else Budget.parse(budget)
    if _is_outside("policy", name):
        return
    check_word("policy", name, choices.POLICIES, options.OUTSIDE)
    kind, what = choices.policy_options(name), f"policy {name!r}"
    own = list(ranges(kind))
    split = given.get("allocator") or choices.allocator_of(name, budget is not None)
    if split is None:
        raise LowkeyError(f"policy {name!r}: needs a budget; give --budget, like '10%' or '64 tokens'")
    check_word("allocator", split, choices.TOKEN_ALLOCATORS)
    parts = choices.allocator_options(split)
    options.check_names(what, given, [*own, *ranges(parts)])
    values = {
        key: options.read_option(kind if key in own else parts, key, value, what)
        for key, value in given.items()
    }
    _check_options(parts, f"the allocator of {what}", allocator_given)
    sinks, recent = ((options.defaults_of(kind) | values)[key] for key in ("sinks", "recent"))
    if kept and kept.unit == "tokens" and kept.amount < sinks + recent:
        raise too_few_tokens(kept, kept.amount, sinks, recent)
