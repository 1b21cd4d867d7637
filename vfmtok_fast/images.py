"""Images in and out: decoding, preprocessing, and conversion back to 8 bits.

The path from a file to the model's input is bit-exact with the authors' training preprocessing, so
that a token depends only on the file and the weights. Pillow is the decoder. Random crops and other
views for caches are in `cache.format.crops`. Source: the release's `center_crop_arr`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, ImageFile, TiffImagePlugin

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# A token cache records these, because another decoder or filter changes tokens.
DECODER = "pillow"
DECODER_VERSION = PIL.__version__
INTERPOLATION = "halve with box, then bicubic to the short side, centre crop (pillow)"

# The formats that Pillow may try. An allow-list, because some of its plugins run other programs
# (EPS starts Ghostscript) and some have no signature (TGA) and would accept noise.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
# HEIF files, which have a separate decoder and so a version of their own.
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
HOW_TO_READ_HEIF = "pip install 'vfmtok-fast[heif]' to read them"

# The most pixels that the bicubic resize may produce. The crop keeps size x size of them, so a long
# thin image (900x2 becomes 151200x336 = 51 megapixels) would cost memory and time for nothing.
# 2**24 pixels take 64 MiB in Pillow (4 bytes each), which decoding a 4096x4096 photo takes anyway.
# At size 336 this admits images up to 148 times as long as wide.
MAX_RESIZED_PIXELS = 1 << 24

# The exceptions that Pillow's open, load and convert raise for a bad file. Its documentation names
# UnidentifiedImageError (an OSError), DecompressionBombError, ValueError and TypeError; damaged
# chunks also surface as SyntaxError (PNG), EOFError (animations), RuntimeError (AVIF), and as
# whatever the bytes broke in a plugin's parser (struct.error, zlib.error, IndexError, KeyError,
# OverflowError). The fuzz test in tests/test_images.py fails on any other type.
_BAD_FILE = (
    OSError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# OSErrors that concern this machine rather than the image.
_NOT_THE_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


def decode_image(source: ImageSource) -> Image.Image:
    """Decode one image to 8-bit RGB, like the authors' loader (`convert("RGB")`).

    EXIF orientation never rotates the image (Pillow itself applies a TIFF's own orientation tag, as
    in the authors' loader). Alpha is dropped, also for palettes. CMYK goes through Pillow's plain
    conversion. Colour profiles are ignored. An animation yields its first frame. 16-bit gray keeps
    the high byte of each value, as Pillow does for 16-bit colour (its own conversion would clip
    16-bit gray to white), and 12-bit gray in a TIFF keeps the high 8 bits. 32-bit integer, signed
    and floating-point pixels have no fixed range and are refused.

    Args:
        source: a path, the file's bytes, or a file opened for binary reading.

    Returns:
        A loaded Pillow image of mode RGB.

    Raises:
        ValueError: not an image, damaged, truncated, a decompression bomb, or pixels without a
            fixed range; one line with the reason (preceded by the path, where one was given).
        OSError: the file cannot be opened (FileNotFoundError and its kin).
        TypeError: `source` is none of the three.
        RuntimeError: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source))
    if isinstance(source, (str, os.PathLike)):
        with open(os.path.expanduser(source), "rb") as file:
            try:
                return _decode(file)
            except ValueError as error:
                raise ValueError(f"{os.fspath(source)}: {error}") from error
    if hasattr(source, "read"):
        return _decode(source)
    raise TypeError(
        f"decode_image: source must be a path, bytes or a binary file, got {type(source).__name__}"
    )


def center_crop(image: Image.Image, size: int = 336) -> np.ndarray:
    """Bring an image to a square: halve with box, bicubic to the short side, crop the centre.

    Args:
        image: Pillow image of mode RGB, any width and height.
        size: side of the square, in pixels.

    Returns:
        uint8 array [size, size, 3]: row, column, (red, green, blue).

    Raises:
        ValueError: the mode is not RGB, `size` is below 1, the image has no pixels, or it is so
            elongated that the resize would produce more than MAX_RESIZED_PIXELS pixels.

    Source: the release's `center_crop_arr`, bit for bit: while the short side is at least twice
    ``size`` it is halved with BOX, then scaled to ``size`` with BICUBIC, and the centre is cropped.
    """
    image = resize_short_side(image, size)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale an image to a short side: halve with box while it is twice as large, then bicubic.

    Args:
        image: Pillow image of mode RGB, any width and height.
        size: the short side to reach, in pixels.

    Returns:
        Pillow image whose shorter side is `size`.

    Raises:
        ValueError: as in `center_crop`.
    """
    if size < 1:
        raise ValueError(f"center_crop: size must be at least 1, got {size}")
    if image.mode != "RGB":
        raise ValueError(
            f"center_crop: image must have mode RGB, got {image.mode}; use decode_image"
        )
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if short == 0:
        raise ValueError(f"picture of {width}x{height} pixels has none to crop")
    if size * round(size * long / short) > max(MAX_RESIZED_PIXELS, size * size):
        raise ValueError(
            f"picture of {width}x{height} pixels is too elongated: its short side scaled to {size} "
            f"gives more than {MAX_RESIZED_PIXELS} pixels"
        )
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    return image.resize(sides, Image.Resampling.BICUBIC)


def to_float(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turn 8-bit images into the model's input: x/255, minus 0.5, divided by 0.5, in float32.

    Args:
        images: uint8 [B, H, W, 3], values 0..255, array or tensor on any device.

    Returns:
        float32 [B, 3, H, W] in [-1, 1], on the device of `images`.

    Raises:
        TypeError: not uint8.
        ValueError: another shape.
    """
    if isinstance(images, np.ndarray):
        # np.asarray of a Pillow image is read-only, about which from_numpy would warn; and it takes
        # no array that runs backwards, such as [..., ::-1] from BGR to RGB.
        images = np.ascontiguousarray(images) if images.flags.writeable else images.copy()
        images = torch.from_numpy(images)
    _check_uint8("to_float", images)
    # The divisors are tensors on purpose: CUDA turns division by a Python number into
    # multiplication by the rounded reciprocal, whose last bit differs for some of the 256 values.
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(planes.new_full((), 255.0)).sub_(0.5).div_(planes.new_full((), 0.5))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Turn the model's images into 8 bits for display: clamp(127.5 x + 128, 0, 255), truncated.

    The inverse of `to_float` on every 8-bit value. Source: how the release writes images.

    Args:
        images: floating point [B, 3, H, W]; [-1, 1] maps to 0..255, values outside are clamped.

    Returns:
        uint8 [B, H, W, 3], on the device of `images`.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, or NaN.
    """
    if not images.is_floating_point():
        raise TypeError(f"to_uint8: images must be floating point, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"to_uint8: images must have shape [B, 3, H, W], got {tuple(images.shape)}"
        )
    if images.isnan().any():
        raise ValueError("to_uint8: images must be numbers, got NaN")
    levels = images.detach().float().mul(127.5).add_(128).clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def load_images(
    pictures: str | os.PathLike | Image.Image | Iterable[str | os.PathLike | Image.Image],
    size: int = 336,
) -> torch.Tensor:
    """Decode, crop and stack images as model input.

    Args:
        pictures: files or Pillow images, at least one; or a single one.
        size: side of the square, in pixels.

    Returns:
        float32 [number of images, 3, size, size] in [-1, 1], on the CPU.

    Raises:
        TypeError: neither a path nor a Pillow image.
        ValueError: no images, or one that `decode_image` or `center_crop` refuses; the message
            starts with its path.
        OSError: a file cannot be opened.
        RuntimeError: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set.
    """
    if isinstance(pictures, str | os.PathLike | Image.Image):
        pictures = [pictures]
    crops = []
    for number, picture in enumerate(pictures):
        if isinstance(picture, Image.Image):
            name = f"picture {number}"
        elif isinstance(picture, str | os.PathLike):
            picture, name = decode_image(picture), os.fspath(picture)
        else:
            raise TypeError(
                "load_images: pictures must be paths or Pillow images, "
                f"got {type(picture).__name__}"
            )
        try:
            # Pillow reads the pixels of a file that was opened elsewhere only now.
            is_open = isinstance(picture, ImageFile.ImageFile)
            image = _decode(picture) if is_open else _to_rgb(picture)
            crops.append(center_crop(image, size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not crops:
        raise ValueError("load_images: pictures must be at least one, got none")
    return to_float(np.stack(crops))


def image_grid(images: np.ndarray | torch.Tensor, columns: int) -> np.ndarray:
    """Lay images out in rows; unused cells of the last row stay white.

    Args:
        images: uint8 [N, H, W, 3], N at least 1.
        columns: images per row, at least 1.

    Returns:
        uint8 array [ceil(N / columns) * H, columns * W, 3].

    Raises:
        TypeError: not uint8.
        ValueError: another shape, no images, or columns below 1.
    """
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images
    _check_uint8("image_grid", array)
    if columns < 1 or len(array) < 1:
        raise ValueError(
            f"image_grid: needs at least one picture and one column, got {len(array)} and {columns}"
        )
    count, height, width, _ = array.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = array
    cells = cells.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, 3)


def _check_uint8(caller: str, images: np.ndarray | torch.Tensor) -> None:
    if images.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"{caller}: images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{caller}: images must have shape [B, H, W, 3], got {tuple(images.shape)}"
        )


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_stack = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings (large image, odd EXIF, palette alpha) off the user's terminal.

    `warnings.catch_warnings` belongs to the process, not to a thread. Two decoding threads that
    leave it in another order than they entered it would restore the wrong filters. So only the
    first thread in enters it, and only the last one out leaves it.

    Raises:
        RuntimeError: the process lets Pillow fill truncated images up.
    """
    global _quiet_depth
    # Refused instead of switched off: the flag is global, and other threads may need it.
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be False, or truncated images count as whole "
            "ones, got True; set it to False where this process sets it"
        )
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_stack.close()


# Around the try block, because an error of quiet_pillow is not the fault of the file.
@quiet_pillow()
def _decode(file: BinaryIO | ImageFile.ImageFile) -> Image.Image:
    try:
        if isinstance(file, Image.Image):
            try:
                return _to_rgb(file)
            except AssertionError as error:  # What Pillow raises if its file is gone.
                raise ValueError(
                    "its file was closed before its pixels were read; call load() before that"
                ) from error
        with Image.open(file, formats=_available_formats()) as image:
            return _to_rgb(image)
    except PIL.UnidentifiedImageError as error:
        # Pillow's own text contains the address of the file object, which differs every time.
        raise ValueError(_why_unknown(file)) from error
    except _BAD_FILE as error:
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            raise
        raise ValueError(_one_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow opens 16-bit PNG and PPM as mode I in some versions; no other file of these
    # formats gets that mode, so the range is known to be 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits, inverted = _check_tiff(image) if image.format == "TIFF" else (16, False)
        high = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - high if inverted else high).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no fixed range; save the picture as 8 or 16 bit")
    if image.format == "TIFF":
        _check_tiff(image)
    # load first: convert on an RGB file would return the file object still open.
    image.load()
    return image.convert("RGB")


def reads_heif() -> bool:
    """Whether the package that reads the images of iPhones is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def heif_version() -> str | None:
    """Return the version of that package, as a token cache records it; None without it."""
    return importlib.import_module("pillow_heif").__version__ if reads_heif() else None


def _check_tiff(image: Image.Image) -> tuple[int, bool]:
    """Return the bits of a TIFF's gray pixels, and whether 0 is white where Pillow ignores that.

    Pillow leaves 12-bit values unscaled in its 16-bit mode, and reads 16-bit values where 0 is
    white as if 0 were black; the caller corrects both. What it would misread is refused here.

    Raises:
        ValueError: signed pixels, or 16-bit colours in separate uncompressed planes.
    """
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    if any(kind == 2 for kind in image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))):
        raise ValueError("signed pixels have no fixed range; save the picture as 8 or 16 bit")
    separate = image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    if separate and len(bits) > 1 and max(bits) > 8 and image.tile[0][0] == "raw":
        raise ValueError(
            "uncompressed 16-bit colours in planes of their own cannot be read; save the picture "
            "with interleaved colours, or as 8 bit"
        )
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return max(bits), white_is_zero


def _why_unknown(file: BinaryIO) -> str:
    """Say why no decoder accepted a file, as far as its first bytes tell."""
    try:
        file.seek(0)
        start = file.read(12)
    except (AttributeError, OSError):  # A stream, already read to its end.
        start = b""
    heif = start[4:8] == b"ftyp" and start[8:] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    if heif and not reads_heif():
        return f"HEIC and HEIF files: {HOW_TO_READ_HEIF}"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF that is damaged, or of a kind that cannot be read; save it as 8-bit RGB"
    return "not a picture in a format that can be read"


def _available_formats() -> list[str]:
    # AVIF, WEBP and JPEG2000 depend on how Pillow was built; an unknown name would be a KeyError.
    Image.init()
    if "HEIF" not in Image.OPEN and reads_heif():
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _one_line(error: Exception) -> str:
    text = re.sub(r"0x[0-9a-fA-F]+", "0x..", " ".join(str(error).split()))
    return text[:200] or f"damaged picture ({type(error).__name__})"
