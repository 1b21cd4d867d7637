"""A contact sheet: what the tokens of a cache decode to, next to the images they stand for."""

from __future__ import annotations

import numpy as np
import torch

from ...images import decode_image, image_grid, to_uint8
from ..format import shards
from ..format.crops import make_views
from ..format.fingerprint import Tokenizer, first_parameter
from ..format.index import OpenIndex
from ..format.manifest import Manifest
from ..format.views import parse_views
from ..sources import BadImage, Source
from ..store import Place

PICTURES = 16
# Pairs in a row of the sheet.
PAIRS = 4


def contact_sheet(
    out: Place, found: Manifest, listed: OpenIndex, numbers: list[int], tokenizer: Tokenizer,
    source: Source,
) -> np.ndarray | None:  # fmt: skip
    """Draw pairs of an image's first view and its decoded tokens, evenly from shards `numbers`.

    Returns:
        uint8 [rows * side, 8 * side, 3]; None if no image can be read any more.
    """
    crops, codes = [], []
    for number, row in _spread(found, numbers):
        _, shard = shards.read_shard(shards.shard_path(out, number))
        good = np.flatnonzero(shard.status == shards.OK)
        if not len(good):
            continue
        row = int(good[min(np.searchsorted(good, row), len(good) - 1)])
        entry = listed.rows(number).entries[row]
        try:
            image = decode_image(source.read(entry))
        except (BadImage, OSError, ValueError):
            continue  # it changed or is gone, which encoding the sample again reports
        views = parse_views(found.views[:1])
        crops.append(make_views(image, views, found.image_size, path=entry.path, seed=found.seed))
        codes.append(torch.from_numpy(shard.tokens[row, :1].astype(np.int64)))
    if not crops:
        return None
    device = first_parameter(tokenizer).device
    cells = []
    with torch.inference_mode():
        for crop, code in zip(crops, codes, strict=True):
            decoded = tokenizer.decode(code.to(device)).float().clamp(-1, 1)
            cells += [crop[0], to_uint8(decoded)[0].cpu().numpy()]
    return image_grid(np.stack(cells), 2 * PAIRS)


def _spread(found: Manifest, numbers: list[int]) -> list[tuple[int, int]]:
    """Return shard and row of some images, the same ones at each call."""
    total = sum(len(found.rows_of(number)) for number in numbers)
    count = min(PICTURES, total)
    # All shards but the last are full.
    places = (divmod(k * total // count, found.shard_size) for k in range(count))
    return [(numbers[which], row) for which, row in places]
