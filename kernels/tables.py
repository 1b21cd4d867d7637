"""Tables of measured settings, one JSON file per card: reading, checking, merging, writing.

    {"format": 1, "card": "NVIDIA H200", "made": "2026-11-26", "source": "...",
     "versions": {"triton": "3.6.0", "torch": "2.11.0", "vfmtok_fast": "0.1.0"},
     "settings": [{"space": "nearest_code.screen", "kind": "float32 d=12", "size": 65536,
                   "take": {"rows": 128, ...}, "us": 130.1, "default_us": 141.0}, ...],
     "ops": [{"op": "nearest_code", "kind": "float32 d=12", "size": 65536,
              "us": 372.8, "reference_us": 3599.9}, ...]}

The user's tables are in ``$XDG_CACHE_HOME/vfmtok_fast/tuned`` (``~/.cache`` if that is not set);
tables of measured cards ship in ``kernels/tuned``. A user's table is used only with the Triton
(major and minor version) and the vfmtok_fast version it was measured with. A shipped table is
always used, because it is part of the package. An unreadable file is skipped, and its
`Table.problem` says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

MOST = 2**63
SHIPPED = Path(__file__).resolve().parent / "tuned"
FORMAT = 1

# The keys that identify a row of a table, and the numbers that each row must have.
_KEYS = {"settings": ("space", "kind", "size"), "ops": ("op", "kind", "size")}
_NUMBERS = {"settings": ("us", "default_us"), "ops": ("us", "reference_us")}

Rows = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """One file: rows of ``settings`` keyed by (space, kind), rows of ``ops`` by (op, kind)."""

    path: Path
    settings: Rows = field(default_factory=dict, repr=False)
    ops: Rows = field(default_factory=dict, repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    made: str = ""
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.path}: not used, {self.problem}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        count = sum(len(rows) for rows in self.settings.values())
        return f"{self.path}: {count} settings measured on {self.made} with {versions}"


def slug(card: str) -> str:
    """File name for a card: ``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def user_folder() -> Path:
    """The folder that `tune` writes to; raises RuntimeError if the user has no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vfmtok_fast" / "tuned"


def versions() -> dict[str, str]:
    """The current versions, which a new table records."""
    # The package that contains these kernels; it is imported by now.
    package = sys.modules[__name__.partition(".")[0]]
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "vfmtok_fast": package.__version__,
    }


def load_tables(card: str) -> tuple[Table, ...]:
    """All tables for ``card``, the user's first, including those that are not used."""
    name, own = f"{slug(card)}.json", None
    with contextlib.suppress(RuntimeError):  # In a container a user may have no home directory.
        own = _load(user_folder() / name, own=True)
    found = (own, _load(SHIPPED / name, own=False))
    return tuple(table for table in found if table is not None)


def _load(path: Path, own: bool) -> Table | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return Table(path, problem=f"it cannot be read ({error}); `vfmtok-fast tune` makes it anew")
    if why := _defect(content):
        return Table(path, problem=f"it is damaged ({why}); `vfmtok-fast tune` makes it anew")
    made_with = content["versions"]
    return Table(
        path,
        _by_key(content["settings"], "space"),
        _by_key(content["ops"], "op"),
        made_with,
        content["made"],
        _mismatch(made_with) if own else "",
    )


def _mismatch(made_with: dict[str, str]) -> str:
    """Which recorded version of a user's table differs from the current one; empty if none."""
    now = versions()
    # Of Triton's version only the major and minor number count.
    for name, parts in (("triton", 2), ("vfmtok_fast", None)):
        other = made_with.get(name, "unknown")
        if other.split(".")[:parts] != now[name].split(".")[:parts]:
            return (
                f"it was measured with {name} {other}, this is {now[name]}; run `vfmtok-fast tune`"
            )
    return ""


def _by_key(rows: list[dict[str, Any]], name: str) -> Rows:
    grouped: Rows = {}
    for row in rows:
        grouped.setdefault((row[name], row["kind"]), []).append(row)
    return grouped


def _defect(content: Any) -> str:
    """What is wrong with a table's content; empty if nothing."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"not a table of format {FORMAT}"
    found = content.get("versions")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        return "its versions are no names and numbers"
    if not isinstance(content.get("made"), str):
        return "no date"
    for part, keys in _KEYS.items():
        if not isinstance(rows := content.get(part), list):
            return f"no list {part!r}"
        for row in rows:
            good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys[:2])
            good = good and type(row.get("size")) is int and 0 < row["size"] < MOST
            good = good and all(_is_time(row.get(name)) for name in _NUMBERS[part])
            if not good or (part == "settings" and not isinstance(row.get("take"), dict)):
                return f"a row of {part!r} is {row!r:.80}"
    return ""


def _is_time(value: Any) -> bool:
    # An integer may be too large for a float.
    return type(value) in (int, float) and 0 < value < MOST


def empty(card: str, made: str, source: str) -> dict[str, Any]:
    """Content of a table without rows."""
    head = {"format": FORMAT, "card": card, "made": made, "source": source}
    return {**head, "versions": versions(), "settings": [], "ops": []}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``, merged with the existing rows if those have the same versions.

    Rows of ``content`` replace existing rows with the same keys. A concurrent writer waits, so both
    sets of rows end up in the file. A reader sees either the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        before = _readable(path)
        if before is not None and before["versions"] == content["versions"]:
            content = {**content, **{p: _merged(before[p], content[p], p) for p in _KEYS}}
        # In the same folder, so that the rename is atomic.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def _readable(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return None if _defect(content) else content


def _merged(old: list[dict], new: list[dict], part: str) -> list[dict]:
    rows = {tuple(row[key] for key in _KEYS[part]): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows)]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
