"""The token cache: every picture of a data set as tokens on disk, made once, read for ever.

>>> from vfmtok_fast import cache
>>> summary = cache.build("photos", "tokens", tokenizer, views=("center", "center-flip"))
>>> tokens, label = cache.TokenCache("tokens", view="center")[0]

The format is that of DESIGN.md section 6.
"""

from .atomic import CacheWriteError
from .build import Progress, Summary, TooManyBadImages, build
from .encode import TokenError
from .index import ImagesChanged
from .job import Job, encode_shard, finish, pending, prepare
from .manifest import FingerprintMismatch, Manifest, read_manifest
from .reader import TokenCache, read_tokens
from .status import Status, status
from .verify import Report, verify
from .views import known_views

__all__ = [
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
    "TokenError",
    "TooManyBadImages",
    "build",
    "encode_shard",
    "finish",
    "known_views",
    "pending",
    "prepare",
    "read_manifest",
    "read_tokens",
    "status",
    "verify",
]
