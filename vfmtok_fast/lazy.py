"""Lazy imports: names of a package that are imported on first access."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping


def attach(
    package: str, homes: Mapping[str, Collection[str]], modules: Collection[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its ``__name__``.
        homes: for each module in the package, the names that the package exports from it.
        modules: modules that the package exports themselves.
    """
    names = {name: home for home, found in homes.items() for name in found}

    def get(name: str) -> object:
        if name in modules:
            return importlib.import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{names[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *names, *modules})
