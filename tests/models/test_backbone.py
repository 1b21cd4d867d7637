"""Any other timm ViT can be the foundation model; unsuitable ones raise a one-line error."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file

import vfmtok_fast
from vfmtok_fast import BackboneConfig, VFMTok, VFMTokConfig
from vfmtok_fast.checkpoint import TOKENIZER_NAMES, official_name
from vfmtok_fast.cpu.linear import BFLOAT16
from vfmtok_fast.tokenizer.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from vfmtok_fast.tokenizer.vit import is_plain, read

# timm's smallest ViT, made for tests: six blocks of width 64, patches of 16.
TINY = BackboneConfig(timm_name="test_vit", timm_image_size=384)


@pytest.fixture
def config(tiny: VFMTokConfig) -> VFMTokConfig:
    return dataclasses.replace(tiny, backbone=TINY)


def pictures(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 336, 336, generator=torch.Generator().manual_seed(0)) * 2 - 1


def expected_maps(backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
    """Return block outputs caught by hooks, and the full forward for the normalised last map."""
    cfg = backbone.vit.pretrained_cfg
    x = (images + 1) / 2
    if backbone.image_size != images.shape[-1]:
        size = (backbone.image_size,) * 2
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        for block in backbone.vit.blocks
    ]
    with torch.no_grad():
        last = backbone.vit.forward_features(x)
    for hook in hooks:
        hook.remove()
    maps = [outputs[level] for level in backbone.levels[:-1]] + [last]
    return [level[:, backbone.vit.num_prefix_tokens :] for level in maps]


@pytest.mark.parametrize(
    ("name", "size", "levels", "mean"),
    [
        ("test_vit", 384, (0, 2, 3, 5), (0.5,) * 3),
        ("vit_tiny_patch16_384", None, (2, 5, 8, 11), (0.5,) * 3),
        ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", None, (2, 5, 8, 11), (0.5,) * 3),
        ("vit_small_patch14_reg4_dinov2", 336, (2, 5, 8, 11), IMAGENET_MEAN),
        ("vit_small_patch16_dinov3", None, (2, 5, 8, 11), IMAGENET_MEAN),
        ("eva02_tiny_patch14_336", None, (2, 5, 8, 11), (0.48145466, 0.4578275, 0.40821073)),
        pytest.param(
            *("vit_base_patch16_siglip_384.v2_webli", None, (2, 5, 8, 11), (0.5,) * 3),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_timm_models(name: str, size: int | None, levels: tuple, mean: tuple):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(timm_name=name, timm_image_size=size), grid=24)
    assert backbone.levels == levels
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(mean), atol=1e-6, rtol=0)
    maps = backbone(pictures())
    expected = expected_maps(backbone, pictures())
    assert len(maps) == 4 and all(m.shape == (1, 576, backbone.dim) for m in maps)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # The last operation was a LayerNorm with its initial weights.
    torch.testing.assert_close(maps[-1].mean(-1), torch.zeros(1, 576), atol=1e-4, rtol=0)


def test_dinov2_maps():
    """The built-in backbone uses ImageNet statistics and block outputs, the last one normalised."""
    config = BackboneConfig(dim=32, depth=6, num_heads=2, levels=(1, 2, 4, 5))
    backbone = Backbone(config, grid=24)
    backbone.vit.pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for ours, theirs in zip(backbone(pictures()), expected_maps(backbone, pictures()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert backbone.vit.blocks[0].norm1.eps == backbone.vit.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("test_vit", True),
        ("vit_tiny_patch16_384", True),
        ("vit_small_patch14_reg4_dinov2", True),
        ("vit_base_patch16_siglip_384.v2_webli", True),
        # SwiGLU, rotary positions, another activation, parallel blocks, post-norm blocks.
        ("vit_giant_patch14_reg4_dinov2", False),
        ("vit_small_patch16_dinov3", False),
        ("eva02_tiny_patch14_336", False),
        ("vit_base_patch16_clip_quickgelu_224", False),
        ("vit_small_patch16_36x1_224", True),
        ("vit_small_patch16_18x2_224", False),
        ("vit_base_patch16_rpn_224", False),
    ],
)
def test_which_are_plain(name: str, plain: bool):
    with torch.device("meta"):
        assert is_plain(timm.create_model(name, num_classes=0, global_pool="")) == plain


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"init_values": 1e-5, "reg_tokens": 4}])
@pytest.mark.parametrize("levels", [(0, 1, 2), (0, 2, 3)])
def test_plain_maps_are_timms_bit_for_bit(options: dict, levels: tuple[int, ...]):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    vit = timm.models.VisionTransformer(**shape, **options, num_classes=0, global_pool="").eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        images = torch.randn(2, 3, 32, 32)
        last, want = vit.forward_intermediates(
            images, indices=list(levels), norm=False, output_fmt="NLC"
        )
        if levels[-1] == 3:
            want[-1] = last[:, vit.num_prefix_tokens :]
        assert is_plain(vit)
        got = read(vit, vit.patch_embed(images), levels)
    assert len(got) == len(want) and all(map(torch.equal, got, want))


def test_a_wide_stream_is_only_a_matter_of_the_weights():
    """With bfloat16 products, a float32 stream and norms are closer than all in bfloat16."""
    config = BackboneConfig(dim=32, depth=4, num_heads=2, levels=(1, 3))
    torch.manual_seed(0)
    backbone = Backbone(config, grid=8)
    images = pictures()[..., :112, :112]
    truth = backbone(images)
    mixed, narrow = (copy.deepcopy(backbone) for _ in range(2))
    for module in mixed.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.bfloat16()
    narrow = narrow.bfloat16()(images.bfloat16())
    for enabled in ((), ["add_norm", "linear"]):
        # Not every processor has bfloat16 instructions.
        with vfmtok_fast.enable(enabled, strict=BFLOAT16):
            maps = mixed(images)
        for got, want, worse in zip(maps, truth, narrow, strict=True):
            assert got.dtype == torch.float32 and worse.dtype == torch.bfloat16
            assert (got - want).norm() < (worse - want).norm()


def test_a_tokenizer_on_a_timm_model(tmp_path: Path, config: VFMTokConfig):
    model = VFMTok(config).train()
    output = model(pictures(2))
    assert output.features.shape == output.semantic.shape == (2, 576, 64)
    assert output.reconstruction.shape == (2, 3, 336, 336)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.save_pretrained(tmp_path)
    loaded = VFMTok.from_pretrained(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.encode(pictures()), model.eval().encode(pictures()))


def test_levels_of_ones_own():
    backbone = Backbone(dataclasses.replace(TINY, levels=(1, 3)), grid=24)
    maps = backbone(pictures())
    assert backbone.levels == (1, 3) and len(maps) == 2
    assert maps[1].mean(-1).abs().max() > 1e-3, "an inner level must not be normalised"


def test_another_grid(config: VFMTokConfig):
    smaller = dataclasses.replace(
        config, image_size=224, backbone=dataclasses.replace(TINY, timm_image_size=256)
    )
    assert VFMTok(smaller).encode(pictures()[..., :224, :224]).shape == (1, 256)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "vit_base_patch16_224",
            224,
            "serves 24x24 feature maps.*gives 14x14.*timm_image_size=384",
        ),
        ("vit_small_patch14_dinov2", 384, "gives 27x27 .*choose timm_image_size=336"),
        ("vit_tiny_r_s16_p8_384", 384, "gives 12x12 .*choose timm_image_size=768"),
        ("vit_bananas", None, "has no model 'vit_bananas'"),
        ("vit_tiny_patch17_384", None, "has no model .*, such as .*384"),
        ("vit_tiny_patch16_384.nonsense", None, "Invalid pretrained tag"),
        ("resnet50", None, "plain ViT with square 2-D maps, got 'resnet50', which lacks blocks"),
        ("resnet50", 384, "plain ViT with square 2-D maps, got 'resnet50'"),
        ("convnext_atto", None, "plain ViT .*, got 'convnext_atto'"),
        ("swin_tiny_patch4_window7_224", None, "plain ViT .*, got 'swin_tiny_patch4_window7_224'"),
        ("crossvit_9_240", None, "plain ViT .*, got 'crossvit_9_240'"),
        ("xcit_nano_12_p8_224", None, "plain ViT .*, got 'xcit_nano_12_p8_224'"),
        ("test_vit", 0, "positive image size"),
    ],
)
def test_refused_models(name: str, size: int | None, message: str):
    with pytest.raises(ValueError, match=message) as error:
        Backbone(BackboneConfig(timm_name=name, timm_image_size=size), grid=24)
    assert str(error.value).startswith("BackboneConfig: ") and "\n" not in str(error.value)


def test_levels_beyond_the_depth():
    config = dataclasses.replace(TINY, levels=(1, 6))
    with pytest.raises(ValueError, match=r"below test_vit's depth 6, got \(1, 6\)"):
        Backbone(config, grid=24)


@pytest.fixture
def files(config: VFMTokConfig) -> tuple[dict, dict]:
    """A tokenizer in the authors' naming, and timm's own file with its classifier."""
    torch.manual_seed(0)
    state = {k: v for k, v in VFMTok(config).state_dict().items() if k[:9] != "backbone."}
    theirs = {official_name(key, TOKENIZER_NAMES): v.clone() for key, v in state.items()}
    return theirs, timm.create_model("test_vit", img_size=384).state_dict()


def test_weights_of_a_timm_model(files: tuple[dict, dict], tmp_path: Path, config: VFMTokConfig):
    tokenizer, vit = files
    save_file(vit, tmp_path / "model.safetensors")
    for source in (vit, tmp_path / "model.safetensors"):
        loaded = VFMTok.from_official(tokenizer, source, config).backbone.vit.state_dict()
        assert all(torch.equal(value, vit[key]) for key, value in loaded.items())
        assert set(vit) - set(loaded) == {"head.weight", "head.bias"}
    # The published table has another size, so timm resizes it.
    published = timm.create_model("test_vit").state_dict()
    table = VFMTok.from_official(tokenizer, published, config).backbone.vit.pos_embed
    assert table.shape == vit["pos_embed"].shape


def test_weights_that_do_not_fit_a_timm_model(files: tuple[dict, dict], config: VFMTokConfig):
    tokenizer, vit = files
    for changes, message in (
        ({"norm.bias": None, "x": torch.zeros(1)}, "missing norm.bias; unknown x"),
        ({"norm.bias": torch.full((64,), float("nan"))}, "NaN or infinity in norm.bias"),
        ({"pos_embed": torch.zeros(3)}, "backbone does not fit test_vit|misshapen pos_embed"),
        ({"patch_embed.proj.weight": torch.zeros(2)}, "backbone does not fit"),
    ):
        bad = {k: v for k, v in (vit | changes).items() if v is not None}
        with pytest.raises(ValueError, match=message) as error:
            VFMTok.from_official(tokenizer, bad, config)
        assert "\n" not in str(error.value)


def test_offline_the_error_names_the_model_and_the_flag(
    files: tuple[dict, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: VFMTokConfig
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="test_vit.*model.safetensors.*--backbone") as error:
        VFMTok.from_official(files[0], config=config)
    assert "\n" not in str(error.value)
