"""Print and write what the commands produce."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# File names may hold anything; they must not send control sequences to a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def say(text: object, *, flush: bool = False) -> None:
    """Print one line of result on stdout."""
    print(harmless(text), flush=flush)


def note(text: object) -> None:
    """Print one line about the run on stderr."""
    print(harmless(text), file=sys.stderr)


def harmless(text: object) -> str:
    """Return the text with control characters as \\xNN."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))


def make_streams_safe() -> None:
    """Keep names that a terminal cannot show, and closed streams, from ending a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def local_path(text: str) -> Path:
    """Return the file or folder that an option names.

    Raises:
        ValueError: it is a URL, which would create a folder "s3:".
    """
    if "://" in text:
        raise ValueError(f"{text}: give a local path; only a cache may lie at a URL")
    return Path(os.path.expanduser(text))


def check_writable(path: Path) -> None:
    """Require that a file can be created, before the work that produces its contents."""
    import tempfile

    from ..cache.store import CacheWriteError, LocalPlace

    folder = LocalPlace(path).parent
    folder.make_folder()
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise CacheWriteError(path, error) from error


def write_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Write an image, whole or not at all."""
    from PIL import Image

    from ..cache.store import LocalPlace

    path = LocalPlace(path)
    path.parent.make_folder()
    with path.writing() as file:
        Image.fromarray(picture).save(file, format="PNG")


def note_unlabelled(out: object) -> None:
    """Print how many images of a cache have no class."""
    from ..cache.format.index import INDEX, count_unlabelled

    if count := count_unlabelled(out / INDEX):
        note(f"note: {count} pictures lie in no class folder: their label is -1")
