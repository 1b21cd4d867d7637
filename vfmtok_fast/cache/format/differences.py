"""Describe how two sets of settings differ, for the error that refuses to mix them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name the differences of two settings: "key (there 1, here 2), ..."; empty if none."""
    there, here = _flat(there), _flat(here)
    parts = [
        f"{key} (there {_short(there.get(key))}, here {_short(here.get(key))})"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    return ", ".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return "+".join(map(str, value))
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text
