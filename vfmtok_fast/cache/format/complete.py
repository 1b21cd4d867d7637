"""`COMPLETE.json`, which is written last and says that every shard is there."""

from __future__ import annotations

import hashlib

from ..store import Place
from .manifest import Manifest
from .shards import read_header, shard_path

COMPLETE = "COMPLETE.json"


def completion(out: Place, found: Manifest) -> dict[str, str | int]:
    """What it must say, from the headers of all shards; raises like `read_header`."""
    digest, bad = hashlib.sha256(), 0
    for header in out.spread(read_header, (shard_path(out, n) for n in range(found.shards))):
        digest.update(header.digest().encode())
        bad += header.bad
    return {
        "fingerprint": found.fingerprint,
        "images": found.images,
        "bad": bad,
        "shards": found.shards,
        "headers_sha256": digest.hexdigest(),
    }
