"""`lowkey inspect`: what a plan holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.checks import check_plan
from lowkey.cli.options import AsJson


def inspect(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan folder", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show what a plan holds."""
    check_plan(plan)

    from lowkey.cli.plans import load_plan

    load_plan(plan).show(as_json)
