"""The planner: the plan that loses least within a budget of memory, over rank, bits and tokens together.

It measures a small grid of combinations on calibration text, predicts the others, and checks its choice on
held-out text. Imports `evaluate` and everything below it.
"""

from lowkey.planner.plan_for import plan_for

__all__ = ["plan_for"]
