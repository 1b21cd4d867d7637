"""The token cache: every picture of a data set as tokens on disk, made once, read for ever.

>>> from vfmtok_fast import cache
>>> summary = cache.build("photos", "tokens", tokenizer, views=("center", "center-flip"))
>>> tokens, label = cache.TokenCache("tokens", view="center")[0]

The format is that of DESIGN.md section 6.
"""

from .atomic import CacheWriteError
from .build import Summary, build
from .changes import ImagesChanged
from .dataset import TokenCacheDataset
from .encode import TokenError
from .export import export
from .job import Job, encode_shard, encode_shards, finish, pending
from .manifest import FingerprintMismatch, Manifest, read_manifest
from .on_ray import ActorsLost, build_on_ray
from .prepare import prepare
from .progress import Progress, TooManyBadImages
from .reader import TokenCache, read_tokens
from .repair import repair
from .status import Status, failures, status
from .verify import Report, verify
from .views import known_views

__all__ = [
    "ActorsLost",
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
    "pending",
    "prepare",
    "read_manifest",
    "read_tokens",
    "repair",
    "status",
    "verify",
]
