"""`lowkey report`: one HTML page from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.console import note
from lowkey.cli.options import OUTPUT, AsJson


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS", help="result files, or folders of them", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="the HTML file to write", rich_help_panel=OUTPUT),
    ] = Path("report.html"),
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="compare settings sample by sample: frontier, differences with intervals, wins and losses",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page from result files.

    The page is a single file without external parts, so that it can be sent to others. With --compare, it
    also links to the result files.
    """
    from lowkey.report import write_comparison, write_report

    place = (write_comparison if compare else write_report)(results, out)
    if as_json:
        print(json.dumps({"report": str(place)}))
    else:
        note(f"report written to {place}")
