"""The choice of `lowkey plan` beside every choice on a single axis, over draws of the calibration text.

    python benchmarks/planner.py smollm2 docs/results/smollm2/plan.json --draw 0 --draw 1 --draw 2

Each draw and budget is one run of the command, in a folder of its own under OUT's work folder. A run that is
done is not repeated, and one that was interrupted goes on. OUT holds every row that was compared on held-out
text: what is kept on each axis, the bytes, KL with its 95 % interval, and recall.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowkey.core import files

COLUMNS = ("rank", "bits", "tokens", "axes", "bytes_per_token", "kl", "recall")


def search(model: str, draw: int, keep: str, work: Path) -> dict:
    """What one run of `lowkey plan` printed, and the rows of its result file; it is run only once."""
    out = work / f"{draw}-{keep.rstrip('%')}"
    printed = work / f"{out.name}.json"
    if not printed.exists():
        command = [sys.executable, "-c", "import sys; from lowkey_start import main; sys.exit(main())"]
        command += ["plan", model, str(out), "--keep", keep, "--seed", str(draw), "--json"]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        printed.write_text(told, encoding="utf-8")
    frontier = json.loads((work / f"{out.name}-frontier.json").read_text(encoding="utf-8"))
    return {**json.loads(printed.read_text(encoding="utf-8")), "rows": frontier["rows"]}


def rows_of(told: dict, draw: int, keep: str) -> list[dict]:
    """The rows of one run: the full cache, and all that was compared."""
    whole, *measured = told["rows"]
    rows = [
        {
            "axes": [],
            "kl": 0.0,
            "kl_95": 0.0,
            "recall": whole["exact_match"],
            "bytes_held": whole["bytes_held"],
        }
    ]
    for row in measured:
        (found,) = [x for x in told["frontier"] if x["kl"] == row["kl_decode"]]
        rows.append(
            {name: found[name] for name in COLUMNS}
            | {"kl_95": row["kl_decode_95"], "bytes_held": row["bytes_held"]}
            | {"chosen": found == told["choice"]}
        )
    return [
        {"draw": draw, "keep": keep, "bytes_full": whole["bytes_full"], "cases": told.get("cases", 16), **row}
        for row in rows
    ]


def main(
    model: str,
    out: Path,
    draw: Annotated[list[int], typer.Option(help="seed of the calibration windows; may be repeated")] = [0],  # noqa: B006
    keep: Annotated[list[str], typer.Option(help="budget; may be repeated")] = ["12.5%", "6.25%"],  # noqa: B006
) -> None:
    """Compare the planner's choice with every choice on a single axis."""
    work = out.with_name(f"{out.stem}-work")
    work.mkdir(parents=True, exist_ok=True)
    rows = [x for d in draw for k in keep for x in rows_of(search(model, d, k, work), d, k)]
    files.write_text(out, json.dumps({"model": model, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    typer.run(main)
