"""Names of a package that are imported when they are first used (PEP 562).

The command line answers help and errors about arguments without torch. A package whose `__init__` offers
names from modules that need torch therefore imports those late.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package.

    Args:
        package: its name.
        modules: for each public name, the module that defines it. A name that is itself a module of the
            package stands for that module.

    Returns:
        A function that imports a public name and keeps it in the package. It raises AttributeError for every
        other name.
    """

    def getter(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name])
        value = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next use finds it without this function
        return value

    return getter
