"""The settings of a cache to be made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..format.views import parse_views
from ..sources import Source, open_source


@dataclass(frozen=True)
class CacheSpec:
    """Settings of a cache for `build`, `build_on_ray` and `prepare`, which also take the fields.

    Args:
        input_kind: what the input is, if that is not clear from its name and contents.
        views: names of views, see `vfmtok_fast.cache.known_views`.
        seed: seed of the random crops.
        batch_size: views per call of `encode`, always padded to this; None: that of the cache being
            resumed; for a new one, what suits the tokenizer's device.
        shard_size: images per shard.
        workers: threads that read and decode; None: one per CPU that this process may use, at
            most 8.
        extend: add images that came since the cache was made; otherwise they are refused. Rows and
            labels stay: new images and new classes come after the old ones.
        hashed: store each image's SHA-256 in the index, so that a change that keeps its size is
            noticed when it is read; indexing then reads every image.
        include, exclude: patterns of the files to take or to leave out, see
            `vfmtok_fast.cache.sources.choice`.
        image_column, label_column: columns of Parquet files, if they are not clear.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.
    """

    input_kind: str | None = None
    views: Iterable[str] = ("center",)
    seed: int = 0
    batch_size: int | None = None
    shard_size: int = 8192
    workers: int | None = None
    extend: bool = False
    hashed: bool = False
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(str(view) for view in parse_views(self.views)))
        check_count("seed", self.seed, 0)
        check_count("shard_size", self.shard_size, 1)
        for name in ("batch_size", "workers"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def open(self, images: str | os.PathLike) -> Source:
        """Open the input as the spec describes it; raises like `open_source`."""
        return open_source(
            images, self.input_kind, include=self.include, exclude=self.exclude,
            image_column=self.image_column, label_column=self.label_column,
        )  # fmt: skip

    @classmethod
    def of(cls, spec: CacheSpec | None, settings: dict[str, Any]) -> CacheSpec:
        """Return a spec with some fields replaced."""
        if unknown := sorted(settings.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"cache: settings must be among {known}, got {unknown[0]!r}")
        return replace(spec or cls(), **settings)


def check_count(name: str, value: int, least: int) -> None:
    """Require an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"cache: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"cache: {name} must be at least {least}, got {value}")
