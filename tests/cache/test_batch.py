"""Batches: the views a device cuts from 8-bit squares equal the reference rule's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vfmtok_fast.cache.format.crops import make_bases, make_views
from vfmtok_fast.cache.format.views import parse_views, plan_views
from vfmtok_fast.cache.make.batch import Batch
from vfmtok_fast.images import to_float

SETS = [
    ["center"],
    ["center-flip", "center"],
    ["ten-crop"],
    ["ten-crop-7", "random-0..2", "center", "ten-crop-4", "random-1-flip"],
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def photos(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(20, 90, 2)
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", SETS, ids=" ".join)
@pytest.mark.parametrize("size", [1, 3, 8, 32])
def test_views_are_those_of_the_reference_rule(names, size, device):
    """Batches match when filled as for a shard: some images span two, every fourth image is bad."""
    views = parse_views(names)
    plan = plan_views(views, 17)
    batch, wanted, row = Batch(plan, size, device == "cuda"), np.zeros((size, 17, 17, 3), "u1"), 0
    checked = 0
    for number, image in enumerate(photos(23)):
        key = {"path": f"{number}.jpg", "seed": 5}
        bases, expected = make_bases(image, plan, **key), make_views(image, views, 17, **key)
        for view in range(len(views)):
            if number % 4:
                batch.add(row, bases, view)
                wanted[row] = expected[view]
            row += 1
            if row == size:
                found = batch.to(torch.device(device))
                assert found.dtype == torch.float32 and found.device.type == device
                assert torch.equal(found.cpu(), to_float(wanted))
                batch.clear()
                wanted[:], row, checked = 0, 0, checked + 1
    assert checked == 23 * len(views) // size


@pytest.mark.parametrize("names, side, squares", [("ten-crop", 369, 1), ("center", 336, 10)])
def test_one_square_a_picture_crosses_over(names, side, squares):
    views = parse_views([names])
    plan = plan_views(views, 336)
    batch = Batch(plan, 10, pinned=False)
    for row in range(10):
        if row % len(views) == 0:
            bases = make_bases(next(photos(1, row)), plan)
        batch.add(row, bases, row % len(views))
    assert batch.filled == {side: squares}
    rows = [row for rows, _ in batch.cuts.values() for row in rows]
    assert sorted(rows) == list(range(10)) and len(batch.cuts) == len(views)


def test_views_that_can_share_a_square_do():
    names = ["center", "random-3-flip", "ten-crop", "center-flip", "random-3", "random-4"]
    plan = plan_views(parse_views(names), 336)
    assert plan.sides == (336, 336, 369, 336)
    assert [cut.base for cut in plan.cuts] == [0, 1] + [2] * 10 + [0, 1, 3]


def test_memory_of_a_batch_is_that_of_its_squares():
    plan = plan_views(parse_views(["ten-crop", "center"]), 336)
    for size, pictures in ((1, 1), (2, 2), (12, 2), (13, 3), (24, 4), (128, 13)):
        batch = Batch(plan, size, pinned=False)
        shapes = {side: len(squares) for side, squares in batch.squares.items()}
        assert shapes == {336: min(size, pictures), 369: min(size, pictures)}
