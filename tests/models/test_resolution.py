"""Backbones of any patch size and images of any size: reading, decoding, caching and errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from vfmtok_fast import BackboneConfig, VFMTok, VFMTokConfig, cache, images
from vfmtok_fast.cache.format import fingerprint
from vfmtok_fast.checkpoint import TOKENIZER_NAMES, official_name
from vfmtok_fast.tokenizer.backbone import Backbone
from vfmtok_fast.visualize import reconstruction_grid, spread_regions

# timm's smallest ViT, made for tests: six blocks of width 64, patches of 16, 160 pixels.
TINY = BackboneConfig(timm_name="test_vit")
OWN = BackboneConfig(dim=32, depth=2, num_heads=2, levels=(0, 1))


def pictures(size: int, count: int = 1) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def check_all(config: VFMTokConfig, reads: int) -> VFMTok:
    """Run training, encode and decode; the backbone must read ``reads`` pixels per side."""
    torch.manual_seed(0)
    model = VFMTok(config)
    assert model.backbone.image_size == reads
    seen, vit = [], model.backbone.vit
    hook = vit.norm_pre.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1] - vit.num_prefix_tokens)
    )
    size, patches = config.image_size, config.feature_grid**2
    images = pictures(size)
    output = model.train()(images)
    assert seen == [patches]
    hook.remove()
    assert output.reconstruction.shape == images.shape
    assert output.semantic.shape == output.features.shape == (1, patches, model.backbone.dim)
    far = 1 - F.cosine_similarity(output.semantic, output.features, dim=-1).mean()
    loss = F.mse_loss(output.reconstruction, images) + far
    (loss + output.codebook_loss + output.commit_loss).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.eval()
    codes = model.encode(images)
    assert codes.shape == (1, config.num_regions) and torch.equal(codes, output.codes)
    queries, features = model.encode_regions(images)
    assert queries.shape == (1, config.num_regions, config.codebook_dim)
    torch.testing.assert_close(features, output.features)
    assert model.decode(codes).shape == images.shape
    assert model.decode_to_uint8(codes, size=24).shape == (1, 24, 24, 3)
    return model


@pytest.mark.parametrize(
    ("size", "grid", "regions", "backbone", "reads"),
    [
        (336, None, 256, OWN, 336),
        (256, 16, 256, OWN, 224),
        (336, 16, 64, OWN, 224),
        (224, 24, 576, OWN, 336),
        (112, None, 49, dataclasses.replace(OWN, patch_size=16), 128),
        (256, 16, 256, TINY, 256),
        (336, 24, 144, TINY, 384),
        (160, 10, 1, TINY, 160),
        pytest.param(512, 32, 256, TINY, 512, marks=pytest.mark.slow),
        # For any timm name, the grid determines the size.
        (64, 5, 16, BackboneConfig(timm_name="vit_tiny_patch16_384"), 80),
        (64, 2, 16, BackboneConfig(timm_name="vit_tiny_r_s16_p8_384"), 64),
        (64, 5, 16, BackboneConfig(timm_name="eva02_tiny_patch14_336"), 70),
    ],
)
def test_sizes(tiny: VFMTokConfig, size, grid, regions, backbone, reads):
    check_all(
        dataclasses.replace(
            tiny, image_size=size, grid=grid, num_regions=regions, backbone=backbone
        ),
        reads,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "grid", "reads", "levels"),
    [
        ("vit_base_patch16_siglip_256.v2_webli", 256, 16, 256, (2, 5, 8, 11)),
        ("vit_base_patch16_dinov3", 256, 16, 256, (2, 5, 8, 11)),
        ("vit_small_patch16_dinov3", 336, 24, 384, (2, 5, 8, 11)),
        ("vit_base_patch14_dinov2", 256, 16, 224, (2, 5, 8, 11)),
        ("vit_small_patch14_reg4_dinov2", 336, 24, 336, (2, 5, 8, 11)),
    ],
)
def test_published_models(tiny: VFMTokConfig, name, size, grid, reads, levels):
    backbone = BackboneConfig(timm_name=name)
    config = dataclasses.replace(tiny, image_size=size, grid=grid, backbone=backbone)
    model = check_all(config, reads)
    assert model.backbone.levels == levels


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_336", "vit_small_patch16_dinov3"])
def test_the_grid_makes_the_model_that_its_size_makes(name: str):
    """With the same weights the maps are the same, rotary tables included."""
    by_grid = Backbone(BackboneConfig(timm_name=name), grid=5)
    size = by_grid.image_size
    by_size = Backbone(BackboneConfig(timm_name=name, timm_image_size=size), grid=5)
    by_size.load_state_dict(by_grid.state_dict())
    for ours, theirs in zip(by_grid(pictures(64)), by_size(pictures(64)), strict=True):
        assert torch.equal(ours, theirs)


def test_the_backbone_sees_the_images_resized_and_nothing_else_does(tiny: VFMTokConfig):
    config = dataclasses.replace(tiny, image_size=256, grid=16)
    torch.manual_seed(0)
    model = VFMTok(config).eval()
    images = pictures(256)
    resized = F.interpolate((images + 1) / 2, size=224, mode="bicubic", antialias=True)
    expected = model.backbone(resized.clamp(0, 1) * 2 - 1)
    for ours, theirs in zip(model.backbone(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    grid = reconstruction_grid(model, images, num_regions=3)
    assert grid.shape == (256, 3 * 256, 3)
    for wrong in (224, 336):
        with pytest.raises(ValueError, match=rf"shape \[B, 3, 256, 256\], got \(1, 3, {wrong}"):
            model.encode(pictures(wrong))


def test_as_many_regions_are_drawn_as_are_asked_for():
    for total in (64, 256):
        for num in range(1, total + 1):
            chosen = spread_regions(total, num)
            assert len(set(chosen)) == num and 0 <= min(chosen) and max(chosen) < total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_resizing_in_other_dtypes(tiny: VFMTokConfig, dtype: torch.dtype):
    """torch does not antialias half precision on a CPU."""
    torch.manual_seed(0)
    model = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    images = pictures(64)
    expected = model.backbone(images)[-1]
    got = model.to(dtype).backbone(images.to(dtype))[-1]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


def test_defaults_are_todays_model():
    config = VFMTokConfig()
    assert (config.grid, config.feature_grid, config.pixel_grid) == (None, 24, 21)
    assert VFMTokConfig(grid=24).feature_grid == 24
    assert VFMTokConfig(image_size=224).feature_grid == 16
    # Positional arguments and a config.json older than the field must keep their meaning.
    old = {k: v for k, v in dataclasses.asdict(config).items() if k != "grid"}
    assert VFMTokConfig(*old.values()) == VFMTokConfig(**old) == config


def test_the_grid_is_saved(tmp_path: Path, tiny: VFMTokConfig):
    config = dataclasses.replace(tiny, image_size=64, grid=4, backbone=TINY)
    torch.manual_seed(0)
    model = VFMTok(config).eval()
    model.save_pretrained(tmp_path)
    loaded = VFMTok.from_pretrained(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.encode(pictures(64)), model.encode(pictures(64)))
    # A folder older than the field.
    torch.manual_seed(0)
    VFMTok(tiny).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["grid"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert VFMTok.from_pretrained(tmp_path).config == tiny


@pytest.mark.parametrize(
    ("name", "grid"), [("vit_small_patch16_dinov3", 4), ("vit_small_patch14_reg4_dinov2", 4)]
)
def test_published_weights_fit_any_grid(tiny: VFMTokConfig, name: str, grid: int):
    backbone = BackboneConfig(timm_name=name)
    config = dataclasses.replace(tiny, image_size=64, grid=grid, backbone=backbone)
    own = {k: v for k, v in VFMTok(config).state_dict().items() if k[:9] != "backbone."}
    tokenizer = {official_name(k, TOKENIZER_NAMES): v for k, v in own.items()}
    published = timm.create_model(name).state_dict()
    loaded = VFMTok.from_official(tokenizer, published, config).backbone
    assert torch.equal(loaded.vit.blocks[3].mlp.fc2.weight, published["blocks.3.mlp.fc2.weight"])
    assert loaded(pictures(64))[0].shape == (1, grid**2, 384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 300, "grid": 20}, "must be a multiple of 16 .*, got 300"),
        ({"image_size": 512}, r"image_size 512 is not a multiple of 14 and needs grid"),
        ({"image_size": 256, "grid": 0}, "grid must be an integer of at least 1, got 0"),
        ({"image_size": 256, "grid": 16.0}, "grid must be an integer of at least 1, got 16.0"),
        ({"image_size": 256, "grid": True}, "grid must be an integer of at least 1, got True"),
        ({"image_size": 256, "grid": 16, "num_regions": 200}, "must be a square number, got 200"),
        (
            {"grid": 16, "backbone": dataclasses.replace(TINY, timm_image_size=384)},
            "serves 16x16 feature maps, but test_vit gives 24x24 from 384x384 pixels; choose "
            "timm_image_size=256, another grid or another model",
        ),
    ],
)
def test_refused_sizes(tiny: VFMTokConfig, changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        VFMTok(dataclasses.asdict(tiny) | changes)
    assert "\n" not in str(error.value)


def test_a_cache(tmp_path: Path, tiny: VFMTokConfig):
    """Views are cut at the size that `encode` takes and shown at the size that `decode` returns."""
    config = dataclasses.replace(tiny, image_size=32, grid=3, num_regions=9)
    torch.manual_seed(0)
    model = VFMTok(config).eval()
    assert model.backbone.image_size == 42
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "in" / "a" / f"{number}.png")
    out = tmp_path / "out"
    views = ("center", "center-flip", "ten-crop", "random-0")
    cache.build(tmp_path / "in", out, model, views=views, batch_size=4, workers=1)
    report = cache.verify(out, model, tmp_path / "in", sheet=tmp_path / "sheet.png")
    assert report.ok and report.agreement == 1.0 and report.sampled
    assert Image.open(tmp_path / "sheet.png").size[0] % 32 == 0
    tokens, _ = cache.TokenCache(out, view="center-flip")[1]
    image = Image.open(tmp_path / "in" / "a" / "1.png")
    crop = images.center_crop(image, 32)[:, ::-1].copy()
    crop = torch.from_numpy(crop).permute(2, 0, 1)[None] / 127.5 - 1
    same = (model.encode(crop)[0] == torch.as_tensor(np.asarray(tokens, np.int64))).float().mean()
    assert same > 0.8  # in another batch, codes that are nearly tied may differ
    small = model.decode_to_uint8(torch.as_tensor(np.asarray(tokens, np.int64))[None], size=48)
    assert small.shape == (1, 48, 48, 3)
    other = VFMTok(dataclasses.replace(config, grid=4)).eval()
    with pytest.raises(FileExistsError, match=r"config.grid \(there 3, here 4\)"):
        cache.build(tmp_path / "in", out, other, views=views, batch_size=4, workers=1)


def test_caches_from_before_the_field_go_on(tiny: VFMTokConfig):
    """Their fingerprint covers the config, so an unused option must not be in it."""
    covers = fingerprint.describe(VFMTok(tiny), ["center"], 4)
    before = json.loads(json.dumps(dataclasses.asdict(tiny)))
    del before["grid"]
    assert covers["config"] == before
