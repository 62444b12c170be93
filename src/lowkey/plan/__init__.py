"""The plan: what is stored of keys and values, as one folder that loads anywhere and refuses other models.

Imports `storage` (exact tokens, packings), `policies` and the packages below them; never a method.
"""

from lowkey.plan.plan import Plan

__all__ = ["Plan"]
