"""From an input and an empty folder to a job: make index and manifest, or check that they fit.

Any number of processes may do this at once. All write the same bytes, and the manifest, written
last, makes the folder a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...images import HEIF_SUFFIXES, decode_image, heif_version
from ...temporary import is_temporary
from ..format import index, manifest
from ..format.fingerprint import Tokenizer, check_tokenizer, describe, first_parameter
from ..format.index import INDEX, Entry
from ..sources import BadImage, Source
from ..sources.base import LeftOutWarning
from ..sources.folder import EXTENSIONS, check_utf8
from ..store import Place, place
from . import changes, extension, parts
from .ahead import hashed_entries
from .install import install, is_index_of, read_newer
from .job import Job
from .spec import CacheSpec

# Seconds without a sign of life from rank 0 after which another process indexes by itself.
INDEX_PATIENCE = 60.0

# Views per call of `encode`: 64 keep a GPU busy (measured on an H200). On a CPU, more than a few
# gain nothing, and a cache of six images would pay for the padding.
BATCH_SIZES = {"cuda": 64}
CPU_BATCH_SIZE = 4
# A few decoding threads saturate one encoder; more only take memory.
MAX_DEFAULT_WORKERS = 8


def prepare(
    images: str | os.PathLike, out: str | os.PathLike, tokenizer: Tokenizer,
    spec: CacheSpec | None = None, *, rank: int = 0, device: str | None = None, **settings: Any,
) -> Job:  # fmt: skip
    """Index the images and write the manifest, or check that those of an earlier run still fit.

    Args, Raises: as `vfmtok_fast.cache.build`; a rank above 0 leaves the indexing to rank 0 as
    long as that shows signs of life; ``device`` is the type of device that will encode, if it is
    not the tokenizer's current one.

    Returns:
        What `encode_shard` needs.
    """
    check_tokenizer(tokenizer)
    spec, out = CacheSpec.of(spec, settings), place(out)
    source = spec.open(images)
    _check_outside(Path(os.path.expanduser(images)), out)
    waited = rank > 0 and not (out / manifest.NAME).exists()
    if waited:
        _await(out, (out / manifest.NAME).exists)
    install(out)
    _remove_torn_manifest(out)
    workers = spec.workers or min(_cpus(), MAX_DEFAULT_WORKERS)
    resumed = (out / manifest.NAME).exists() or not _is_free(out)
    if not resumed:
        _check_any_readable(source)
        kind = device or first_parameter(tokenizer).device.type
        batch_size = spec.batch_size or BATCH_SIZES.get(kind, CPU_BATCH_SIZE)
        covers = describe(tokenizer, spec.views, batch_size, spec.seed)
        _make_folders(out)
        found = _index(source, out, covers, spec, workers)
    else:
        found = None
        # Repeat until the manifest stays the same: hashing the weights takes seconds.
        while (now := manifest.read_manifest(out)) != found:
            found = now
            batch_size = spec.batch_size or found.batch_size
            covers = describe(tokenizer, spec.views, batch_size, spec.seed, found.heif)
        found = _resume(source, out, found, covers, spec, workers, rank)
        if not (spec.extend or waited):  # Rank 0 has just listed the images.
            quarantined = changes.quarantined_in(out)
            changes.check_unchanged(source, out / INDEX, found.classes, quarantined)
        _make_folders(out)
    return Job(source, out, tokenizer, found, workers)


def _check_outside(root: Path, out: Place) -> None:
    """Refuse a cache inside its own images or in place of a file, and names that are not UTF-8."""
    if out.remote:
        return
    check_utf8(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: must be a folder, but is a file; choose another name")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{out}: is inside the pictures' folder {root}, where it would become a class; "
            "choose a folder outside"
        )


def _is_free(out: Place) -> bool:
    """Return whether a new cache may go here; False if another process has just started one.

    Raises:
        FileExistsError: the folder holds something other than what a run leaves that died before
            its manifest.
    """
    for name in sorted(out.names()):
        if _is_ours(out / name):
            continue
        if (out / manifest.NAME).exists():
            return False
        raise FileExistsError(
            f"{out}: holds something other than a cache ({name!r}); choose a new or empty folder"
        )
    return True


def _is_ours(path: Place) -> bool:
    if path.name == INDEX:
        return index.is_index(path) or _is_torn(path)
    if path.name not in ("shards", "quarantine", parts.FOLDER):
        return is_temporary(path.name)
    known = re.compile(r"\d{5}\.parquet" if path.name == parts.FOLDER else "(?!)")
    ours = all(is_temporary(one) or known.fullmatch(one) for one in path.names())
    return ours and (path.remote or not path.is_file())


def _remove_torn_manifest(out: Place) -> None:
    """Remove a torn manifest that a store kept when its writer died; nothing depends on it yet."""
    path = out / manifest.NAME
    if out.remote and path.exists() and not (out / "shards").names():
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.remove()


def _is_torn(path: Place) -> bool:
    """Return whether a store kept only the first part of an index because its writer died."""
    if not path.remote:
        return False
    data = path.read_bytes()
    return b"PAR1".startswith(data[:4]) and not data.endswith(b"PAR1")


def _index(
    source: Source, out: Place, covers: dict[str, Any], spec: CacheSpec, workers: int
) -> manifest.Manifest:
    """List the images, and write the manifest, which makes the folder a cache."""
    origin = index.Origin(source.kind, source.files(), chosen=source.chosen, hashed=spec.hashed)

    begun = changes.folder_classes(source)

    def entries(after: Entry | None) -> Iterable[Entry]:
        found = source.entries(after)
        if source.files() is None:
            found = changes.labelled(found, begun)
        return hashed_entries(source, found, workers) if spec.hashed else found

    count, checksum, highest = parts.write_in_parts(
        out / INDEX, entries, spec.shard_size, origin, source.root, begun
    )
    changes.check_classes(source, begun)
    if left_out := _left_out(source):
        warnings.warn(f"{source.root}: {left_out}", LeftOutWarning, stacklevel=4)
    if index.holds_suffix(out / INDEX, HEIF_SUFFIXES):
        covers = {**covers, "heif_decoder_version": heif_version()}
    classes = begun or source.classes(highest)
    found = manifest.Manifest(covers, spec.shard_size, count, classes, checksum)
    _publish(found, out)
    return found


def _resume(
    source: Source, out: Place, found: manifest.Manifest, covers: dict[str, Any], spec: CacheSpec,
    workers: int, rank: int,
) -> manifest.Manifest:  # fmt: skip
    """Check that a cache is the one asked for; with `extend` set, add images that came since."""
    asked = found
    if covers["batch_size"] != found.batch_size and not (out / "shards").names():
        # No shard depends on it yet, for example because the first run ran out of memory.
        asked = replace(found, covers={**found.covers, "batch_size": covers["batch_size"]})
    manifest.check_same(asked, covers, spec.shard_size, out)
    if asked != found:
        asked.write(out)
        found = asked
    if not is_index_of(found, out / INDEX):
        now = read_newer(out, found)
        return _resume(source, out, now, covers, spec, workers, rank)
    if spec.hashed and not index.read_origin(out / INDEX).hashed:
        raise ValueError(
            f"{out}: was indexed without hashes; run without --hash, or cache into a new folder"
        )
    if spec.extend:
        return _extend(source, out, found, workers, rank)
    return found


def _make_folders(out: Place) -> None:
    for folder in (out, out / "shards", out / "quarantine"):
        folder.make_folder()
        if not out.remote:
            folder.sweep()


def _cpus() -> int:
    # The affinity is what a container or a scheduler allows; macOS has none.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _publish(found: manifest.Manifest, out: Place) -> None:
    """Write the manifest, unless another process did so while this one was indexing."""
    if not (out / manifest.NAME).exists():
        found.write(out)
    elif manifest.read_manifest(out) != found:
        raise changes.ImagesChanged(
            f"{out}: another process started a cache of other pictures or with other settings here "
            "at the same time; remove the folder, and start all processes with the same arguments"
        )


def _extend(
    source: Source, out: Place, found: manifest.Manifest, workers: int, rank: int
) -> manifest.Manifest:
    if rank:  # Quarantined images count here: if they were repaired, rank 0 makes a new index.
        try:
            changes.check_unchanged(source, out / INDEX, found.classes)
            install(out)  # in case the index is the new one already, but not the manifest
            found = manifest.read_manifest(out)
            if not index.read_origin(out / INDEX).hashed:  # may differ although no size does
                return found
        except changes.ImagesChanged:
            _await(out, lambda: manifest.read_manifest(out) != found)
            found = manifest.read_manifest(out)
    return extension.extend(source, out, found, workers)


def _await(out: Place, done: Callable[[], bool]) -> None:
    """Wait for another process's index; not forever, because each process could make it itself."""
    last, seen = time.monotonic(), None
    while not done() and time.monotonic() - last < INDEX_PATIENCE:
        # In a store, a write in progress is not visible.
        local = not out.remote and out.is_dir()
        now = []
        for entry in os.scandir(out) if local else ():
            with contextlib.suppress(FileNotFoundError):  # it has just taken its final name
                now.append((entry.name, entry.stat().st_size))
        if local and now != seen:
            last, seen = time.monotonic(), now
        time.sleep(0.1 if local else 1)


def _left_out(source: Source, before: str = "") -> str:
    """Describe what the listing passed over; empty if nothing."""
    counts = [f"{count} {what}" for what, count in sorted(source.left_out.items())]
    return f"{before}left out: {', '.join(counts)}" if counts else ""


def _check_any_readable(source: Source) -> None:
    """Check that at least one image can be read, before anything is written."""
    count, first = 0, ""
    for entry in source.entries():
        count += 1
        try:
            decode_image(source.read(entry))
            return
        except (BadImage, ValueError) as error:
            first = first or f"{entry.path!r}: {error}"
    if count == 0:
        raise ValueError(
            f"{source.root}: no pictures here, read as {source.kind} "
            f"(looked for {', '.join(sorted(EXTENSIONS))}){_left_out(source, '; ')}"
        )
    raise ValueError(
        f"{source.root}: none of its {count} pictures can be read; the first is {first}"
    )
