"""Kernel settings as data: the allowed values, the defaults per chip, and tables of measurements.

A kernel's tile sizes, warps, stages and variants are declared once, as a `Space` next to it, with a
default per compute capability. At each launch ``space.at(device, kind, size)`` returns the setting
from the first of these sources that has one:

1. the user's table for this card, written by `vfmtok_fast.tune`;
2. the table for this card that ships in ``kernels/tuned/``;
3. the default for the highest compute capability that the chip supports.

A table also records the calls for which an op's reference was faster than its kernels; `enable`
then uses the reference for them. ``kind`` holds what must match exactly for a measurement to apply
("float32 d=12"). ``size`` is one number that need not match: the nearest measured size is used, by
its logarithm.

With a given table, the same call always takes the same settings, so its bits repeat. A `Space`
names the settings that change bits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .tables import Table, load_tables

# Set while `compiling.compile_only` compiles for a chip that need not be present.
_pretended: int | None = None


def pretending() -> bool:
    """Whether launches only compile; see `pretend`."""
    return _pretended is not None


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 90 for the interpreter."""
    if _pretended is not None:
        return _pretended
    return _capability(device.index) if device.type == "cuda" else 90


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextlib.contextmanager
def pretend(chip: int) -> Iterator[None]:
    """Use the default settings of compute capability ``chip`` for every launch, without tables."""
    global _pretended
    before, _pretended = _pretended, chip
    try:
        yield
    finally:
        _pretended = before


def tables(device: torch.device) -> tuple[Table, ...]:
    """The tables in use on ``device``, the user's first; `Table.problem` explains the others."""
    if device.type != "cuda" or _pretended is not None:
        return ()
    return tuple(t for t in _card_tables(device.index) if not t.problem)


@functools.cache
def _card_tables(index: int | None) -> tuple[Table, ...]:
    return load_tables(torch.cuda.get_device_name(index))


def describe(device: torch.device) -> list[str]:
    """Where the settings of ``device`` come from; also lists unused tables and the reason."""
    found = [str(table) for table in _card_tables(device.index)]
    if not tables(device):
        chip = capability(device)
        found.append(
            f"defaults of compute capability {chip // 10}.{chip % 10}, not measured on this card; "
            "`vfmtok-fast tune` measures"
        )
    return found


def forget_tables() -> None:
    """Discard cached lookups, so that the next launch reads the tables again."""
    _card_tables.cache_clear()
    _faster.cache_clear()
    _has_faster.cache_clear()
    for space in Space.made:
        space._found.clear()


def dtype_name(x: Tensor) -> str:
    """The dtype of ``x`` as written in tables: "float32"."""
    return str(x.dtype)[6:]


@dataclass(eq=False)
class Space:
    """The settings that can be chosen for one kernel.

    Args:
        name: ``"op.kernel"``.
        choices: the allowed values of each setting, ``{"rows": (64, 128), ...}``.
        defaults: a full setting for each compute capability from which it applies,
            ``{80: {...}, 90: {...}}``.
        bits: the settings that change bits of the result (within the op's tolerance).
        valid: whether a combination of values is allowed; every allowed one must compile and give
            correct results.
    """

    name: str
    choices: dict[str, tuple]
    defaults: dict[int, Any]
    bits: tuple[str, ...] = ()
    valid: Callable[[Any], bool] = lambda setting: True

    # Used only to clear cached lookups; the spaces of an op are in its module's SPACES.
    made: ClassVar[list[Space]] = []

    def __post_init__(self) -> None:
        self.Setting = namedtuple(self.name.replace(".", "_"), self.choices)
        self.defaults = {chip: self.setting(values) for chip, values in self.defaults.items()}
        assert set(self.bits) <= set(self.choices)
        assert all(map(self.valid, self.defaults.values()))
        self._found: dict[tuple, Any] = {}
        self._forced: Any = None
        Space.made.append(self)

    def setting(self, values: dict[str, Any]) -> Any:
        """``values`` as a named tuple; raises ValueError if they are not in this space."""
        good = set(values) == set(self.choices)
        # 8.0 equals 8, but is not a valid number of warps.
        known = {name: [(type(v), v) for v in choices] for name, choices in self.choices.items()}
        if not good or any((type(v), v) not in known[name] for name, v in values.items()):
            raise ValueError(f"{self.name}: {values} is not one of {self.choices}")
        setting = self.Setting(**values)
        if not self.valid(setting):
            raise ValueError(f"{self.name}: {values} cannot exist together")
        return setting

    def candidates(self) -> list[Any]:
        """All allowed settings."""
        every = itertools.starmap(self.Setting, itertools.product(*self.choices.values()))
        return [setting for setting in every if self.valid(setting)]

    def default(self, device: torch.device) -> Any:
        """The setting for ``device`` if nothing was measured."""
        chip = capability(device)
        known = [c for c in self.defaults if c <= chip]
        return self.defaults[max(known) if known else min(self.defaults)]

    def at(self, device: torch.device, kind: str, size: int) -> Any:
        """The setting of a launch on ``device``."""
        if self._forced is not None:
            return self._forced
        key = device, kind, size, _pretended
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._look_up(device, kind, size)
        return found

    def _look_up(self, device: torch.device, kind: str, size: int) -> Any:
        for table in tables(device):
            if (row := _nearest(table.settings.get((self.name, kind), ()), size)) is not None:
                with contextlib.suppress(ValueError):  # The table is older than the kernel.
                    return self.setting(row["take"])
        return self.default(device)

    @contextlib.contextmanager
    def using(self, setting: Any) -> Iterator[None]:
        """Make every launch use ``setting``; for `tune` and tests."""
        before, self._forced = self._forced, setting
        try:
            yield
        finally:
            self._forced = before


def _nearest(rows: Any, size: int) -> dict[str, Any] | None:
    """The row measured at the size nearest to ``size``, or None without rows."""
    return min(
        rows, key=lambda row: abs(math.log2(max(1, row["size"]) / max(1, size))), default=None
    )


def faster_reference(op: str, device: torch.device, kind: str, size: int) -> str | None:
    """Why the reference of ``op`` is the better choice, if a table says so, or None."""
    return _faster(op, device, kind, size, _pretended)


# What torch.compiler.assume_constant_result sets; needed because this function reads files.
faster_reference._dynamo_marked_constant = True


def has_faster_reference(op: str, device: torch.device) -> bool:
    """Whether a table of ``device`` has a call of ``op`` for which the reference was faster."""
    return _has_faster(op, device, _pretended)


has_faster_reference._dynamo_marked_constant = True


@functools.cache
def _has_faster(op: str, device: torch.device, chip: int | None) -> bool:
    return any(
        row["us"] > row["reference_us"]
        for table in tables(device)
        for (name, _), rows in table.ops.items()
        if name == op
        for row in rows
    )


@functools.cache
def _faster(op: str, device: torch.device, kind: str, size: int, chip: int | None) -> str | None:
    for table in tables(device):
        row = _nearest(table.ops.get((op, kind), ()), size)
        if row is None:
            continue
        if row["us"] <= row["reference_us"]:
            return None
        return (
            f"the reference is faster by {table.path.name}: {row['reference_us']:g} us against "
            f"{row['us']:g} us ({kind}, {row['size']})"
        )
    return None
