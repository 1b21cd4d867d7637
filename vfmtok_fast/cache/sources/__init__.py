"""Inputs: where the pictures of a token cache come from, one kind to a module.

Nothing is ever extracted: pictures are read in place, by path, offset, row or key, so a name in an
archive never becomes a name on disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from .base import BadImage, Entry, Source
from .folder import FolderSource
from .lmdb import LmdbSource
from .parquet import ParquetSource
from .tar import TarSource
from .webdataset import WebDatasetSource, is_webdataset

KINDS = ("folder", "tar", "webdataset", "parquet", "lmdb")

__all__ = ["KINDS", "BadImage", "Entry", "Source", "open_source"]


def open_source(images: str | os.PathLike, kind: str | None = None) -> Source:
    """Find out what an input is, by its name and what lies in it.

    A file: `.tar` is a tar of class tars or of class folders, or a WebDataset shard if it holds
    `.cls` members; `.parquet`; `.mdb`. A folder: an LMDB if it holds `data.mdb`; otherwise, unless
    it has folders in it, Parquet files or WebDataset shards if it holds any; otherwise class
    folders of pictures.

    Args:
        images: the input.
        kind: one of KINDS, where the rule above would guess wrong; None: by the rule.

    Returns:
        The input, its pictures not listed yet.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there, or is a file of another kind.
        ValueError: no such kind, or it is not of the kind that was said.
    """
    if "://" in str(images):
        raise ValueError(
            f"{images}: pictures are read from local files; mount this, or copy it (a cache itself "
            "may lie at a URL)"
        )
    root = Path(images)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of pictures or archive")
    if kind is None:
        kind = _kind_of_folder(root) if root.is_dir() else _kind_of_file(root)
    if kind not in KINDS:
        raise ValueError(f"input: must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "folder":
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: must be a folder of pictures, is a file")
        return FolderSource(root)
    if kind == "lmdb":
        return LmdbSource(root)
    if kind == "tar":
        if root.is_dir():
            raise ValueError(f"{root}: must be one tar file, is a folder; name the file in it")
        return TarSource(root)
    suffix = ".parquet" if kind == "parquet" else ".tar"
    names = _names(root, suffix) if root.is_dir() else [root.name]
    if not names:
        raise ValueError(f"{root}: no *{suffix} files in this folder")
    source = ParquetSource if kind == "parquet" else WebDatasetSource
    return source(root if root.is_dir() else root.parent, tuple(names))


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "webdataset" if is_webdataset(path) else "tar"
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".mdb", ".lmdb"):
        return "lmdb"
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(
            f"{path}: a compressed tar cannot be read in place; decompress it to a plain .tar"
        )
    raise NotADirectoryError(
        f"{path}: must be a folder of pictures, or a .tar, .parquet or .mdb file, is another file"
    )


def _kind_of_folder(root: Path) -> str:
    if (root / "data.mdb").is_file():
        return "lmdb"
    # A folder with folders in it is class folders, whatever else lies there.
    if not any(entry.is_dir() for entry in root.iterdir() if not entry.name.startswith(".")):
        for suffix, kind in ((".parquet", "parquet"), (".tar", "webdataset")):
            if _names(root, suffix):
                return kind
    return "folder"


def _names(root: Path, suffix: str) -> list[str]:
    return sorted(
        path.name
        for path in root.iterdir()
        if path.suffix.lower() == suffix and path.is_file() and not path.name.startswith(".")
    )
