"""Views: the position of each crop, and that a random crop depends only on its own key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from vfmtok_fast import cache
from vfmtok_fast.cache.format.crops import _draw, make_views
from vfmtok_fast.cache.format.views import View, parse_views
from vfmtok_fast.images import center_crop, resize_short_side

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


def photo(width=97, height=64, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def views_of(names, image, size=16, **key):
    return make_views(image, parse_views(names), size, **key)


def test_names():
    assert list(map(str, parse_views(["ten-crop"]))) == [f"ten-crop-{n}" for n in range(10)]
    assert list(map(str, parse_views(["random-3..5", "random-0..1-flip", "center-flip"]))) == [
        "random-3",
        "random-4",
        "random-5",
        "random-0-flip",
        "random-1-flip",
        "center-flip",
    ]
    assert parse_views(["ten-crop-7"]) == (View("ten-crop", 2, True),)
    for name in ("center", "center-flip", "ten-crop-0", "ten-crop-9", "random-12", "random-0-flip"):
        assert str(parse_views([name])[0]) == name


@pytest.mark.parametrize(
    "name",
    ["ten-crop-10", "ten-crop-0-flip", "random", "random-01", "random--1", "random-3..1", "flip"]
    + ["random-0..99999", "center-flip-flip", "random-1\n", "random-٣"],
)
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match=r"views: .*"):
        parse_views([name])
    with pytest.raises(ValueError, match="name each view once, got ten-crop-3 twice"):
        parse_views(["ten-crop", "ten-crop-3"])


@pytest.mark.parametrize("size", [16, 31, 336])
def test_ten_crop_is_torchvisions_of_the_larger_square(size):
    image = photo(2 * size + 5, 2 * size - 7)
    base = torch.from_numpy(center_crop(image, int(size * 11 / 10)).copy()).permute(2, 0, 1)
    expected = torch.stack(functional.ten_crop(base, size)).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(views_of(["ten-crop"], image, size), expected)
    assert int(336 * 11 / 10) == 369
    one = views_of(["ten-crop-6", "center"], image, size)
    np.testing.assert_array_equal(one[0], expected[6])
    np.testing.assert_array_equal(one[1], center_crop(image, size))


def test_a_random_crop_is_a_square_of_the_resized_picture():
    image = photo()
    for k in range(20):
        (crop,) = views_of([f"random-{k}"], image, path="a/b.jpg", seed=5)
        places = []
        for short in range(16, math.ceil(16 / 0.8) + 1):
            resized = np.asarray(resize_short_side(image, short))
            windows = np.lib.stride_tricks.sliding_window_view(resized, (16, 16, 3))[:, :, 0]
            places += [short] * int((windows == crop).all((2, 3, 4)).sum())
        assert len(places) == 1


def test_random_crops_depend_on_seed_path_and_number_alone():
    image = photo()
    base = views_of(["random-0..4"], image, path="a.jpg", seed=1)
    mixed = ["random-3-flip", "center", "random-1", "ten-crop", "random-3"]
    other = views_of(mixed, image, path="a.jpg", seed=1)
    np.testing.assert_array_equal(other[-1], base[3])
    np.testing.assert_array_equal(other[0], base[3][:, ::-1])
    np.testing.assert_array_equal(other[2], base[1])
    changed = [{"path": "b.jpg", "seed": 1}, {"path": "a.jpg", "seed": 2}]
    for key in changed:
        assert (views_of(["random-0..4"], image, **key) != base).any((1, 2, 3)).sum() >= 4
    assert len({crop.tobytes() for crop in base}) == 5


def test_draws_stay_the_same_for_ever():
    """The expected numbers never change, so that caches of older versions stay valid."""
    drawn = [_draw(0, 2, "n01/x.JPEG", step, 1000) for step in range(3)]
    assert drawn + [_draw(7, 0, "\u00e9.png", 0, 85)] == [620, 636, 230, 47]


def test_random_crops_are_uniform():
    """Short side and place pass chi-square tests at 1e-6 or so (36 degrees of freedom at most)."""
    for step, count in ((0, 5), (1, 37), (2, 8)):
        drawn = [_draw(0, k, f"{i}.jpg", step, count) for i in range(400) for k in range(10)]
        seen = np.bincount(drawn, minlength=count)
        expected = len(drawn) / count
        assert len(seen) == count and ((seen - expected) ** 2 / expected).sum() < 3 * count + 40


def test_all_views_in_a_cache(tree, out, tokenizer, fake):
    names = ["random-0..1", "ten-crop", "random-1-flip", "center"]
    cache.build(tree, out, tokenizer, views=names, seed=3, **SMALL)
    found = cache.read_manifest(out)
    assert len(found.views) == 14 and found.covers["seed"] == 3
    assert set(found.covers["view_rules"]) == {"random", "ten-crop"}
    assert cache.verify(out, tokenizer, tree).agreement == 1.0
    # The tokens of a view do not depend on which other views there are.
    alone = out.with_name("alone")
    cache.build(tree, alone, tokenizer, views=["random-1"], seed=3, batch_size=5, shard_size=7)
    np.testing.assert_array_equal(
        cache.read_tokens(alone, "random-1")[0], cache.read_tokens(out, "random-1")[0]
    )
    with pytest.raises(cache.FingerprintMismatch, match=r"seed \(there 3, here 4\)"):
        cache.build(tree, out, tokenizer, views=names, seed=4, **SMALL)


def test_the_seed_counts_only_for_random_crops(tree, out, tokenizer):
    cache.build(tree, out, tokenizer, seed=1, **SMALL)
    assert cache.build(tree, out, tokenizer, seed=2, **SMALL).encoded == 0
    assert "seed" not in cache.read_manifest(out).covers
    with pytest.raises(ValueError, match="seed must be at least 0"):
        cache.build(tree, out, tokenizer, seed=-1, **SMALL)


def test_one_resize_for_views_that_share_one(monkeypatch):
    resized = []
    resize = Image.Image.resize

    def counted(image, *arguments):
        resized.append(arguments)
        return resize(image, *arguments)

    monkeypatch.setattr(Image.Image, "resize", counted)
    views_of(["ten-crop", "random-4", "random-4-flip"], photo(30, 24))
    assert len(resized) == 2
