"""Checkpoints of a run, each written atomically; only the newest few are kept."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..cache.store import LocalPlace
from ..errors import first_line, is_out_of_memory

_NAME = re.compile(r"step-(\d{8,})\.pt")


def save(folder: str | os.PathLike, step: int, state: Mapping[str, Any], keep: int = 3) -> Path:
    """Write ``step-<step>.pt``, then remove all but the newest ``keep``.

    Args:
        folder: created if it is missing.
        step: number of steps that the trainer has done.
        state: tensors, numbers, strings and containers of them.
        keep: how many checkpoints to keep, at least 1.

    Raises:
        CacheWriteError: the checkpoint could not be written; earlier checkpoints are still there.
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
        except RuntimeError as error:  # torch's writer does not say what went wrong
            if target.error is None:
                raise
            raise target.error from error
    for _, old in _found(folder)[:-keep]:
        LocalPlace(old).remove()
    return Path(path)


def latest(folder: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint of a folder, or None if there is none."""
    found = _found(folder)
    return found[-1][1] if found else None


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Return the state that `save` was given, with all tensors on the CPU.

    Raises:
        ValueError: the file is damaged.
        OSError, RuntimeError: the file is missing or cannot be read now, or memory runs out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError) as error:
        # The file itself is sound, so the error must not advise removing it.
        if getattr(error, "errno", None) is not None or is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path}: a damaged checkpoint ({first_line(error)}); remove it to resume from the "
            "previous one"
        ) from error


class _Target:
    """Wrap a file for torch's writer and remember why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def _found(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """Return (step, path) of each checkpoint, in order of steps."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
