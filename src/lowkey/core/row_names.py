"""Names of rows: as short as they can be and still tell the rows of one table apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LAST = ("seed", "folder", "path")  # marks that are used only where all others are the same, in this order


def told_apart(shorts: Sequence[str], marks: Sequence[Mapping[str, str]]) -> list[str]:
    """The short name of each row, and behind it those of its marks in which rows of the same short name
    differ.

    marks: words by what they say, like {"layout": "pre_rope", "group": "group=3"}; an empty or a missing one
    adds nothing. Rows that differ in no mark keep the same name.
    """
    words = [[short] for short in shorts]
    for key in dict.fromkeys(key for own in marks for key in own if key not in LAST):
        _add(words, marks, key, _alike(shorts))
    for key in LAST:
        _add(words, marks, key, _alike([" ".join(w) for w in words]))
    return [" ".join(w) for w in words]


def _alike(names: Sequence[str]) -> list[list[int]]:
    """The rows of each name."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return list(found.values())


def _add(
    words: list[list[str]], marks: Sequence[Mapping[str, str]], key: str, groups: list[list[int]]
) -> None:
    for group in groups:
        found = {i: marks[i].get(key, "") for i in group}
        if len(set(found.values())) > 1:
            for i, word in found.items():
                words[i] += [word] if word else []
