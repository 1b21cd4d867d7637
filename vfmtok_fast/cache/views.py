"""Views: which squares of a picture are tokenised.

Views are declared, not drawn: a cache holds the same named views of every picture, so which half of
a data set is mirrored is never a matter of luck. A view is a base crop, optionally mirrored left to
right: `center`, `center-flip`. Another crop is one more entry of `_CROPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..images import center_crop

FLIP = "-flip"

# name of a base crop -> (RGB picture, side in pixels) -> uint8 [side, side, 3]
_CROPS: dict[str, Callable[[Image.Image, int], np.ndarray]] = {"center": center_crop}


@dataclass(frozen=True)
class View:
    """One declared view: the base crop's name, and whether it is mirrored left to right."""

    crop: str
    flip: bool

    def __str__(self) -> str:
        return self.crop + (FLIP if self.flip else "")


def known_views() -> list[str]:
    """Names of all views that can be declared."""
    return [str(View(crop, flip)) for crop in _CROPS for flip in (False, True)]


def parse_views(names: Iterable[str]) -> tuple[View, ...]:
    """Check the names of views and take them apart.

    Args:
        names: the views in the order in which the cache shall hold them, e.g.
            ("center", "center-flip").

    Returns:
        The views, in the same order.

    Raises:
        TypeError: one bare string instead of a list of names.
        ValueError: no view, an unknown one, or one twice.
    """
    if isinstance(names, str):
        raise TypeError(
            f"views: must be a list of names, got the string {names!r}; use [{names!r}]"
        )
    names = list(names)
    known = known_views()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"views: must be among {', '.join(known)}, got {unknown[0]!r}")
    if not names:
        raise ValueError(f"views: must name at least one of {', '.join(known)}, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"views: each name once, got {', '.join(names)}")
    return tuple(View(name.removesuffix(FLIP), name.endswith(FLIP)) for name in names)


def make_views(image: Image.Image, views: tuple[View, ...], size: int) -> np.ndarray:
    """Cut the declared views out of a picture; a crop that several views share is made once.

    Args:
        image: Pillow image of mode RGB.
        views: V views from `parse_views`.
        size: side in pixels.

    Returns:
        uint8 array [V, size, size, 3].

    Raises:
        ValueError: the picture cannot be cropped (see `vfmtok_fast.images.center_crop`).
    """
    crops = {name: _CROPS[name](image, size) for name in dict.fromkeys(v.crop for v in views)}
    return np.stack([crops[v.crop][:, ::-1] if v.flip else crops[v.crop] for v in views])
