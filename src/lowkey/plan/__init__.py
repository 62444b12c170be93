"""The Plan: what calibration decided, as one folder that reloads anywhere and refuses models that it was not
made for.

Imports `storage` (windows of exact tokens, packings) and the rooms below it; never a method or a policy.
"""

from lowkey.plan.plan import Plan

__all__ = ["Plan"]
