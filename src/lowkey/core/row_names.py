"""Names of the rows of a table: as short as possible, and different for different rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LAST = ("seed", "folder", "path")  # marks that are used only where all others agree, in this order


def distinct_row_names(shorts: Sequence[str], marks: Sequence[Mapping[str, str]]) -> list[str]:
    """Name each row by its short name and those marks in which rows of that short name differ.

    Args:
        shorts: the short name of each row.
        marks: for each row, words by what they describe, like {"layout": "pre_rope", "group": "group=3"}. An
            empty or missing one adds nothing.

    Returns:
        One name for each row. Rows that differ in no mark have the same name.
    """
    words = [[short] for short in shorts]  # of each name; joined at the end
    for key in dict.fromkeys(key for own in marks for key in own if key not in LAST):
        _add_where_different(words, marks, key, _rows_by_name(shorts))
    for key in LAST:
        _add_where_different(words, marks, key, _rows_by_name([" ".join(w) for w in words]))
    return [" ".join(w) for w in words]


def _rows_by_name(names: Sequence[str]) -> list[list[int]]:
    """The numbers of the rows of each name."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(name, []).append(i)
    return list(rows.values())


def _add_where_different(
    words: list[list[str]], marks: Sequence[Mapping[str, str]], key: str, groups: list[list[int]]
) -> None:
    """Add the mark `key` to the words of all rows of those groups in which it differs."""
    for group in groups:
        word_of = {i: marks[i].get(key, "") for i in group}
        if len(set(word_of.values())) > 1:
            for i, word in word_of.items():
                words[i] += [word] if word else []
