"""Adapters that peft puts around a model's modules: which weights are theirs, and which of them are active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # what torch.compile calls what it wraps
INNER = ("base_layer", "original_module")  # what a wrapper wraps


class Adapters:
    """Which of a model's weights are adapters (peft's), and which of these are active."""

    def __init__(self, model: nn.Module) -> None:
        found = ((path, m) for path, m in model.named_modules() if any(hasattr(m, name) for name in INNER))
        self.wrappers: dict[str, Any] = {
            path: m for path, m in found if path and hasattr(m, "active_adapters")
        }  # the outermost first

    @staticmethod
    def active(wrapper: Any) -> list[str]:
        """Those that the wrapper adds to what it wraps; merged ones are in the weights already."""
        off = wrapper.disable_adapters or getattr(wrapper, "merged_adapters", ())
        return [] if off else sorted(wrapper.active_adapters)

    def plain(self, name: str) -> str | None:
        """What a state-dict entry would be called without wrappers; None for an adapter that is not active.
        Active ones are called by number, so that the name that a user gave them does not count."""
        parts, inner = name.split("."), set()
        for path, wrapper in self.wrappers.items():
            if not name.startswith(f"{path}."):
                continue
            depth = path.count(".") + 1
            if parts[depth] in INNER or f"{path}.{parts[depth]}" in self.wrappers:
                inner.add(depth)
                continue
            return self._adapter(wrapper, path, ".".join(parts[depth:]))
        return ".".join(part for i, part in enumerate(parts) if i not in inner and part != COMPILED)

    def _adapter(self, wrapper: Any, path: str, rest: str) -> str | None:
        active, kinds = self.active(wrapper), _kinds(wrapper)
        if not kinds:  # not one of peft's own: everything counts
            return f"{path}: {rest}" if active else None
        for i, adapter in enumerate(active):
            for kind in kinds:
                if f"{rest}.".startswith(f"{kind}.{adapter}."):
                    return f"{path}: {kind} {i}{rest.removeprefix(f'{kind}.{adapter}')}"
        return None

    def words(self) -> Iterator[tuple]:
        """Numbers that are no weights: scaling, rank, variants."""
        for path, wrapper in self.wrappers.items():
            active = self.active(wrapper)
            if not _kinds(wrapper) and active:
                yield (path, active)
            for i, adapter in enumerate(active):
                for kind in _kinds(wrapper):
                    known = _attribute(wrapper, kind)
                    value = known[adapter] if hasattr(known, "keys") and adapter in known else None
                    if isinstance(value, bool | int | float | str | list | tuple):
                        yield (path, kind, i, str(value))


def _kinds(wrapper: Any) -> tuple[str, ...]:
    return (*getattr(wrapper, "adapter_layer_names", ()), *getattr(wrapper, "other_param_names", ()))


def _attribute(module: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module
