"""From a model and a text to a plan, and what trains a model through its compressed cache.

`calibrate` is the way in. It resolves what it is asked for (`limits`, `request`, `recommended`), gathers
second moments (`statistics`), fits each layer (`methods`), measures errors, and lets an allocator choose
ranks, with signals from `sensitivity`; `layer_checkpoint` keeps unfinished layers. `recover` trains a model
through a plan (`trainable`, `held_out`), `dynamic` makes plans with a rank for every token, and `sinks` finds
attention sinks.

Imports `methods`, `allocation`, `probes`, `cache` and the rooms below them.
"""
