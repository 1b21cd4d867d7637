"""Checkpoints of a run: files that are there whole or not at all, of which the last few stay."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..cache.store import LocalPlace
from ..errors import first_line, is_out_of_memory

_NAME = re.compile(r"step-(\d{8,})\.pt")


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 3) -> Path:
    """Write ``step-<step>.pt``, then remove all but the newest ``keep``.

    Args:
        folder: is made if it is missing.
        step: of the trainer.
        state: tensors, numbers, strings and containers of them.
        keep: at least 1.

    Raises:
        CacheWriteError: it could not be written; what was there is still there.
    """
    if keep < 1:
        raise ValueError(f"checkpoints: keep must be at least 1, got {keep}")
    place = LocalPlace(folder)
    place.make_folder()
    place.sweep()
    path = place / f"step-{step:08d}.pt"
    with path.writing() as file:
        target = _Target(file)
        try:
            torch.save(dict(state), target)
        except RuntimeError as error:  # torch's writer, which does not tell what was wrong
            if target.error is None:
                raise
            raise target.error from error
    for _, old in _found(folder)[:-keep]:
        LocalPlace(old).remove()
    return Path(path)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder; None where there is none."""
    found = _found(folder)
    return found[-1][1] if found else None


def load(path: Path) -> dict[str, Any]:
    """What `save` was given, on the CPU.

    Raises:
        ValueError: the file is damaged.
        OSError, RuntimeError: it is not there, or cannot be read now; memory does not suffice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError) as error:
        # A sound file, of which nobody should be told to remove it.
        if getattr(error, "errno", None) is not None or is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path}: a damaged checkpoint ({first_line(error)}); remove it to resume from the "
            "previous one"
        ) from error


class _Target:
    """A file for torch's writer, which remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths, in order."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
