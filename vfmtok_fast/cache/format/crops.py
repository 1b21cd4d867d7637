"""Cut views out of an image; `views` defines which views there are."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ...images import center_crop, resize_short_side
from .views import LEAST_RANDOM_CROP, Plan, View, plan_views


def make_bases(
    image: Image.Image, plan: Plan, *, path: str = "", seed: int = 0
) -> list[np.ndarray]:
    """Make the squares that an image's views are cut from, with one resize each.

    Args:
        image: Pillow image of mode RGB.
        plan: from `plan_views`.
        path: the image's relative path; random crops depend on it.
        seed: seed of the random crops.

    Returns:
        uint8 arrays [side, side, 3], one for each of `plan.bases`.

    Raises:
        ValueError: the image cannot be cropped (see `vfmtok_fast.images.center_crop`).
    """
    found = []
    for view, side in zip(plan.bases, plan.sides, strict=True):
        if view.kind == "random":
            draw = partial(_draw, seed, view.number, path)
            found.append(_random_crop(image, plan.size, draw))
        else:
            found.append(center_crop(image, side))
    return found


def make_views(
    image: Image.Image, views: tuple[View, ...], size: int, *, path: str = "", seed: int = 0
) -> np.ndarray:
    """Cut V views out of an image: uint8 [V, size, size, 3]; arguments, errors as `make_bases`."""
    plan = plan_views(views, size)
    bases = make_bases(image, plan, path=path, seed=seed)
    out = np.empty((len(views), size, size, 3), np.uint8)
    for place, cut in enumerate(plan.cuts):
        part = bases[cut.base][cut.top : cut.top + size, cut.left : cut.left + size]
        out[place] = part[:, ::-1] if cut.flip else part
    return out


def _random_crop(image: Image.Image, size: int, draw: Any) -> np.ndarray:
    short = size + draw(0, math.ceil(size / LEAST_RANDOM_CROP) - size + 1)
    image = resize_short_side(image, short)
    top, left = draw(1, image.height - size + 1), draw(2, image.width - size + 1)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _draw(seed: int, number: int, path: str, step: int, count: int) -> int:
    """Return a uniform integer below `count`, drawn separately for each set of arguments.

    This is a hash instead of a generator with a state. Because 2**64 is not a multiple of `count`,
    frequencies are off by 1e-16.
    """
    text = f"vfmtok_fast random crop 1\0{seed}\0{number}\0{step}\0{path}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") % count
