"""The plan: what calibration decided, as one folder that loads anywhere and refuses other models.

Imports `storage` (exact tokens, packings) and the packages below it; never a method or a policy.
"""

from lowkey.plan.plan import Plan

__all__ = ["Plan"]
