"""From an input and an empty folder to a job: index, manifest, or the check that they still fit.

Any number of processes may do this at once. All write the same bytes, and the manifest, written
last, says that the folder is a cache from then on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from ..images import decode_image
from . import atomic, changes, index, manifest, parts
from .hashes import hashed_entries
from .job import INDEX, Job
from .sources import BadImage, Entry, Source, open_source
from .sources.base import LeftOutWarning
from .sources.folder import EXTENSIONS
from .store import Place, UrlPath, names, place
from .views import parse_views

# Seconds without a sign of life after which a process indexes although another one should.
INDEX_PATIENCE = 60.0

# Decoding saturates one encoder with a few threads; more only hold memory.
MAX_DEFAULT_WORKERS = 8


def prepare(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: manifest.Tokenizer,
    *,
    input_kind: str | None = None,
    views: Iterable[str] = ("center",),
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = 8192,
    workers: int | None = None,
    rank: int = 0,
    extend: bool = False,
    hashed: bool = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    image_column: str | None = None,
    label_column: str | None = None,
) -> Job:
    """Index the pictures and write the manifest, or check that those of an earlier run still fit.

    Args, Raises: as `vfmtok_fast.cache.build`; a rank above 0 leaves the indexing to rank 0 as
    long as that shows signs of life.

    Returns:
        What `encode_shard` needs.
    """
    out = place(out)
    declared = [str(view) for view in parse_views(views)]
    check_count("seed", seed, 0)
    check_count("batch_size", batch_size, 1)
    check_count("shard_size", shard_size, 1)
    if workers is None:
        workers = min(_cpus(), MAX_DEFAULT_WORKERS)
    check_count("workers", workers, 1)
    source = open_source(
        images,
        input_kind,
        include=include,
        exclude=exclude,
        image_column=image_column,
        label_column=label_column,
    )
    if not isinstance(out, UrlPath):
        _check_folders(Path(images), out)
    if rank:
        _await(out, (out / manifest.NAME).exists)
    changes.install(out)
    if isinstance(out, UrlPath):
        _remove_torn_manifest(out)
    resumed = (out / manifest.NAME).exists() or not _is_free(out)
    if resumed:
        found = manifest.read_manifest(out)
    else:
        _check_any_readable(source)
    covers = manifest.describe(tokenizer, declared, batch_size, seed)
    if resumed:
        manifest.check_same(found, covers, shard_size, out)
        if index.index_checksum(out / INDEX) != (found.images, found.index_sha256):
            raise ValueError(f"{out / INDEX}: damaged; restore it, or cache anew")
        if hashed and not index.read_hashed(out / INDEX):
            raise ValueError(
                f"{out}: was indexed without hashes; leave them out, or cache into a new folder"
            )
        if extend:
            found = _extend(source, out, found, workers, rank)
        else:
            changes.check_unchanged(source, out / INDEX, found.classes)
    for folder in (out, out / "shards", out / "quarantine"):
        atomic.make_folder(folder)
        atomic.sweep(folder)
    if not resumed:
        origin = index.Origin(source.kind, source.files(), chosen=source.chosen)

        def entries(after: Entry | None) -> Iterable[Entry]:
            found = source.entries(after)
            return hashed_entries(source, found, workers) if hashed else found

        count, checksum, highest = parts.write_in_parts(
            out / INDEX, entries, shard_size, origin, hashed, source.root
        )
        if left_out := _left_out(source):
            warnings.warn(f"{source.root}: {left_out}", LeftOutWarning, stacklevel=2)
        found = manifest.Manifest(covers, shard_size, count, source.classes(highest), checksum)
        _publish(found, out)
    return Job(source, out, tokenizer, found, workers)


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"cache: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"cache: {name} must be at least {least}, got {value}")


def _cpus() -> int:
    # macOS has no affinity; elsewhere it is what a container or a scheduler allows.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_folders(root: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: must be a folder, is a file; choose another name")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{out}: lies inside the pictures' folder {root}, where it would become a class; "
            "choose a folder outside"
        )


def _publish(found: manifest.Manifest, out: Place) -> None:
    """Write the manifest, unless another process did so while this one was indexing."""
    if not (out / manifest.NAME).exists():
        found.write(out)
    elif manifest.read_manifest(out) != found:
        raise changes.ImagesChanged(
            f"{out}: another process began a cache of other pictures or with other settings here "
            "at the same time; remove the folder, and start all processes alike"
        )


def _extend(
    source: Source, out: Place, found: manifest.Manifest, workers: int, rank: int
) -> manifest.Manifest:
    if rank:
        try:
            changes.check_unchanged(source, out / INDEX, found.classes)
            return found
        except changes.ImagesChanged:
            _await(out, lambda: manifest.read_manifest(out) != found)
            found = manifest.read_manifest(out)
    return changes.extend(source, out, found, workers)


def _await(out: Place, done: Callable[[], bool]) -> None:
    """Wait for another process's index; not for ever, as each could do it by itself."""
    last, seen = time.monotonic(), None
    while not done() and time.monotonic() - last < INDEX_PATIENCE:
        # Of a store, nothing is seen of what is on its way.
        local = not isinstance(out, UrlPath) and out.is_dir()
        now = []
        for entry in os.scandir(out) if local else ():
            with contextlib.suppress(FileNotFoundError):  # it has just taken its final name
                now.append((entry.name, entry.stat().st_size))
        if local and now != seen:
            last, seen = time.monotonic(), now
        time.sleep(0.1 if local else 1)


def _is_free(out: Place) -> bool:
    """Whether a new cache may go here; False if another process has begun one just now.

    Raises:
        FileExistsError: it holds something else than what a run leaves that died before its
            manifest.
    """
    try:
        _check_ours(out)
    except FileExistsError:
        if (out / manifest.NAME).exists():
            return False
        raise
    return True


def _check_ours(out: Place) -> None:
    for name in sorted(names(out)):
        ours = atomic.is_temporary(name)
        if name == INDEX:
            ours = index.is_index(out / name) or _is_torn(out / name)
        elif name in ("shards", "quarantine", parts.FOLDER):
            inside = names(out / name)
            known = re.compile(r"\d{5}\.parquet") if name == parts.FOLDER else re.compile("(?!)")
            ours = all(atomic.is_temporary(one) or known.fullmatch(one) for one in inside)
            ours = ours and (inside or not _is_file(out / name))
        if not ours:
            raise FileExistsError(
                f"{out}: holds something else ({name!r}) and is left alone; "
                "choose a new or empty folder"
            )


def _remove_torn_manifest(out: UrlPath) -> None:
    """What a store may keep of a manifest whose writer died; nothing was made of it yet."""
    path = out / manifest.NAME
    if path.exists() and not names(out / "shards"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            atomic.remove_file(path)


def _is_torn(path: Place) -> bool:
    """Whether a store kept the first part of an index whose writer died."""
    if not isinstance(path, UrlPath):
        return False
    data = path.read_bytes()
    return b"PAR1".startswith(data[:4]) and not data.endswith(b"PAR1")


def _is_file(path: Place) -> bool:
    return isinstance(path, Path) and path.is_file()


def _left_out(source: Source, before: str = "") -> str:
    """What the listing passed over, in words; empty if nothing."""
    counts = [f"{count} {what}" for what, count in sorted(source.left_out.items())]
    return f"{before}left out: {', '.join(counts)}" if counts else ""


def _check_any_readable(source: Source) -> None:
    """Before anything is written: is there one picture at all?"""
    count, first = 0, ""
    for entry in source.entries():
        count += 1
        try:
            data = source.read(entry)
        except BadImage as error:
            first = first or f"{entry.path!r}: {error}"
            continue
        try:
            decode_image(data)
            return
        except ValueError as error:
            first = first or f"{entry.path!r}: {error}"
    if count == 0:
        raise ValueError(
            f"{source.root}: no pictures here, read as {source.kind} "
            f"(looked for {', '.join(sorted(EXTENSIONS))}){_left_out(source, '; ')}"
        )
    raise ValueError(
        f"{source.root}: none of its {count} pictures can be read; the first is {first}"
    )
