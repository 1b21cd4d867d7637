"""Put an extension in place: first its index, then its manifest, which makes it count."""

from __future__ import annotations

from ..format import index
from ..format.index import INDEX
from ..format.manifest import NAME, Manifest, read_manifest
from ..store import Place

NEXT_INDEX, NEXT_MANIFEST = "index-next.parquet", "manifest-next.json"


def install(out: Place) -> None:
    """Put the index and manifest of an extension in place, if one was interrupted at that point.

    Raises:
        ValueError: the new manifest is damaged or does not fit the index.
    """
    try:
        coming = read_manifest(out, NEXT_MANIFEST)
    except FileNotFoundError:
        return  # there is none, or another process was faster
    except ValueError:
        if not out.remote:
            raise
        (out / NEXT_MANIFEST).remove()  # torn: its extension is not in place yet
        return
    # If the index is in place already, another process may be writing the next one.
    if not is_index_of(coming, out / INDEX):
        if not is_index_of(coming, out / NEXT_INDEX):
            _give_up(out)
            return
        (out / INDEX).take_over(out / NEXT_INDEX)
    (out / NAME).take_over(out / NEXT_MANIFEST)


def read_newer(out: Place, found: Manifest) -> Manifest:
    """Return the manifest that another process has put in place since `found` was read.

    Raises:
        ValueError: there is none, so the index that does not fit `found` is damaged.
    """
    install(out)
    if (now := read_manifest(out)) == found:
        index.index_checksum(out / INDEX)  # Raises a clearer error if it cannot be read at all.
        raise ValueError(f"{out / INDEX}: damaged; restore it, or make a new cache")
    return now


def is_index_of(found: Manifest, path: Place) -> bool:
    """Return whether the complete index of a manifest is at `path`."""
    try:
        return index.index_checksum(path) == (found.images, found.index_sha256)
    except ValueError:
        return False


def _give_up(out: Place) -> None:
    """Drop an extension whose index was overwritten by that of another one, with other images."""
    if not is_index_of(read_manifest(out), out / INDEX):
        raise ValueError(
            f"{out / NEXT_MANIFEST}: does not match the index; cache into a new folder"
        )
    (out / NEXT_MANIFEST).remove()
