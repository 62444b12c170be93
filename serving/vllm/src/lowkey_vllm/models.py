"""vLLM's own model classes, whose attention layers store what a plan says; made when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

from lowkey.models.families import NOT_SERVED, SERVED

_made: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """The class that serves an architecture of SERVED, or refuses a plan for one of NOT_SERVED."""
    known = {architecture: family for family, architecture in (SERVED | NOT_SERVED).items()}
    if name not in known:
        raise AttributeError(name)
    if name not in _made:
        family = known[name]
        base = getattr(importlib.import_module(f"vllm.model_executor.models.{family}"), name)
        _made[name] = _served(base)
    return _made[name]


def _served(base: type) -> type:
    """A subclass of one of vLLM's model classes that gives its attention layers what a plan says."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)  # type: ignore[misc]
        from lowkey_vllm.equip import equip

        equip(self, vllm_config)

    fields = {"__init__": __init__, "__module__": __name__, "__qualname__": base.__name__}
    return type(base.__name__, (base,), fields)
