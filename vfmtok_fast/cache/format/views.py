"""Views: which squares of an image are tokenised.

Views are declared, not drawn: a cache holds the same named views of every image, so which half of a
data set is mirrored is never a matter of luck.

    center              the centre square of the image, after scaling its short side to size
    ten-crop-0 ... -9   crops of the centre square of side int(1.1 size): top left, top right,
                        bottom left, bottom right, centre; 5 to 9: the same crops of the mirrored
                        square (as LlamaGen caches)
    random-K            the K-th random crop: the short side is scaled to a random integer between
                        size and ceil(size / 0.8), then a random square of side size is cut (as the
                        authors train)
    center-flip, random-K-flip      the same square, mirrored left to right

`ten-crop` declares all ten, `random-0..7` and `random-0..7-flip` eight at once. A random crop is a
function of the seed, the image's relative path, K, and the image's size. It does not depend on
other images, views, processes or versions of a random number generator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

FLIP = "-flip"
TEN_CROP_RANGE = Fraction("1.1")
LEAST_RANDOM_CROP = Fraction("0.8")

# What these views depend on besides their names; recorded in caches that hold such a view.
RULES = {
    "ten-crop": "corners and centre of the centre square of side int(1.1 size), and of it mirrored",
    "random": (
        "short side uniform in size..ceil(size/0.8), place uniform, by SHA-256 of seed, view, path"
    ),
}

_RANDOM = re.compile(r"random-(0|[1-9]\d{0,5})(?:\.\.(0|[1-9]\d{0,5}))?(-flip)?")
_MAX_VIEWS = 10_000


@dataclass(frozen=True)
class View:
    """One declared view.

    Args:
        kind: "center", "ten-crop" or "random".
        number: which one of its kind: 0 to 4 for the ten crops, any for the random ones.
        flip: whether it is mirrored left to right.
    """

    kind: str
    number: int = 0
    flip: bool = False

    def __str__(self) -> str:
        if self.kind == "ten-crop":
            return f"ten-crop-{self.number + 5 * self.flip}"
        return self.kind + f"-{self.number}" * (self.kind == "random") + FLIP * self.flip


def known_views() -> list[str]:
    """List what can be declared, as forms of names."""
    return ["center", "center-flip", "ten-crop", "ten-crop-N", "random-K", "random-K-flip"]


def parse_views(names: Iterable[str]) -> tuple[View, ...]:
    """Check and parse the names of views.

    Args:
        names: the views in the order in which the cache is to hold them, e.g.
            ("center", "center-flip"); `ten-crop` and `random-A..B` stand for several.

    Returns:
        The views, in the same order.

    Raises:
        TypeError: a bare string instead of a list of names.
        ValueError: no view, an unknown one, or one given twice.
    """
    if isinstance(names, str):
        raise TypeError(
            f"views: must be a list of names, got the string {names!r}; use [{names!r}]"
        )
    views = [view for name in names for view in _parse(name)]
    known = ", ".join(known_views())
    if not views:
        raise ValueError(f"views: must name at least one of {known}, got none")
    if len(views) > _MAX_VIEWS:
        raise ValueError(f"views: must be at most {_MAX_VIEWS}, got {len(views)}")
    if len(set(views)) < len(views):
        twice = next(view for view in views if views.count(view) > 1)
        raise ValueError(f"views: must name each view once, got {twice} twice")
    return tuple(views)


def _parse(name: str) -> list[View]:
    if name == "ten-crop":
        return [View("ten-crop", number, flip) for flip in (False, True) for number in range(5)]
    if match := _RANDOM.fullmatch(name):
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last - first >= _MAX_VIEWS:
            raise ValueError(f"views: {name!r} must count up, over at most {_MAX_VIEWS} views")
        return [View("random", number, bool(match[3])) for number in range(first, last + 1)]
    if name in ("center", "center" + FLIP):
        return [View("center", 0, name != "center")]
    if match := re.fullmatch(r"ten-crop-(\d)", name):
        return [View("ten-crop", int(match[1]) % 5, int(match[1]) >= 5)]
    raise ValueError(f"views: must be among {', '.join(known_views())}, got {name!r}")


def rules(views: Iterable[View], seed: int) -> dict[str, Any]:
    """Return what views depend on besides their names, as JSON values; empty for `center`."""
    kinds = {view.kind for view in views}
    found = {kind: RULES[kind] for kind in sorted(kinds & set(RULES))}
    return ({"view_rules": found} if found else {}) | ({"seed": seed} if "random" in kinds else {})


@dataclass(frozen=True)
class Cut:
    """Where a view is: the square of side `size` at (top, left) of a base, mirrored or not."""

    base: int
    top: int = 0
    left: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Plan:
    """How the views of an image are made: a few resized squares, and cuts out of them.

    Cuts of 8-bit squares are exact on every device, so only the squares are sent to it.

    Args:
        size: side of a view, in pixels.
        bases: for each square, a view that is cut out of it.
        sides: for each square, its side in pixels.
        cuts: one per view.
    """

    size: int
    bases: tuple[View, ...]
    sides: tuple[int, ...]
    cuts: tuple[Cut, ...]


def plan_views(views: tuple[View, ...], size: int) -> Plan:
    """Plan the squares that an image's views of side `size` are cut from, shared where possible."""
    keys: dict[Any, View] = {}
    large = int(size * TEN_CROP_RANGE)
    cuts = []
    for view in views:
        key = view.kind if view.kind == "ten-crop" else (view.kind, view.number)
        keys.setdefault(key, view)
        base = list(keys).index(key)
        top, left = _corner(view.number, large - size) if view.kind == "ten-crop" else (0, 0)
        # Mirrored crops are crops of the mirrored square, so they are placed from its right edge.
        left = large - size - left if view.kind == "ten-crop" and view.flip else left
        cuts.append(Cut(base, top, left, view.flip))
    sides = tuple(large if view.kind == "ten-crop" else size for view in keys.values())
    return Plan(size, tuple(keys.values()), sides, tuple(cuts))


def _corner(number: int, far: int) -> tuple[int, int]:
    """Return top and left of one of the five crops of a square that exceeds their side by `far`."""
    # round() halves an odd margin to the even neighbour, as torchvision's crops do.
    middle = round(far / 2)
    return ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))[number]
