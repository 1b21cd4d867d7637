"""Every kind of bad or odd image in one folder: quarantined with its reason, or tokenised.

A tokenised image must have the tokens of the image that the comment above it names, cropped by the
reference rule. A quarantined image must neither stop the run nor change a neighbour.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from vfmtok_fast import cache
from vfmtok_fast.images import center_crop, to_float

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


def photo(width=40, height=30, seed=0):
    """Return a smooth image, which JPEG changes little; each seed gives a different one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def without_adobe_marker(data):
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]


def with_frame_size(data, width, height):
    """Return the JPEG with another size in its header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def with_bits_flipped(data, count):
    data, rng = bytearray(data), random.Random(1)
    start = data.index(b"\xff\xda") + 20
    for _ in range(count):
        at = rng.randrange(start, len(data) - 2)
        if 0xFF not in (data[at], data[at] ^ 4, data[at - 1]):
            data[at] ^= 4
    return bytes(data)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEG = encoded(photo(200, 150), "JPEG", quality=95)
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
GRAY16 = np.arange(0, 65536, 55, dtype=np.uint16)[:1190].reshape(34, 35)
PALETTE = photo(seed=3).quantize(16)

# These get the tokens of what Pillow itself reads and converts to RGB.
READ = {
    "png": encoded(photo(seed=1), "PNG"),
    "cmyk-adobe": encoded(photo().convert("CMYK"), "JPEG"),
    "cmyk-plain": without_adobe_marker(encoded(photo().convert("CMYK"), "JPEG")),
    "gray": encoded(photo().convert("L"), "JPEG"),
    "la": encoded(photo().convert("LA"), "PNG"),
    "rgba": encoded(photo().convert("RGBA"), "PNG"),
    "palette": encoded(PALETTE, "PNG"),
    "palette-transparent": encoded(PALETTE, "PNG", transparency=3),
    "bad-icc": encoded(photo(), "JPEG", icc_profile=b"no profile"),
    "other-icc": encoded(photo(), "JPEG", icc_profile=LAB),
    "exif-garbage": encoded(photo(), "JPEG", exif=b"Exif\0\0garbage" * 5),
    "exif-turned": encoded(photo(), "JPEG", exif=turned()),
    "bits-flipped": with_bits_flipped(encoded(photo(200, 150), "JPEG", quality=95), 5),
    "trailing-junk": JPEG + b"trailing junk",
    "webp": encoded(photo(seed=5), "WEBP"),
    "gif": encoded(photo(seed=6), "GIF"),
    "bmp": encoded(photo(seed=7), "BMP"),
    "tiff": encoded(photo(seed=8), "TIFF"),
    "progressive": encoded(photo(seed=9), "JPEG", progressive=True),
    **{
        f"size-{width}x{height}": encoded(photo(width, height), "PNG")
        for width, height in ((1, 1), (20, 17), (336, 336), (337, 336), (671, 673), (4000, 3000))
    },
    "900x2": encoded(photo(900, 2), "PNG"),
}
# These are quarantined, each with the pattern of its reason. The 900 x 2 image above would be too
# if it had to be scaled to 336.
REFUSED = {
    "half": (JPEG[: len(JPEG) // 2], "truncated"),
    "last-10-bytes": (JPEG[:-10], "truncated"),
    "no-end-marker": (JPEG[:-2], "truncated"),
    "zero-byte": (b"", "empty file"),
    "all-zeros": (bytes(5000), "not a picture"),
    "random": (random.Random(0).randbytes(5000), "not a picture"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
    "leading-junk": (b"junk" + JPEG, "not a picture"),
    "header-only": (JPEG[: JPEG.index(b"\xff\xda")], "."),
    "zero-height": (with_frame_size(JPEG, 200, 0), "."),
    "bomb": (with_frame_size(JPEG, 65000, 65000), "decompression bomb"),
    "too-long": (encoded(Image.new("RGB", (90000, 1)), "PNG"), "too elongated"),
    "int32": (encoded(Image.fromarray(GRAY16.astype(np.int32)), "TIFF"), "no fixed range"),
    "float": (encoded(Image.fromarray(GRAY16.astype(np.float32)), "TIFF"), "no fixed range"),
}


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory):
    """Summary, tokens and reasons of a cache of them all.

    They lie in one class folder, under names that end in .JPEG, together with good neighbours.
    """
    root = tmp_path_factory.mktemp("bad")
    folder = root / "p" / "class0"
    folder.mkdir(parents=True)
    for name, data in [*READ.items(), *((name, data) for name, (data, _) in REFUSED.items())]:
        (folder / f"{name}.JPEG").write_bytes(data)
    (folder / "gray16.JPEG").write_bytes(encoded(Image.fromarray(GRAY16), "PNG"))
    for number in range(5):
        fake.write_picture(folder / f"neighbour{number}.png", number)
    tokenizer = fake.FakeTokenizer()
    summary = cache.build(root / "p", root / "t", tokenizer, **SMALL)
    assert cache.verify(root / "t", tokenizer, root / "p").agreement == 1.0
    lines = "".join(path.read_text() for path in sorted((root / "t" / "quarantine").iterdir()))
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines.splitlines())}
    paths = sorted(path.name for path in folder.iterdir())
    found, tokens = cache.TokenCache(root / "t", "center"), {}
    for position, row in enumerate(found.rows):
        tokens[paths[row]] = found[position][0]
    return summary, tokens, reasons


def tokens_of(fake, image):
    with torch.no_grad():
        crop = center_crop(image.convert("RGB"), fake.SIDE)
        return fake.FakeTokenizer().eval().encode(to_float(crop[None].copy()))[0]


@pytest.mark.parametrize("name", READ)
def test_read(built, fake, name):
    _, tokens, _ = built
    with Image.open(io.BytesIO(READ[name])) as image:
        assert torch.equal(tokens[f"{name}.JPEG"], tokens_of(fake, image))


@pytest.mark.parametrize("name", REFUSED)
def test_quarantined(built, name):
    _, tokens, reasons = built
    reason = reasons[f"class0/{name}.JPEG"]
    assert f"{name}.JPEG" not in tokens
    assert re.search(REFUSED[name][1], reason) and "\n" not in reason and "0x7" not in reason


def test_the_run_goes_on_and_neighbours_do_not_notice(built, fake, tmp_path):
    summary, tokens, reasons = built
    assert (summary.bad, summary.exit_code, len(reasons)) == (len(REFUSED), 3, len(REFUSED))
    assert len(tokens) == len(READ) + 6
    for number in range(5):
        path = fake.write_picture(tmp_path / f"{number}.png", number)
        with Image.open(path) as image:
            assert torch.equal(tokens[f"neighbour{number}.png"], tokens_of(fake, image))
    # 16-bit gray keeps the high byte of each value; an EXIF orientation never rotates.
    assert torch.equal(
        tokens["gray16.JPEG"], tokens_of(fake, Image.fromarray((GRAY16 >> 8).astype(np.uint8)))
    )
    assert torch.equal(tokens["exif-turned.JPEG"], tokens["exif-garbage.JPEG"])


def test_names_of_files_and_folders(tmp_path, out, tokenizer, fake):
    """Empty classes, hidden files, link loops, mixed case and a name in two classes are handled."""
    tree = tmp_path / "p"
    names = ["a/x.JpEg", "b/x.JpEg", "b/deep/x.JpEg", "a/\u00e9 \u4f60;$(touch pwned)'\".PNG"]
    for number, name in enumerate(names):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(encoded(photo(seed=number), "PNG"))
    (tree / "an-empty-class").mkdir()
    for name in (".DS_Store", "a/.DS_Store", "a/._x.JpEg", "a/Thumbs.db", "a/notes.txt"):
        (tree / name).write_bytes(b"\0\0\0\1Bud1")
    (tree / "b" / "loop").symlink_to(tree / "b")
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 0
    assert cache.read_manifest(out).classes == ["a", "an-empty-class", "b"]
    assert cache.TokenCache(out).labels.tolist() == [0, 0, 2, 2]
    assert sorted(os.listdir(tmp_path)) == ["p", "tokens"]


def test_a_shard_of_bad_pictures_alone(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", count=12, bad=(0, 3, 6, 9))  # all images of class0
    summary = cache.build(tree, out, tokenizer, **SMALL)
    assert (summary.bad, summary.shards) == (4, 3) and cache.verify(out, tokenizer, tree).ok
    assert cache.status(out).state == "complete" and len(cache.TokenCache(out)) == 8
    with pytest.raises(cache.TooManyBadImages) as caught:
        cache.build(tree, out, tokenizer, max_bad=3, **SMALL)
    assert caught.value.exit_code == 4


def test_formats_that_are_not_read(tmp_path, out, tokenizer, fake):
    """Formats whose Pillow plugins run programs or accept any bytes as an image are not read."""
    tree = fake.make_tree(tmp_path / "p", count=2)
    (tree / "class0" / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tree / "class0" / "tga.jpg").write_bytes(encoded(photo(), "TGA"))
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 2
