"""Which images a step gets, and which crop of each."""

from __future__ import annotations

import itertools
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vfmtok_fast.cache.sources import open_source, parquet
from vfmtok_fast.training import data
from vfmtok_fast.training.data import Batch, Pictures


def take(pictures: Pictures, count: int, done: int = 0) -> list[Batch]:
    batches = pictures.batches(done)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.paths == b.paths and torch.equal(a.items, b.items) for a, b in pairs)


def test_an_epoch_has_every_picture_once_and_each_its_own_order(photos: Path):
    pictures = Pictures(open_source(photos), 3, size=64)
    assert pictures.order.steps_per_epoch == 3
    orders = []
    for epoch in range(3):
        batches = take(pictures, 3, done=3 * epoch)
        assert all(batch.items.shape == (3, 64, 64, 3) for batch in batches)
        orders.append([path for batch in batches for path in batch.paths])
        assert len(set(orders[-1])) == 9
    assert len({tuple(order) for order in orders}) == 3


def test_a_run_goes_on_anywhere_with_the_same_crops(photos: Path):
    source = open_source(photos)
    whole = take(Pictures(source, 3, size=64, workers=3), 8)
    assert same(whole[4:], take(Pictures(source, 3, size=64, workers=1), 4, done=4))
    assert not same(whole, take(Pictures(source, 3, size=64, seed=1), 8))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(photos: Path, world_size: int):
    source = open_source(photos)
    whole = take(Pictures(source, 4, size=64), 3)
    shares = [
        take(Pictures(source, 4, size=64, rank=rank, world_size=world_size), 3)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            share = shares[rank][step]
            assert share.paths == batch.paths[rank::world_size]
            assert torch.equal(share.items, batch.items[rank::world_size])


def test_crops_are_the_authors(tmp_path: Path):
    """Crops are squares of 64 from a short side of 80 at most, and half of them are mirrored.

    The pixels of the image encode their position.
    """
    y, x = np.mgrid[0:64, 0:128]
    pixels = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    pictures = Pictures(open_source(tmp_path), 1, size=64)
    crops = [batch.items[0].double() for batch in take(pictures, 200)]
    spans = [float(crop[32, -1, 0] - crop[32, 0, 0]) for crop in crops]
    mirrored = sum(span < 0 for span in spans)
    assert 70 < mirrored < 130
    # 64 pixels of a short side of 64 to 80 show 64 to 51 pixels of the ramp.
    sizes = [abs(span) + 1 for span in spans]
    assert min(sizes) > 49 and max(sizes) < 66 and max(sizes) - min(sizes) > 8
    places = Counter(round(min(float(crop[32, 0, 0]), float(crop[32, -1, 0]))) for crop in crops)
    assert min(places) < 10 and max(places) > 55


def test_a_bad_picture_is_noted_and_the_next_takes_its_place(photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "class0" / "04.png").write_bytes(b"no picture")
    pictures = Pictures(open_source(tmp_path / "photos"), 5, size=64)
    paths = [path for batch in take(pictures, 2) for path in batch.paths]
    assert "class0/04.png" not in paths and paths.count("class0/06.png") == 2
    assert list(pictures.bad) == ["class0/04.png"]
    assert "not a picture" in pictures.bad["class0/04.png"]


def test_every_input_gives_the_same_pictures(photos: Path, tmp_path: Path):
    files = sorted(photos.rglob("*.png"))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in files:
            tar.add(path, str(path.relative_to(photos)))
    table = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files]}
    pq.write_table(pa.table(table), tmp_path / "photos.parquet")
    folder = take(Pictures(open_source(photos), 5, size=64), 2)
    assert same(folder, take(Pictures(open_source(tmp_path / "photos.tar"), 5, size=64), 2))
    # Parquet rows have other names, and therefore other orders and crops.
    rows = take(Pictures(open_source(tmp_path / "photos.parquet"), 5, size=64), 2)
    assert len({path for batch in rows for path in batch.paths}) == 10


def test_what_cannot_be_is_said(photos: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="10 pictures are fewer than a batch of 11"):
        Pictures(open_source(photos), 11)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 4"):
        Pictures(open_source(photos), 4, world_size=3)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"in a row cannot be read; the last is 'bad\.png'"):
        take(Pictures(open_source(tmp_path), 1), 1)


def test_parquet_is_shuffled_by_row_groups(tmp_path: Path, monkeypatch):
    """Each group is read once or twice an epoch, although batches mix images of many groups."""
    for name, count in (("a", 57), ("b", 43)):
        rows = [{"bytes": b"%s%d" % (name.encode(), row), "path": ""} for row in range(count)]
        pq.write_table(pa.table({"image": rows}), tmp_path / f"{name}.parquet", row_group_size=5)
    monkeypatch.setattr(data, "WINDOW", 20)
    monkeypatch.setattr(parquet, "_KEPT", 1)
    pictures = Pictures(open_source(tmp_path), 10, size=64)
    reads = []
    walk = parquet._walk_from
    monkeypatch.setattr(parquet, "_walk_from", lambda *of: reads.append(of) or walk(*of))
    places = [place for done in range(10) for place in pictures.order.places(done)]
    assert sorted(places) == list(range(100)) and places != sorted(places)
    found = [pictures.source.read(pictures.entries[place]) for place in places]
    assert len(set(found)) == 100
    assert len(reads) <= 2 * 21
    # A batch mixes many groups, and the next epoch has other windows.
    first = [pictures.entries[place] for place in places[:10]]
    assert len({(entry.file, entry.offset // 5) for entry in first}) >= 3
    assert set(places[:20]) != {p for done in (10, 11) for p in pictures.order.places(done)}
