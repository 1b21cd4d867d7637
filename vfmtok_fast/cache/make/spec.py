"""The settings of a cache that is to be made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..format.views import parse_views


@dataclass(frozen=True)
class CacheSpec:
    """What `build`, `build_on_ray` and `prepare` are told about a cache; each takes the fields too.

    Args:
        input_kind: what the input is, where that is not plain from its name.
        views: names of views, see `vfmtok_fast.cache.known_views`.
        seed: of the random crops.
        batch_size: views per call of `encode`, always padded to this.
        shard_size: pictures per shard.
        workers: threads that read and decode; None: one per CPU that this process may use, at
            most 8.
        extend: add pictures that came since the cache was made; they are refused otherwise. Rows
            and labels stay: new pictures and new classes come behind the old ones.
        hashed: note each picture's SHA-256 in the index, so that a change that keeps its size is
            noticed when it is read; indexing then reads every picture.

    Raises:
        TypeError, ValueError: a value of another kind, or out of range.
    """

    input_kind: str | None = None
    views: Iterable[str] = ("center",)
    seed: int = 0
    batch_size: int = 16
    shard_size: int = 8192
    workers: int | None = None
    extend: bool = False
    hashed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(str(view) for view in parse_views(self.views)))
        check_count("seed", self.seed, 0)
        check_count("batch_size", self.batch_size, 1)
        check_count("shard_size", self.shard_size, 1)
        if self.workers is not None:
            check_count("workers", self.workers, 1)

    @classmethod
    def of(cls, spec: CacheSpec | None, settings: dict[str, Any]) -> CacheSpec:
        """A spec with some fields set otherwise."""
        if unknown := sorted(settings.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"cache: settings must be among {known}, got {unknown[0]!r}")
        return replace(spec or cls(), **settings)


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"cache: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"cache: {name} must be at least {least}, got {value}")
