"""Checks of model configurations: a one-line error for a field that is unknown or wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypeVar

Config = TypeVar("Config")


def config_from_mapping(kind: type[Config], values: Mapping) -> Config:
    """Build a config dataclass from a mapping of its fields.

    Raises:
        ValueError: fields that the dataclass does not have; all are named.
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(str(name) for name in values if name not in known):
        raise ValueError(
            f"{kind.__name__}: unknown field {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}"
        )
    return kind(**values)


def check_positive(config: object, names: Iterable[str]) -> None:
    """Require that the named fields of a config are integers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{type(config).__name__}: {name} must be an integer of at least 1, got {value!r}"
            )


def check_numbers(config: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Require that the named fields of a config are numbers in [low, high), as in ``limits``."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < high:
            raise ValueError(
                f"{type(config).__name__}: {name} must be a number in [{low}, {high}), "
                f"got {value!r}"
            )
