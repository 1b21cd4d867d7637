"""The token cache: every picture of a data set as tokens on disk, made once, read for ever.

>>> from vfmtok_fast import cache
>>> summary = cache.build("photos", "tokens", tokenizer, views=("center", "center-flip"))
>>> tokens, label = cache.TokenCache("tokens", view="center")[0]

In rooms, each of which uses only those before it: `store` (disks and object stores), `format` (what
lies there), `sources` (where pictures come from), `make`, `read` and `check`.
"""

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
