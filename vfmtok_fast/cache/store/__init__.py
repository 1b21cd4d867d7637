"""Where a cache is stored: a local folder, or a URL of an object store that fsspec reaches.

A cache has the same files in both, and any tool may copy it from one to the other.
"""

from __future__ import annotations

import os
import re

from .errors import CacheWriteError, StoreError
from .local import LocalPlace
from .tensors import Tensors
from .url import UrlPlace, files_of

__all__ = ["CacheWriteError", "LocalPlace", "Place", "StoreError", "Tensors", "UrlPlace", "place"]


# A file or folder of a cache; `LocalPlace` describes what can be done with one.
Place = LocalPlace | UrlPlace


def place(out: str | os.PathLike | Place) -> Place:
    """Return a local path or, for a URL (s3://, gs://, memory://, ...), a path in a store.

    A local path is made absolute: a program may change its working directory, as Hydra does.

    Raises:
        ValueError: the protocol is unknown, or the package that reads it is not installed.
    """
    if isinstance(out, Place):
        return out
    protocol, mark, rest = os.fspath(out).partition("://")
    if not mark:
        if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", os.fspath(out)):  # what Path makes of s3://
            raise ValueError(
                f"{out}: give a URL as a string; pathlib.Path removes one of its slashes"
            )
        if not os.fspath(out):
            raise ValueError("an empty path: name a folder, or . for the current one")
        return LocalPlace(os.path.expanduser(out)).absolute()
    if protocol in ("file", "local"):
        return LocalPlace("/" + rest.lstrip("/"))
    url = os.fspath(out).rstrip("/")
    files_of(url)
    return UrlPlace(url)
