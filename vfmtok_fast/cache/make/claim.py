"""Whether a new cache may go into a folder: nothing of anybody else's is ever touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..format import index, manifest
from ..format.index import INDEX
from ..store import Place, atomic
from . import parts


def check_outside(root: Path, out: Place) -> None:
    """Refuse a cache inside of its own pictures, or in the place of a file."""
    if out.remote:
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: must be a folder, is a file; choose another name")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{out}: lies inside the pictures' folder {root}, where it would become a class; "
            "choose a folder outside"
        )


def is_free(out: Place) -> bool:
    """Whether a new cache may go here; False if another process has begun one just now.

    Raises:
        FileExistsError: it holds something else than what a run leaves that died before its
            manifest.
    """
    for name in sorted(out.names()):
        if _is_ours(out / name):
            continue
        if (out / manifest.NAME).exists():
            return False
        raise FileExistsError(
            f"{out}: holds something else ({name!r}) and is left alone; "
            "choose a new or empty folder"
        )
    return True


def _is_ours(path: Place) -> bool:
    if path.name == INDEX:
        return index.is_index(path) or _is_torn(path)
    if path.name not in ("shards", "quarantine", parts.FOLDER):
        return atomic.is_temporary(path.name)
    known = re.compile(r"\d{5}\.parquet" if path.name == parts.FOLDER else "(?!)")
    ours = all(atomic.is_temporary(one) or known.fullmatch(one) for one in path.names())
    return ours and not path.is_file()


def remove_torn_manifest(out: Place) -> None:
    """What a store may keep of a manifest whose writer died; nothing was made of it yet."""
    path = out / manifest.NAME
    if out.remote and path.exists() and not (out / "shards").names():
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.remove()


def _is_torn(path: Place) -> bool:
    """Whether a store kept the first part of an index whose writer died."""
    if not path.remote:
        return False
    data = path.read_bytes()
    return b"PAR1".startswith(data[:4]) and not data.endswith(b"PAR1")
