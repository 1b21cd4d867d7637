"""The manifest: what a cache is, and everything that its tokens depend on.

`manifest.json` is written before the first shard. Only extending the cache, or changing the batch
size before the first shard, replaces it. Its fingerprint is the hash of `covers`, the list of
everything that changes tokens. A run whose list differs is refused with the names of what differs,
so a folder never holds tokens of two tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..store import Place, place
from .differences import differences
from .views import parse_views

FORMAT = "vfmtok_fast token cache"
VERSION = 1
NAME = "manifest.json"
BAD_TOKEN = 0xFFFF


class FingerprintMismatch(FileExistsError):
    """The folder holds a cache made by another tokenizer or with other settings."""


def _covered(name: str, meaning: str, *default: Any) -> Any:
    """Make a property for an entry of `covers`; a missing one without a default is a KeyError."""

    def value(self: Manifest) -> Any:
        return self.covers.get(name, *default) if default else self.covers[name]

    return property(value, doc=meaning)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Args:
        covers: everything that changes tokens, as plain JSON values.
        shard_size: images per shard.
        images: number of images in the index.
        classes: the class folders; label i is classes[i].
        index_sha256: checksum of the index's content.
    """

    covers: dict[str, Any]
    shard_size: int
    images: int
    classes: list[str]
    index_sha256: str

    @property
    def fingerprint(self) -> str:
        """Hash of `covers`, in hexadecimal."""
        return hashlib.sha256(canonical(self.covers)).hexdigest()

    views = _covered("views", "Names of the V views, in the order in which shards hold them.")
    num_tokens = _covered("num_tokens", "T, tokens per view.")
    codebook_size = _covered("codebook_size", "Tokens are below this.")
    image_size = _covered("image_size", "Side of the square that is encoded, in pixels.")
    batch_size = _covered(
        "batch_size", "Views per call of `encode`; the last batch of a shard is padded to it."
    )
    seed = _covered("seed", "Seed of the random crops; 0 where there are none.", 0)

    @property
    def heif(self) -> bool:
        """Whether any image is decoded by a package other than Pillow."""
        return "heif_decoder_version" in self.covers

    def places_of(self, views: Iterable[str] | None, out: object) -> list[int]:
        """Return positions of views in a shard (None: of all); ValueError if one is missing."""
        names = self.views if views is None else [str(view) for view in parse_views(views)]
        if lacking := [name for name in names if name not in self.views]:
            raise ValueError(f"{out}: has the views {', '.join(self.views)}, not {lacking[0]!r}")
        return [self.views.index(name) for name in names]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Return the global indices of the images in a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.images))

    def write(self, out: Place, name: str = NAME) -> None:
        """Write manifest.json into `out`, atomically; raises CacheWriteError."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "covers": self.covers,
            "views": self.views,
            "shard_size": self.shard_size,
            "counts": {"images": self.images, "shards": self.shards, "classes": len(self.classes)},
            "classes": self.classes,
            "index_sha256": self.index_sha256,
        }
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (out / name).put(text.encode())


def read_manifest(out: str | os.PathLike | Place, name: str = NAME) -> Manifest:
    """Read and check a cache's manifest; `name` can name one that is not in place yet.

    Raises:
        FileNotFoundError: `out` is no token cache.
        ValueError: the manifest is damaged, of another version, or not ours.
    """
    path = place(out) / name
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{out}: no token cache here ({NAME} is missing); make one with vfmtok-fast cache"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or make a new cache") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a token cache")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {content.get('version')}, but this program reads {VERSION}"
        )
    try:
        manifest = Manifest(
            covers=content["covers"],
            shard_size=content["shard_size"],
            images=content["counts"]["images"],
            classes=content["classes"],
            index_sha256=content["index_sha256"],
        )
        said = content["fingerprint"], content["counts"]["shards"], content["views"]
        sound = (manifest.fingerprint, manifest.shards, manifest.views) == said
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: damaged (entry {error}); restore it, or make a new cache"
        ) from error
    if not sound:
        raise ValueError(
            f"{path}: damaged (the fingerprint does not match what it covers); "
            "restore it, or make a new cache"
        )
    return manifest


def check_same(found: Manifest, covers: dict[str, Any], shard_size: int, out: Place) -> None:
    """Refuse to add tokens to a cache that was made with other settings.

    Raises:
        FingerprintMismatch: one line that names every differing key with both values.
    """
    differing = differences(
        {**found.covers, "shard_size": found.shard_size}, {**covers, "shard_size": shard_size}
    )
    if differing:
        raise FingerprintMismatch(
            f"{out}: holds a cache made with other settings: {differing}; "
            "use the same settings, or another folder"
        )


def canonical(values: Any) -> bytes:
    """Serialise as JSON; equal values give the same bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
