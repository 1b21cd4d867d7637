"""Write a cache in the formats of other programs; bad images are left out.

llamagen    OUT/imagenet256_codes/{i}.npy int64 [1, V, T], OUT/imagenet256_labels/{i}.npy [1]
rar         OUT, one line {"class_id": ..., "tokens": [...]} per view (1d-tokenizer's RAR)
parquet     OUT, one row per image and view: index, path, label, view, tokens uint16 [T]
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...temporary import temporary_name
from ..format import index, shards
from ..format.index import INDEX
from ..format.manifest import Manifest, read_manifest
from ..store import CacheWriteError, Place, place
from ..store.atomic import sync_folder

# Names that LlamaGen's loader looks for with its defaults (dataset imagenet, image size 256).
LLAMAGEN_CODES, LLAMAGEN_LABELS = "imagenet256_codes", "imagenet256_labels"

# One shard's tokens uint16 [n, V, T], labels int32 [n], indices int64 [n], paths [n] if wanted.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]


def export(
    out: str | os.PathLike, target: str | os.PathLike, format: str, *,
    views: Iterable[str] | None = None,
) -> int:  # fmt: skip
    """Write a complete cache in another program's format; the output is whole or does not exist.

    Args:
        out: the cache.
        target: what to write; must not exist.
        format: "llamagen" (a folder), "rar" or "parquet" (a file).
        views: names of the views to take, in this order; None: all.

    Returns:
        The number of images written.

    Raises:
        FileNotFoundError: there is no cache.
        FileExistsError: `target` exists already.
        ValueError: the cache is damaged or incomplete, has no such view, or the format is unknown.
        CacheWriteError: `target` cannot be written.
    """
    out, target = place(out), place(target)
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    found = read_manifest(out)
    places = found.places_of(views, out)
    if not (out / shards.COMPLETE).exists():
        raise ValueError(f"{out}: not complete; finish it with vfmtok-fast cache")
    if target.remote and format == "llamagen":
        raise ValueError(
            f"{target}: llamagen has two files per picture; write to a local folder, and pack it"
        )
    if target.exists() or (not target.remote and target.is_symlink()):  # even a dangling one
        raise FileExistsError(f"{target}: already exists; choose another name")
    target.parent.make_folder()
    names = [found.views[place] for place in places]
    # Only one format has the paths that are in the index.
    opened = index.opened(out / INDEX) if format == "parquet" else contextlib.nullcontext()
    with opened as listed:
        return FORMATS[format](target, _parts(out, found, places, listed), names)


def _parts(
    out: Place, found: Manifest, places: list[int], listed: index.OpenIndex | None
) -> Iterator[_Part]:
    """Yield the readable images of each shard, checked to the last byte."""
    for number in range(found.shards):
        path = shards.shard_path(out, number)
        try:
            header, shard = shards.read_shard(path)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; run vfmtok-fast repair") from error
        if wrong := shards.problems(header, shard, number, found):
            raise ValueError(f"{path}: {wrong[0]}; run vfmtok-fast repair")
        good = np.flatnonzero(shard.status == shards.OK)
        tokens = shard.tokens[good][:, places]
        paths = listed.table(number, ["path"])["path"].take(good).to_pylist() if listed else []
        yield tokens, shard.label[good], shard.index[good], paths


def _llamagen(target: Path, parts: Iterator[_Part], views: list[str]) -> int:
    temporary = temporary_name(target)
    count = 0
    try:
        codes, labels = temporary / LLAMAGEN_CODES, temporary / LLAMAGEN_LABELS
        for folder in (codes, labels):
            folder.mkdir(parents=True)
        for tokens, numbers, _, _ in parts:
            for row, label in zip(tokens, numbers, strict=True):
                np.save(codes / f"{count}.npy", row[None].astype(np.int64))
                np.save(labels / f"{count}.npy", np.array([label], np.int64))
                count += 1
        os.rename(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise CacheWriteError(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def _rar(target: Place, parts: Iterator[_Part], views: list[str]) -> int:
    count = 0
    with target.writing() as file:
        for tokens, labels, _, _ in parts:
            for row, label in zip(tokens, labels, strict=True):
                for view in row:
                    line = {"class_id": int(label), "tokens": view.tolist()}
                    file.write(json.dumps(line).encode() + b"\n")
                count += 1
    return count


def _parquet(target: Place, parts: Iterator[_Part], views: list[str]) -> int:
    count = 0
    with target.writing() as file, contextlib.ExitStack() as stack:
        writer = None
        for tokens, labels, indices, paths in parts:
            pictures, width, length = tokens.shape
            table = pa.table(
                {
                    "index": np.repeat(indices, width),
                    "path": pa.array([path for path in paths for _ in views], pa.string()),
                    "label": np.repeat(labels, width),
                    "view": pa.array(views * pictures, pa.string()),
                    "tokens": pa.FixedSizeListArray.from_arrays(
                        pa.array(tokens.reshape(-1), pa.uint16()), length
                    ),
                }
            )
            writer = writer or stack.enter_context(pq.ParquetWriter(file, table.schema))
            writer.write_table(table)
            count += pictures
    return count


FORMATS = {"llamagen": _llamagen, "rar": _rar, "parquet": _parquet}
