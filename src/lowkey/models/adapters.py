"""Adapters that peft puts around the modules of a model: their weights, and which of them are active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # the attribute in which torch.compile keeps what it wraps
INNER = ("base_layer", "original_module")  # the attributes in which peft's wrappers keep what they wrap


class Adapters:
    """Tells the weights of a model's adapters from those of the model itself.

    Attributes:
        wrappers: peft's modules around others, by path, the outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        candidates = (
            (path, m) for path, m in model.named_modules() if any(hasattr(m, name) for name in INNER)
        )
        self.wrappers: dict[str, Any] = {
            path: m for path, m in candidates if path and hasattr(m, "active_adapters")
        }

    @staticmethod
    def active(wrapper: Any) -> list[str]:
        """The names of the adapters that a wrapper adds; merged ones are in the weights already."""
        off = wrapper.disable_adapters or getattr(wrapper, "merged_adapters", ())
        return [] if off else sorted(wrapper.active_adapters)

    def plain_name(self, name: str) -> str | None:
        """What a state-dict entry would be called without wrappers.

        Args:
            name: of the entry.

        Returns:
            The name; None for an adapter that is not active. Active adapters are called by number, so that
            the name that a user gave them does not count.
        """
        # the parts of the name that belong to wrappers are left out
        parts, inner = name.split("."), set()
        for path, wrapper in self.wrappers.items():
            if not name.startswith(f"{path}."):
                continue
            depth = path.count(".") + 1
            if parts[depth] in INNER or f"{path}.{parts[depth]}" in self.wrappers:
                inner.add(depth)
                continue
            return self._adapter_name(wrapper, path, ".".join(parts[depth:]))
        return ".".join(part for i, part in enumerate(parts) if i not in inner and part != COMPILED)

    def _adapter_name(self, wrapper: Any, path: str, rest: str) -> str | None:
        """As `plain_name`, for an entry `rest` of the wrapper at `path`."""
        active, kinds = self.active(wrapper), _adapter_attributes(wrapper)
        if not kinds:  # not one of peft's own wrappers: everything counts
            return f"{path}: {rest}" if active else None
        # an entry is called "lora_A.NAME.weight": its kind, the adapter's name, and the rest
        for i, adapter in enumerate(active):
            for kind in kinds:
                if f"{rest}.".startswith(f"{kind}.{adapter}."):
                    return f"{path}: {kind} {i}{rest.removeprefix(f'{kind}.{adapter}')}"
        return None

    def settings(self) -> Iterator[tuple]:
        """What active adapters are made of beside weights: scaling, rank, variants."""
        for path, wrapper in self.wrappers.items():
            active = self.active(wrapper)
            if not _adapter_attributes(wrapper) and active:
                yield (path, active)
            for i, adapter in enumerate(active):
                for kind in _adapter_attributes(wrapper):
                    known = _dotted_attribute(wrapper, kind)
                    value = known[adapter] if hasattr(known, "keys") and adapter in known else None
                    if isinstance(value, bool | int | float | str | list | tuple):
                        yield (path, kind, i, str(value))


def _adapter_attributes(wrapper: Any) -> tuple[str, ...]:
    """The attributes in which a wrapper keeps something for each adapter."""
    return (*getattr(wrapper, "adapter_layer_names", ()), *getattr(wrapper, "other_param_names", ()))


def _dotted_attribute(module: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module
