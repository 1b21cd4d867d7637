"""Token cache: encode every image of a data set into tokens once, then read them from disk.

>>> from vfmtok_fast import cache
>>> summary = cache.build("photos", "tokens", tokenizer, views=("center", "center-flip"))
>>> tokens, label = cache.TokenCache("tokens", view="center")[0]

The subpackages form layers, each of which uses only those before it: `store` (disks and object
stores), `format` (the files of a cache), `sources` (where images come from), `make`, `read` and
`check`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .check.repair import repair
    from .check.status import Status, failures, status
    from .check.verify import Report, verify
    from .format.manifest import FingerprintMismatch, Manifest, read_manifest
    from .format.views import known_views
    from .make.build import Summary, build
    from .make.changes import ImagesChanged
    from .make.encode import TokenError
    from .make.job import Job, encode_shard, encode_shards, finish, pending
    from .make.on_ray import ActorsLost, build_on_ray
    from .make.prepare import prepare
    from .make.progress import Progress, TooManyBadImages
    from .make.spec import CacheSpec
    from .read.dataset import TokenCacheDataset
    from .read.export import export
    from .read.reader import TokenCache, read_tokens
    from .sources import open_source
    from .store import CacheWriteError

__all__ = [
    "ActorsLost",
    "CacheSpec",
    "CacheWriteError",
    "FingerprintMismatch",
    "ImagesChanged",
    "Job",
    "Manifest",
    "Progress",
    "Report",
    "Status",
    "Summary",
    "TokenCache",
    "TokenCacheDataset",
    "TokenError",
    "TooManyBadImages",
    "build",
    "build_on_ray",
    "encode_shard",
    "encode_shards",
    "export",
    "failures",
    "finish",
    "known_views",
    "open_source",
    "pending",
    "prepare",
    "read_manifest",
    "read_tokens",
    "repair",
    "status",
    "verify",
]

# Imported on first access, so that `vfmtok-fast status` does not import torch.
__getattr__, __dir__ = attach(
    __name__,
    {
        "check.repair": {"repair"},
        "check.status": {"Status", "failures", "status"},
        "check.verify": {"Report", "verify"},
        "format.manifest": {"FingerprintMismatch", "Manifest", "read_manifest"},
        "format.views": {"known_views"},
        "make.build": {"Summary", "build"},
        "make.changes": {"ImagesChanged"},
        "make.encode": {"TokenError"},
        "make.job": {"Job", "encode_shard", "encode_shards", "finish", "pending"},
        "make.on_ray": {"ActorsLost", "build_on_ray"},
        "make.prepare": {"prepare"},
        "make.progress": {"Progress", "TooManyBadImages"},
        "make.spec": {"CacheSpec"},
        "read.dataset": {"TokenCacheDataset"},
        "read.export": {"export"},
        "read.reader": {"TokenCache", "read_tokens"},
        "sources": {"open_source"},
        "store": {"CacheWriteError"},
    },
)
