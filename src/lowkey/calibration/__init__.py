"""From a model and a text to a Plan: statistics, fitting, ranks; and what trains a model or its maps through
a compressed cache.

`calibrate` is the way in; `recover` trains a model through a plan, `dynamic` makes plans with a rank for
every token, `sinks` finds attention sinks. Imports `methods`, `allocation`, `probes`, `cache` and the rooms
below them.
"""
