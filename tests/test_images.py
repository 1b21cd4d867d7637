"""Decoding and preprocessing: exact on the authors' cases, a one-line error for broken files."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from vfmtok_fast.images import (
    center_crop,
    decode_image,
    image_grid,
    load_images,
    to_float,
    to_uint8,
)

PHOTOS = Path(__file__).resolve().parents[1] / "examples" / "images"

# SHA-256 of the uint8 [336, 336, 3] arrays that the authors' preprocessing gave for these photos.
GOLDEN = {
    "people/astronaut.png": "bca2e6da37c3ac2120a070c07e8572694c6fdac861c338c288bacd89936f4091",
    "food/coffee.png": "e57f09b8f9efdaf82bfe71053888886338c01b754387f05e6481a7a26238b6e0",
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3 % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: np.ndarray) -> bytes:
    """Write a PNG byte by byte: Pillow cannot write every kind that it reads."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def with_frame_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Patch the size in a baseline JPEG's frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


# ---- preprocessing


@pytest.mark.parametrize("name", GOLDEN)
def test_crop_is_bit_exact_with_the_authors(name):
    crop = center_crop(decode_image(PHOTOS / name))
    assert crop.shape == (336, 336, 3) and crop.dtype == np.uint8
    assert hashlib.sha256(crop.tobytes()).hexdigest() == GOLDEN[name]


@pytest.mark.parametrize("halvings", [1, 2])
def test_large_pictures_are_halved_by_box(halvings):
    image = noise(336 << halvings, 336 << halvings)
    expected = np.asarray(image).astype(int)
    for _ in range(halvings):  # Pillow rounds to 8 bits after each direction
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) >> 1
        expected = (expected[::2] + expected[1::2] + 1) >> 1
    np.testing.assert_array_equal(center_crop(image), expected)


@pytest.mark.parametrize("extra, offset", [(1, 0), (2, 1), (5, 2)])
def test_crop_offset_rounds_down(extra, offset):
    wide, tall = noise(336 + extra, 336), noise(336, 336 + extra)
    np.testing.assert_array_equal(center_crop(wide), np.asarray(wide)[:, offset : offset + 336])
    np.testing.assert_array_equal(center_crop(tall), np.asarray(tall)[offset : offset + 336])


@pytest.mark.parametrize(
    "width, height", [(1, 1), (20, 17), (336, 336), (671, 673), (672, 671), (4000, 3000), (200, 2)]
)
def test_any_size_gives_a_square(width, height):
    assert center_crop(noise(width, height)).shape == (336, 336, 3)


@pytest.mark.parametrize("size", [1, 64, 384])
def test_other_sizes(size):
    assert center_crop(gradient(), size).shape == (size, size, 3)


@pytest.mark.parametrize("width, height", [(900, 2), (2, 900), (60000, 1)])
def test_elongated_pictures_are_refused(width, height):
    with pytest.raises(ValueError, match=f"{width}x{height} pixels is too elongated"):
        center_crop(Image.new("RGB", (width, height)))


def test_center_crop_refuses_other_modes_and_sizes():
    with pytest.raises(ValueError, match="mode RGB, got L"):
        center_crop(Image.new("L", (9, 9)))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        center_crop(Image.new("RGB", (9, 9)), 0)


def test_to_float_is_the_stated_arithmetic_on_all_values():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    expected = (values[..., 0].astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(
        0.5
    )
    result = to_float(values)
    assert result.dtype == torch.float32 and result.shape == (1, 3, 16, 16)
    assert result.is_contiguous() and result.min() == -1 and result.max() == 1
    for channel in range(3):
        np.testing.assert_array_equal(result[:, channel].numpy(), expected)
    assert torch.equal(to_uint8(result), torch.from_numpy(values))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_float_is_exact_on_the_gpu():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_float(values.cuda()).cpu(), to_float(values))


def test_to_float_keeps_channels_and_accepts_read_only_arrays():
    crop = center_crop(gradient(), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planes = to_float(crop[None])
    assert torch.equal(planes[0, 1], to_float(crop[None, :, :, 1:2].repeat(3, -1))[0, 0])
    # As OpenCV's users turn BGR into RGB.
    assert torch.equal(to_float(crop[None].copy()[..., ::-1]), planes.flip(1))


@pytest.mark.parametrize(
    "function, value, error",
    [
        (to_float, np.zeros((1, 4, 4, 3)), TypeError),
        (to_float, np.zeros((4, 4, 3), np.uint8), ValueError),
        (to_float, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ValueError),
        (to_uint8, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError),
        (to_uint8, torch.zeros(1, 4, 4, 3), ValueError),
        (to_uint8, torch.full((1, 3, 4, 4), float("nan")), ValueError),
    ],
)
def test_conversions_refuse_other_tensors(function, value, error):
    with pytest.raises(error, match=r"^\w+: images must .*, got .+$"):
        function(value)


def test_to_uint8_clamps():
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_load_images(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, seed in zip(paths, (1, 2), strict=True):
        noise(50, 40, seed).save(path)
    batch = load_images(paths, size=32)
    assert batch.shape == (2, 3, 32, 32)
    assert torch.equal(batch[1:], to_float(center_crop(noise(50, 40, 2), 32)[None]))
    Image.new("RGB", (900, 2)).save(paths[0])
    with pytest.raises(ValueError, match=r"a\.png: picture of 900x2"):
        load_images(paths)
    with pytest.raises(ValueError, match="at least one"):
        load_images([])


def test_load_images_that_were_left_half_open(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    with pytest.raises(ValueError, match=r"^picture 0: its file was closed before .* call load"):
        load_images(picture, 16)
    with pytest.raises(ValueError, match=r"^picture 0: picture of 0x5 pixels"):
        load_images(Image.new("RGB", (0, 5)), 16)


def test_image_grid():
    cells = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = image_grid(torch.from_numpy(cells), columns=2)
    assert grid.shape == (4, 6, 3)
    assert (grid[:2, :3] == 10).all() and (grid[:2, 3:] == 20).all()
    assert (grid[2:, :3] == 30).all() and (grid[2:, 3:] == 255).all()
    with pytest.raises(ValueError, match="one column"):
        image_grid(cells, columns=0)


# ---- decoding: files that can be read, and the result


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_source_kinds_and_formats_agree(tmp_path, format):
    image = gradient().quantize(64).convert("RGB")  # few colours, so that GIF is lossless too
    data = encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))
    path = tmp_path / "wrong_suffix.JPEG"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data)):
        result = decode_image(source)
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


def test_gray_palette_and_alpha_are_pillows_conversion():
    image = gradient()
    gray = image.convert("L")
    np.testing.assert_array_equal(
        np.asarray(decode_image(encoded(gray, "PNG"))), np.asarray(gray.convert("RGB"))
    )
    palette = image.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    clear = bytes([0] * 8 + [255] * 8)
    for options in ({}, {"transparency": 3}, {"transparency": clear}):
        data = encoded(palette, "PNG", **options)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)
    for mode in ("LA", "RGBA"):
        data = encoded(image.convert(mode), "PNG")
        expected = np.asarray(image.convert(mode).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)


@pytest.mark.parametrize("adobe_marker", [True, False])
def test_cmyk(adobe_marker):
    # Pillow writes CMYK with Adobe's marker and inverted values; without the marker, values are as
    # stored.
    data = encoded(gradient().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    if not adobe_marker:
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]
    result = np.asarray(decode_image(data)).astype(int)
    with Image.open(io.BytesIO(data)) as direct:
        assert direct.mode == "CMYK"
        np.testing.assert_array_equal(result, np.asarray(direct.convert("RGB")))
    if adobe_marker:
        assert np.abs(result - np.asarray(gradient())).max() < 12


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_keeps_the_picture(format):
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    result = np.asarray(decode_image(encoded(Image.fromarray(levels), format)))
    np.testing.assert_array_equal(result, np.stack([levels >> 8] * 3, -1))


def test_16_bit_colour_keeps_the_high_byte():
    levels = np.arange(0, 65536, 85, dtype=">u2")[: 16 * 48].reshape(16, 48)
    result = np.asarray(decode_image(png(16, 16, 16, 2, levels))).reshape(16, 48).astype(int)
    # Pillow drops the low byte or rounds, depending on its version: within one level either way.
    assert np.abs(result - (levels.astype(int) >> 8)).max() <= 1


@pytest.mark.parametrize(
    "values, kind", [(np.int32, "32-bit integer"), (np.float32, "floating-point")]
)
def test_pixels_without_a_range_are_refused(values, kind):
    data = encoded(Image.fromarray(np.arange(16, dtype=values).reshape(4, 4)), "TIFF")
    with pytest.raises(ValueError, match=f"{kind} pixels have no fixed range"):
        decode_image(data)


def tiff(
    values: np.ndarray, bits: int, photometric: int, order: str = "<", planes: bool = False, **more
) -> bytes:
    """Write a TIFF byte by byte. `more`: SampleFormat as `form`, Compression as `deflate`."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    form, deflate = more.get("form", 1), more.get("deflate", False)
    if planes:
        values = np.moveaxis(values, -1, 0)
    if bits in (8, 16, 32):
        kind = {1: "u", 2: "i", 3: "f"}[form]
        data = np.ascontiguousarray(values).astype(f"{order}{kind}{bits // 8}").tobytes()
    else:
        rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
        rows = [row + "0" * (-len(row) % 8) for row in rows]
        data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    parts = [data]
    if planes:
        parts = [data[i * len(data) // samples :][: len(data) // samples] for i in range(samples)]
    if deflate:
        parts = [zlib.compress(part) for part in parts]
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [8 if deflate else 1]}
    tags |= {262: [photometric], 273: parts, 277: [samples], 278: [height]}
    tags |= {279: [len(part) for part in parts], 284: [2 if planes else 1], 339: [form] * samples}
    after = 8 + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    at = after + 12 * 4 * samples  # where the data starts; room for longer values before it
    for tag, found in sorted(tags.items()):
        if tag == 273:
            lengths = [len(part) for part in found]
            found = [at + sum(lengths[:place]) for place in range(len(lengths))]
        value = b"".join(struct.pack(f"{order}I", one) for one in found)
        if len(value) > 4:
            value, extra = struct.pack(f"{order}I", after + len(extra)), extra + value
        entries += struct.pack(f"{order}HHI", tag, 4, len(found)) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return (head + entries + bytes(4) + extra).ljust(at, b"\0") + b"".join(parts)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_gray_tiff_comes_out_right_or_is_refused(bits, white_is_zero, order, deflate):
    levels = np.arange(256).reshape(16, 16)
    top = 2**bits - 1
    values = levels % (top + 1) if bits < 8 else levels * top // 255
    wanted = values * 255 // top if bits <= 8 else values >> (bits - 8)
    data = tiff(values, bits, 0 if white_is_zero else 1, order, deflate=deflate)
    # Kinds that Pillow itself does not open.
    if (bits == 12 and (white_is_zero or order == ">")) or (bits, white_is_zero, order) == (
        16,
        True,
        ">",
    ):
        with pytest.raises(ValueError, match="TIFF that is damaged, or of a kind that cannot"):
            decode_image(data)
        return
    result = np.asarray(decode_image(data))
    wanted = 255 - wanted if white_is_zero else wanted
    np.testing.assert_array_equal(result, np.stack([wanted] * 3, -1))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_colour_tiff_comes_out_right_or_is_refused(bits, planes, order, deflate):
    high = np.arange(16 * 16 * 3).reshape(16, 16, 3) * 5 % 256
    data = tiff(high if bits == 8 else high * 257, bits, 2, order, planes, deflate=deflate)
    if bits == 16 and planes and not deflate:
        with pytest.raises(ValueError, match="16-bit colours in planes of their own"):
            decode_image(data)
        return
    np.testing.assert_array_equal(np.asarray(decode_image(data)), high)


@pytest.mark.parametrize("bits, form", [(8, 2), (16, 2), (32, 1), (32, 2), (16, 3), (32, 3)])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_pixels_without_a_range_are_refused(bits, form, shape, photometric):
    data = tiff(np.ones(shape, int), bits, 2 if len(shape) == 3 else photometric, form=form)
    with pytest.raises(ValueError, match="no fixed range|of a kind that cannot be read"):
        decode_image(data)


def test_exif_orientation_never_rotates():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = decode_image(encoded(gradient(), "JPEG"))
    turned = decode_image(encoded(gradient(), "JPEG", exif=exif))
    assert turned.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain))


def test_garbage_exif_and_colour_profile_are_ignored():
    plain = np.asarray(decode_image(encoded(gradient(), "JPEG")))
    junk = encoded(gradient(), "JPEG", exif=b"Exif\0\0garbage" * 5, icc_profile=b"no profile")
    np.testing.assert_array_equal(np.asarray(decode_image(junk)), plain)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    other = encoded(gradient(), "JPEG", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(decode_image(other)), plain)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(format):
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(first))


# ---- decoding: files that are refused

JPEG = encoded(gradient(200, 150), "JPEG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a picture"),
        (bytes(5000), "not a picture"),
        (random.Random(0).randbytes(5000), "not a picture"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
        (b"junk" + JPEG, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-10], "truncated"),
        (JPEG[:-2], "truncated"),  # only the end marker is missing; Pillow insists on it
        (JPEG[: JPEG.index(b"\xff\xda")], "."),
        (with_frame_size(JPEG, 65000, 65000), "decompression bomb"),
        (with_frame_size(JPEG, 200, 0), "."),
        (encoded(gradient(), "PNG")[:-30], "."),
        (encoded(gradient(), "PNG").replace(b"IDAT", b"IDAX"), "."),
    ],
    ids=str,
)
def test_broken_files_give_one_line(data, reason, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=reason) as caught:
            decode_image(data)
    assert "\n" not in str(caught.value) and "0x7" not in str(caught.value)
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError) as from_path:
        decode_image(path)
    assert str(from_path.value) == f"{path}: {caught.value}"


def test_truncated_files_are_refused_also_where_pillow_would_fill_them_up(monkeypatch):
    """Whole ones too, so that the file is not blamed."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for data in (JPEG[: len(JPEG) // 2], JPEG):
        with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES must be False, .*got True"):
            decode_image(data)


def test_a_file_that_was_opened_elsewhere_is_read_with_the_same_care(monkeypatch):
    """Pillow reads its pixels late, so a truncated one is noticed by us or by nobody."""
    with pytest.raises(ValueError, match="^picture 1: image file is truncated"):
        load_images([Image.open(io.BytesIO(data)) for data in (JPEG, JPEG[: len(JPEG) // 2])], 32)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES must be False, .*got True"):
        load_images(Image.open(io.BytesIO(JPEG)), 32)
    assert load_images(Image.new("RGB", (40, 40)), 32).shape == (1, 3, 32, 32)


def test_junk_after_the_end_is_ignored():
    result = np.asarray(decode_image(JPEG + b"trailing junk"))
    np.testing.assert_array_equal(result, np.asarray(decode_image(JPEG)))


def test_large_picture_is_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # between one and two times this
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(JPEG).size == (200, 150)


def test_quietness_ends_and_is_safe_with_threads():
    before = list(warnings.filters)
    threads = [threading.Thread(target=decode_image, args=(JPEG,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_missing_file_and_wrong_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        decode_image(tmp_path / "nothing.png")
    with pytest.raises(TypeError, match="got int"):
        decode_image(3)


def test_random_damage_never_raises_anything_else():
    sources = [encoded(gradient(), name) for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM")]
    rng = random.Random(0)
    refused = 0
    for trial in range(3000):
        data = bytearray(sources[trial % len(sources)])
        for _ in range(rng.choice((1, 2, 5, 20))):
            # Mostly in the headers, where damage does more than change a colour.
            at = min(int(rng.expovariate(1 / 60)), len(data) - 1)
            data[at] = rng.randrange(256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert 300 < refused < 2900


def test_load_images_takes_one_or_many_files_or_pillow_images(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    want = load_images([tmp_path / "a.png"], 16)
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, [picture]):
        assert torch.equal(load_images(one, 16), want)
    gray = load_images([picture.convert("L"), tmp_path / "a.png"], 16)
    assert gray.shape == (2, 3, 16, 16) and torch.equal(gray[1:], want)
    with pytest.raises(ValueError, match="picture 0: 32-bit integer pixels have no fixed range"):
        load_images([picture.convert("L").convert("I")], 16)
    with pytest.raises(TypeError, match="must be paths or Pillow images, got int"):
        load_images([3])
