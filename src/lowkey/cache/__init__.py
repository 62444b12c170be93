"""The cache that a user passes to `model.generate(past_key_values=...)`, its filling and its files.

Imports `plan`, `storage`, `policies` and the rooms below them.
"""

from lowkey.cache.cache import LowkeyCache, load_cache, make_cache

__all__ = ["LowkeyCache", "load_cache", "make_cache"]
