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

    from lowkey.cli.tables import show_plan
    from lowkey.plan.plan import Plan

    show_plan(Plan.load(plan), plan, as_json)
