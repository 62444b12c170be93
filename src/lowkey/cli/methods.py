"""`lowkey methods`: the low-rank methods and the allocators of ranks."""

from __future__ import annotations

import json
from typing import Any

from lowkey.cli.options import AsJson
from lowkey.core.options import ranges


def methods(as_json: AsJson = False) -> None:
    """List the low-rank methods and the rank allocators.

    With the options of each, what they may be, and the paper. The method of `lowkey dynamic` comes last.
    """
    from lowkey.allocation.allocators import RANK_ALLOCATORS
    from lowkey.calibration.calibrate import name_and_parameters
    from lowkey.cli.tables import Table, options_of, screen
    from lowkey.methods import DYNAMIC_METHODS, METHODS

    def options(kind: Any) -> dict[str, Any]:
        return {"options": name_and_parameters(kind())["parameters"], "ranges": ranges(kind)}

    usual = {
        name: {"allocator": kind.allocator, "layout": kind.layout, "ranks": kind.grid}
        for name, kind in METHODS.items()
    }
    dynamic = {name: {"summary": kind.summary, "paper": kind.paper} for name, kind in DYNAMIC_METHODS.items()}
    if as_json:
        listed = {
            name: {"summary": kind.summary, "paper": kind.paper, **usual[name], **options(kind)}
            for name, kind in METHODS.items()
        }
        rules = {
            name: {"summary": rule().summary, "bounds": rule().bounds, **options(rule)}
            for name, rule in RANK_ALLOCATORS.items()
        }
        print(json.dumps({"methods": listed, "allocators": rules, "dynamic": dynamic}))
        return
    table = Table(
        "method",
        "what it does",
        "paper",
        "allocator, layout, ranks",
        "options and their ranges (-O name=value)",
    )
    for name, kind in METHODS.items():
        own = options_of(kind, options(kind)["options"])
        table.add_row(name, kind.summary, kind.paper, ", ".join(usual[name].values()), own)
    screen.print(table)
    table = Table(
        "allocator", "what it does", "what --error-budget bounds", "options and their ranges (-A name=value)"
    )
    for name, rule in RANK_ALLOCATORS.items():
        table.add_row(name, rule().summary, rule().bounds, options_of(rule, options(rule)["options"]))
    screen.print(table)
    for name, about in dynamic.items():
        print(
            f"{name} ({about['paper']}): {about['summary']}; made by lowkey dynamic, whose --help lists "
            "its options"
        )
