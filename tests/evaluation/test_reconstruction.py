"""Images against their reconstructions, and which images are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmtok_fast import VFMTok, images
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.evaluation import (
    PROTOCOLS,
    evaluate_reconstruction,
    frechet_distance,
    psnr,
    ssim,
)
from vfmtok_fast.evaluation.features import Activations
from vfmtok_fast.evaluation.pictures import Pictures, compared
from vfmtok_fast.evaluation.reconstruction import _Sums

VFMTOK = PROTOCOLS["reconstruction-vfmtok"]


def test_figures_are_those_of_the_pictures(tokenizer: VFMTok, photos: Path, inception):
    """Figures match the authors' steps: crop, encode, decode, 8 bits, Pillow's bicubic."""
    protocol = VFMTOK.changed(num=10, size=48)
    result = evaluate_reconstruction(
        tokenizer, open_source(photos), protocol, inception, batch_size=4,
        lpips=lambda x, y: (x - y).abs().mean((1, 2, 3)),
    )  # fmt: skip
    crops = images.load_images(sorted(photos.rglob("*.png")), 64)
    codes = tokenizer.encode(crops)
    small = [
        np.stack([np.asarray(Image.fromarray(x).resize((48, 48), Image.BICUBIC)) for x in some])
        for some in (
            images.to_uint8(crops).numpy(),
            images.to_uint8(tokenizer.decode(codes)).numpy(),
        )
    ]
    found = result["metrics"]
    assert found["PSNR"] == pytest.approx(float(psnr(*small).mean()), rel=1e-4)
    assert found["SSIM, range 1.0"] == pytest.approx(float(ssim(*small).mean()), rel=1e-3)
    assert found["SSIM, range 2.0"] == pytest.approx(float(ssim(*small, 2.0).mean()), rel=1e-3)
    assert found["codebook usage"] == len(codes.unique()) / 256
    real, made = Activations(inception), Activations(inception)
    real.add(small[0])
    made.add(small[1])
    expected = frechet_distance(*(x.moments["pool"].statistics() for x in (made, real)))
    assert found["rFID"] == pytest.approx(expected, rel=1e-3) and found["rIS"] >= 1
    assert found["LPIPS"] > 0
    assert result["compared"]["sha256"] == real.sha256 and result["compared"]["pictures"] == 10
    assert result["protocol"]["name"] == "reconstruction-vfmtok, num=10, size=48"


def test_resize_rules(tokenizer: VFMTok):
    codes = torch.arange(32).view(2, 16)
    decoded = tokenizer.decode(codes)
    torch_rule = compared(decoded, 24, "torch")
    assert np.array_equal(torch_rule, tokenizer.decode_to_uint8(codes, 24).numpy())
    assert not np.array_equal(torch_rule, compared(decoded, 24, "pillow"))
    assert np.array_equal(compared(decoded, 64, "pillow"), images.to_uint8(decoded).numpy())


def test_crops_and_raw_pictures_are_two_protocols(tokenizer, photos: Path, tmp_path: Path):
    for path in photos.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((48, 48)).save(tmp_path / path.name)
    raw, crops = open_source(photos), open_source(tmp_path)
    of_crops = PROTOCOLS["reconstruction-crops"].changed(num=10, size=48)
    result = evaluate_reconstruction(tokenizer, crops, of_crops)
    assert "rFID" not in result["metrics"] and result["inception"] is None
    kept = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())])
    assert result["compared"]["sha256"] == hashlib.sha256(kept).hexdigest()
    with pytest.raises(ValueError, match="takes crops of 48x48; raw pictures need --protocol"):
        evaluate_reconstruction(tokenizer, raw, of_crops)
    with pytest.raises(ValueError, match="--size must be at least 16, which LPIPS needs, got 15"):
        evaluate_reconstruction(tokenizer, raw, VFMTOK.changed(num=10, size=15), lpips=torch.dist)
    with pytest.raises(ValueError, match="48x48 crops already.*reconstruction-crops takes them"):
        evaluate_reconstruction(tokenizer, crops, VFMTOK.changed(num=10, size=48))


def test_which_pictures(photos: Path, tmp_path: Path):
    source = open_source(photos)
    labels = [batch.labels for batch in Pictures(source, 64, num=4).batches(3)]
    # The images are evenly spaced, so both classes occur.
    assert np.concatenate(labels).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="11 pictures were asked for, it holds 10; --num 10"):
        Pictures(source, 64, num=11)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (70, 80)).save(tmp_path / "black.png")
    some = Pictures(open_source(tmp_path), 64)
    assert [len(batch.squares) for batch in some.batches(2)] == [1] and [*some.bad] == [
        "broken.png"
    ]
    with pytest.raises(ValueError, match=r"2 pictures have no label, such as 'black.png'"):
        Pictures(open_source(tmp_path), 64, labelled=True)


def test_equal_pictures_are_counted_and_not_in_the_mean(tokenizer: VFMTok):
    sums = _Sums(VFMTOK, tokenizer, None, None)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    made = pictures.copy()
    made[1:] //= 2
    sums.add(pictures, made, torch.zeros(3, 4, dtype=torch.int64))
    expected = float(psnr(pictures[1:], made[1:]).double().mean())
    assert sums.equal == 1 and sums.metrics()["PSNR"] == pytest.approx(expected)
