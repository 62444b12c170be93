"""Read result files: what a result must look like, and which rows may stand in one table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowkey.core.errors import LowkeyError
from lowkey.core.files import read_json
from lowkey.core.row_names import distinct_row_names
from lowkey.report.task_shapes import harness_fits

RESULTS_FORMAT, RESULT_FILE = 1, "result"
GIVE_RESULTS = "give a file that lowkey eval wrote, or a folder of them"
# Fields of a row that must be numbers or null.
# fmt: off
NUMBER_FIELDS = [
    "bits", "sinks", "recent",
    "perplexity", "perplexity_95", "perplexity_decode", "kl", "kl_95", "kl_decode", "kl_decode_95",
    "top1_agreement",
    "layer_error", "layer_cosine", "exact_match", "recall_kept",
    "questions", "questions_right", "questions_of", "questions_kept",
    "behaviour", "behaviour_ceiling", "behaviour_same", "behaviour_kept",
    "bytes_per_token", "bytes_planned", "bytes_held", "bytes_predicted", "bytes_full",
    "prefill_ms", "step_ms",
]
# fmt: on
# Fields of a row with the outcomes of single samples: sums by name, or one number for each sample.
SAMPLED_SUMS = ("per_window", "per_window_decode")
SAMPLED = ("per_case", "per_question", "per_conversation")
MOST_CELLS = 2**18  # layers x heads of one heat map: a file may say anything, and a map must be drawn

Row = dict[str, Any]


class Section(NamedTuple):
    """Rows that may be compared with one another: one model on one text.

    Args:
        model: name of the model.
        data: name of the text.
        rows: the rows, the full cache first, then by bytes per token.
        several: whether they come from more than one run.
    """

    model: str
    data: str
    rows: list[Row]
    several: bool


def load_results(paths: Sequence[Path]) -> list[dict]:
    """Read result files.

    Args:
        paths: result files, or folders of them.

    Raises:
        LowkeyError: no such file, a folder without files, or a damaged result.
    """
    return [_load(file) for file in result_files(paths)]


def result_files(paths: Sequence[Path]) -> list[Path]:
    """The result files at paths, in the order in which `load_results` reads them."""
    return [file for path in paths for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    """The result files at a path."""
    if not path.exists():
        raise LowkeyError(f"result {str(path)!r} does not exist; {GIVE_RESULTS}")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.glob("*.json") if not p.name.startswith("."))
    if not files:
        raise LowkeyError(f"result folder {str(path)!r} holds no .json file; {GIVE_RESULTS}")
    return files


def _load(path: Path) -> dict:
    """Read and check one result."""
    result = read_json(path, "result", RESULT_FILE, loose=True)
    complaint = _complaint(result)
    if complaint:
        raise LowkeyError(f"result {str(path)!r}: {complaint}; {GIVE_RESULTS}")
    return _writable(result)


def _writable(result: dict) -> dict:
    """The result with `?` for each half of a surrogate pair: a JSON string may hold one, but no figure and no
    file can.
    """
    return json.loads(json.dumps(result, ensure_ascii=False).encode(errors="replace"))


def _complaint(result: dict) -> str | None:
    """The first rule that a result breaks, or None."""
    if result.get("format") != RESULTS_FORMAT:
        return f"format is {result.get('format')!r:.40} and this version reads format {RESULTS_FORMAT}"
    if not isinstance(result.get("model"), str):
        return "model must be a string"
    if not isinstance(result.get("environment"), dict):
        return "environment must be an object"
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows:
        return "rows must be a list of at least one row"
    complaints = (_row_complaint(row) for row in rows)
    return next((f"rows[{i}] {text}" for i, text in enumerate(complaints) if text), None)


def _row_complaint(row: object) -> str | None:
    """The first rule that a row breaks, or None."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return "must be an object with a name"
    wrong = [key for key in NUMBER_FIELDS if not _is_number(row.get(key))]
    if wrong:
        return f"{wrong[0]} must be a number or null"
    if not heads_fit(row.get("kept_per_head")):
        return "kept_per_head must be null or a list of lists of numbers or nulls, one list for each layer"
    if (complaint := _samples_complaint(row)) is not None:
        return complaint
    if not harness_fits(row.get("harness")):
        return "harness must be null or hold the metrics of tasks, each with a number"
    profile = row.get("profile")
    return (
        None
        if profile is None or _profile_fits(profile)
        else "profile has parts whose lengths do not fit its layers and ranks"
    )


def _samples_complaint(row: Row) -> str | None:
    """The first rule that the outcomes of single samples break, or None."""
    for name in SAMPLED_SUMS:
        sums = row.get(name)
        lists = list(sums.values()) if isinstance(sums, dict) else None
        if sums is not None and not (lists and _are_numbers(*lists) and len({len(x) for x in lists}) == 1):
            return f"{name} must be null, or lists of numbers or nulls, all of one length"
    for name in SAMPLED:
        if row.get(name) is not None and not _are_numbers(row[name]):
            return f"{name} must be null or a list of numbers or nulls"
    return None


def _are_numbers(*lists: object) -> bool:
    """Whether all are lists of numbers and nulls."""
    return all(isinstance(x, list) and all(map(_is_number, x)) for x in lists)


def _is_number(value: object) -> bool:
    """Whether a value is a number or null.

    Infinite numbers count, as Python's JSON holds them; finite numbers that are too large to draw do not.
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return abs(value) < 1e100 or (isinstance(value, float) and not math.isfinite(value))


def heads_fit(value: object) -> bool:
    """Whether a value is null, or a list of numbers and nulls per layer that is small enough to draw."""
    if value is None or not isinstance(value, list) or not all(isinstance(layer, list) for layer in value):
        return value is None
    cells = len(value) * max(map(len, value), default=0)
    return cells <= MOST_CELLS and all(_is_number(count) for layer in value for count in layer)


def _profile_fits(profile: object) -> bool:
    """Whether a profile's parts fit its layers and ranks."""
    try:
        _check_profile(profile)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
        return False
    return True


def _check_profile(profile: Any) -> None:
    """Check that a profile's parts fit its layers and ranks.

    Raises:
        ValueError: a part has a wrong shape; or another error of that kind.
    """
    layers, ranks = len(profile["layers"]), len(profile.get("ranks") or [])
    _check_shape(profile["layers"], (layers,))
    _check_shape(profile.get("ranks"), (ranks,))
    if None in profile["layers"] or sorted(profile.get("ranks") or []) != (profile.get("ranks") or []):
        raise ValueError("ranks")
    _check_shape(profile.get("surface"), (layers, ranks, ranks))
    _check_shape(profile.get("chosen"), (layers, 2))
    spectra = profile.get("spectra") or {"keys": [], "values": []}
    for energies in (*spectra["keys"], *spectra["values"]):
        _check_shape(energies, (len(energies),))
    if any(len(spectra[side]) not in (0, layers) for side in ("keys", "values")):
        raise ValueError("spectra")


def _check_shape(value: Any, shape: tuple[int, ...]) -> None:
    """Check that a value is null, or numbers and nulls of this shape.

    Raises:
        ValueError: it is not.
    """
    array = np.array(value, dtype=object)
    if value is not None and not (array.shape == shape and all(map(_is_number, array.flat))):
        raise ValueError(shape)


def measured(row: Row, key: str) -> float | None:
    """A number of a row.

    Returns:
        The number under `key`; None if nothing finite was measured; 0 for one so small that quotients by it
        would overflow.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def is_full(row: Row) -> bool:
    """Whether a row is of the full cache."""
    return row.get("name") == "full"


def full_row(rows: Sequence[Row]) -> Row | None:
    """The row of the full cache, or None."""
    return next((row for row in rows if is_full(row)), None)


def kept(row: Row) -> float | None:
    """The share of the full cache's bytes that a row holds, or None."""
    held, full = measured(row, "bytes_held"), measured(row, "bytes_full")
    return held / full if held is not None and full else None


def sections(results: Sequence[dict]) -> list[Section]:
    """Group results by model and text. Perplexities on different texts never share a table."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, result in enumerate(results):
        groups.setdefault((str(result["model"]), str(data_of(result).get("sha256"))), []).append(number)
    return [section_of(results, numbers) for numbers in groups.values()]


def section_of(results: Sequence[dict], numbers: list[int]) -> Section:
    """The section of results of one model on one text.

    Args:
        results: all results.
        numbers: which of them belong to the section.
    """
    first, several = results[numbers[0]], len(numbers) > 1
    rows = _labelled([{**row, "run": n + 1} for n in numbers for row in results[n]["rows"]])
    order = sorted(rows, key=lambda row: (not is_full(row), _bytes_or_last(row)))
    return Section(str(first["model"]), str(data_of(first).get("name") or "unnamed text"), order, several)


def _labelled(rows: list[Row]) -> list[Row]:
    """Rows with a label each that distinguishes them, by their marks or else by their run."""
    if len({row["run"] for row in rows}) == 1:
        return [{**row, "label": row["name"]} for row in rows]
    labels = distinct_row_names(
        [str(row.get("short") or row["name"]) for row in rows], [marks_of(row) for row in rows]
    )
    count = Counter(labels)
    return [
        {**row, "label": f"{x} (run {row['run']})" if count[x] > 1 else x}
        for x, row in zip(labels, rows, strict=True)
    ]


def marks_of(row: Row) -> dict[str, str]:
    """A row's marks, as far as they are text; a file may hold anything."""
    marks = row.get("marks")
    if not isinstance(marks, dict):
        return {}
    return {key: value for key, value in marks.items() if isinstance(value, str)}


def _bytes_or_last(row: Row) -> float:
    """Sorting key: bytes per token, infinite if unknown."""
    held = measured(row, "bytes_per_token")
    return math.inf if held is None else held


def data_of(result: dict) -> dict:
    """What a result says about its text."""
    data = result["environment"].get("data")
    return data if isinstance(data, dict) else {}
