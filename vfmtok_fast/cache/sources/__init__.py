"""Inputs: where the images of a token cache come from, one module per kind.

Nothing is ever extracted: images are read in place, by path, offset, row or key, so a name in an
archive never becomes a name on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..format.index import Entry, read_origin
from ..store import Place
from . import parquet
from .base import BadImage, Source
from .choice import EVERYTHING, Choice, check_splits, is_split, named_split
from .columns import FIRST, find_columns
from .contents import COMPRESSED, archives_in, check_shards, kind_of_folder, suffixes_in
from .folder import FolderSource, check_utf8, class_folders, walk
from .lmdb import LmdbSource
from .parquet import ParquetSource
from .tar import TarSource
from .webdataset import WebDatasetSource

KINDS = ("folder", "tar", "webdataset", "parquet", "lmdb")

__all__ = ["KINDS", "BadImage", "Entry", "Source", "choices_of", "open_again", "open_source"]


def open_source(
    images: str | os.PathLike, kind: str | None = None, *, include: Iterable[str] = (),
    exclude: Iterable[str] = (), image_column: str | None = None, label_column: str | None = None,
) -> Source:  # fmt: skip
    """Open an input, whose kind follows from its name and contents.

    A file: `.tar` is a tar of class tars or of class folders, or a WebDataset shard if it holds
    `.cls` members; `.parquet`; `.mdb`. A folder: an LMDB if it holds `data.mdb`; Parquet files or
    WebDataset shards, at any depth, if it holds only those; class folders of images if it holds
    images. If more than one could be meant, the error asks the user to choose.

    Args:
        images: the input.
        kind: one of KINDS, if the rule above would guess wrong; None: by the rule.
        include: patterns of the files to take (see `choice`); none, or "*": all of them.
        exclude: patterns of the files to leave out.
        image_column, label_column: columns of Parquet files, if they are not clear; "none" for no
            labels.

    Returns:
        The input; its images are not listed yet.

    Raises:
        FileNotFoundError, NotADirectoryError: it does not exist, or is a file of another kind.
        ValueError: there is no such kind, or the input is not of the kind given; or more than one
            thing could be meant.
    """
    if not str(images):
        raise ValueError("an empty path: name the pictures, or . for the current folder")
    if "://" in str(images):
        raise ValueError(
            f"{images}: pictures are read from local files; mount this, or copy it (only the cache "
            "itself may be at a URL)"
        )
    root = Path(os.path.expanduser(images)).absolute()
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of pictures or archive")
    choice = Choice(include, exclude)
    said = kind is not None
    if kind is None:
        kind = kind_of_folder(root, choice) if root.is_dir() else _kind_of_file(root)
    if kind not in KINDS:
        raise ValueError(f"input: must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "parquet" and (image_column or label_column):
        raise ValueError(f"{root}: is {kind}; only Parquet has columns to choose")
    if kind == "folder":
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: must be a folder of pictures, but is a file")
        return _folder(root, choice)
    check_utf8(root)
    if kind == "lmdb":
        if choice.record():
            raise ValueError(f"{root}: an LMDB has no files to include or exclude")
        return LmdbSource(root)
    if kind == "tar":
        if root.is_dir():
            raise ValueError(f"{root}: must be one tar file, but is a folder; name the file in it")
        return TarSource(root, choice=choice)
    return _of_archives(root, kind, choice, said, (image_column, label_column))


def _of_archives(
    root: Path, kind: str, choice: Choice, said: bool, columns: tuple[str | None, str | None]
) -> Source:
    """Open WebDataset shards or Parquet files; ``said``: whether the user has named the kind."""
    names = _archives(root, ".parquet" if kind == "parquet" else ".tar", choice)
    folder = root if root.is_dir() else root.parent
    if kind == "webdataset" and root.is_dir() and not said:
        check_shards(root, names)
    check_splits(root, names, choice)
    if kind == "webdataset":
        return WebDatasetSource(folder, names, choice=choice)
    schemas = parquet.schemas(folder, names)
    found = find_columns(root, schemas, names, *columns)
    return ParquetSource(folder, names, found, choice=choice)


def open_again(images: str | os.PathLike, index: Place, kind: str | None = None) -> Source:
    """Open the input that a cache was made from; ``kind`` overrides the kind that was recorded."""
    found, choices = choices_of(index)
    return open_source(images, kind or found, **choices)


def choices_of(path: Place) -> tuple[str | None, dict[str, Any]]:
    """Return kind and other arguments with which `open_source` opens an index's input again."""
    try:
        origin = read_origin(path)
    except ValueError:  # damaged, which the check of the index reports
        return None, {}
    again = {"include": ("*",), "image_column": FIRST, "label_column": FIRST, **origin.chosen}
    return origin.kind, again


def _folder(root: Path, choice: Choice) -> FolderSource:
    """Open class folders, possibly inside the one split that was chosen."""
    split = choice.split_among(class_folders(root)) if choice.split else None
    folders = [split] if split else class_folders(root, choice)
    check_splits(root, folders, choice, whole=True)
    source = FolderSource(root, choice=choice)
    if len(folders) == 1 and is_split(folders[0]):
        (split,) = folders
        if "include" in choice.record():
            source = FolderSource(root / split, choice=choice.below(split))
        elif not choice.include and class_folders(root / split):
            raise ValueError(
                f"{root}: holds nothing but the folder {split}, which holds class folders; give "
                f"{root / split}, or take it as one class with --include '*'"
            )
    if choice.record() and next(walk(source.root, "", source.choice), None) is None:
        raise ValueError(f"{root}: {_nothing(choice)}")
    return source


def _archives(root: Path, suffix: str, choice: Choice) -> tuple[str, ...]:
    if root.is_dir():
        names = archives_in(root, suffix, choice)
        if not names and not archives_in(root, suffix, EVERYTHING):
            raise ValueError(f"{root}: no *{suffix} files in this folder")
    else:
        names = (root.name,) if choice.takes(root.name) else ()
    if choice.split:  # test-set/train-0.parquet belongs to train
        names = tuple(name for name in names if named_split(name) == choice.split)
    if not names:
        raise ValueError(f"{root}: {_nothing(choice)}")
    return names


def _nothing(choice: Choice) -> str:
    patterns = [f"include {one!r}" for one in choice.include]
    patterns += [f"exclude {one!r}" for one in choice.exclude]
    return f"nothing is left in it with {', '.join(patterns)}"


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "webdataset" if ".cls" in suffixes_in(path) else "tar"
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".mdb", ".lmdb"):
        return "lmdb"
    if path.name.lower().endswith(COMPRESSED):
        raise ValueError(
            f"{path}: a compressed tar cannot be read in place; decompress it to a plain .tar"
        )
    raise NotADirectoryError(
        f"{path}: must be a folder of pictures, or a .tar, .parquet or .mdb file; is another file"
    )
