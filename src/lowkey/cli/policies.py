"""`lowkey policies`: the eviction policies and their allocators."""

from __future__ import annotations

import json

from lowkey.cli.options import AsJson
from lowkey.core.options import ranges


def policies(as_json: AsJson = False) -> None:
    """List the eviction policies and their allocators.

    Each is listed with its paper, its options and their ranges.
    """
    from lowkey.calibration.calibrate import name_and_parameters
    from lowkey.catalog import make_policy
    from lowkey.cli.tables import Table, options_of, screen
    from lowkey.policies import POLICIES, policy_to_dict
    from lowkey.policies.allocators import TOKEN_ALLOCATORS

    known = {name: make_policy(name, "50%", {}) for name in POLICIES}
    if as_json:
        listed = {
            name: {
                "summary": p.summary,
                "paper": p.paper,
                **policy_to_dict(p),
                "ranges": ranges(type(p)),
            }
            for name, p in known.items()
        }
        rules = {
            name: {
                "summary": kind.summary,
                "options": name_and_parameters(kind())["parameters"],
                "ranges": ranges(kind),
            }
            for name, kind in TOKEN_ALLOCATORS.items()
        }
        print(json.dumps({"policies": listed, "allocators": rules}))
        return
    table = Table("policy", "keeps by", "split", "paper", "options and their ranges (-O name=value)")
    for name, policy in known.items():
        told = policy_to_dict(policy)
        own = options_of(type(policy), told["parameters"])
        table.add_row(name, policy.summary, told["allocator"]["name"], policy.paper, own)
    screen.print(table)
    table = Table("allocator", "what it does", "options and their ranges (-A name=value)")
    for name, kind in TOKEN_ALLOCATORS.items():
        table.add_row(name, kind.summary, options_of(kind, name_and_parameters(kind())["parameters"]))
    screen.print(table)
