"""Discriminators against the authors' logits, and the parts that are our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast.training import DinoDiscriminator, PatchDiscriminator
from vfmtok_fast.training.discriminator import GroupedBatchNorm


@pytest.fixture(scope="module")
def vit(dino_weights) -> dict[str, Tensor]:
    return dino_weights[0]


def without_dino() -> DinoDiscriminator:
    """Return a discriminator without ViT blocks, for tests of the heads or the input."""
    model = DinoDiscriminator()
    model.vit.blocks = model.vit.blocks[:0]
    model.read = lambda images: [model.vit.patch_embed(images).transpose(1, 2)] * 5
    return model


def test_maps_and_logits_are_the_authors(golden, dino_weights, golden_images: Tensor):
    case, model = golden("train_tokenizer_small"), DinoDiscriminator.from_files(*dino_weights)
    model.crop = 0
    model.train()
    with torch.no_grad():
        maps = model.read(model._fitted(golden_images * model.scale + model.shift))
        logits = model(golden_images)[:, ::4]
    for number, found in enumerate(maps):
        expected = case[f"disc_map{number}"]
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[:, ::16, ::7], expected, atol=1e-5 * scale, rtol=0)
    error, expected = (logits - case["disc_logits"]).norm(), case["disc_logits"].norm()
    assert float(error / expected) < 3e-6  # rounding gave 1e-6, the exact GELU gives 1.5e-4


def test_only_heads_are_trained(vit: dict[str, Tensor]):
    model = DinoDiscriminator.from_files(vit)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("heads.") for name in trained)
    # The number in the authors' file.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_386_245
    assert all(not block.attn.qkv.bias[384:768].any() for block in model.vit.blocks)


def test_files_and_what_does_not_fit(vit: dict[str, Tensor], dino_weights, tmp_path: Path):
    torch.save({"discriminator": dino_weights[1]}, tmp_path / "theirs.pt")
    model = DinoDiscriminator.from_files(vit, tmp_path / "theirs.pt")
    for name, value in model.heads.state_dict().items():
        assert torch.equal(value, dino_weights[1][f"heads.{name}"]), name
    other = {**vit, "head.weight": torch.zeros(2)}
    del other["blocks.3.norm1.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.3\.norm1\.bias; unknown head\.weight"):
        DinoDiscriminator.from_files(other)
    with pytest.raises(ValueError, match=r"heads does not fit the model: missing 0\.0\.0\.bias"):
        DinoDiscriminator.from_files(vit, vit)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 11, 16, 17])
def test_norm_takes_any_number_of_pictures(count: int):
    torch.manual_seed(0)
    norm = GroupedBatchNorm(3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(count, 3, 5) * 4 + 2
    groups, start = -(-count // 8), 0
    sizes = [count // groups + (number < count % groups) for number in range(groups)]
    got = norm(x)
    for size in sizes:
        part = slice(start, start + size)
        expected = F.batch_norm(x[part], None, None, norm.weight, norm.bias, True, eps=1e-6)
        torch.testing.assert_close(got[part], expected)
        start += size
    assert start == count and max(sizes) <= 8


def test_convolutions_go_round():
    model = without_dino().eval()
    x = torch.randn(2, 384, 196)
    for head in model.heads:
        with torch.no_grad():
            turned = head(x.roll(3, -1)), head(x).roll(3, -1)
        torch.testing.assert_close(*turned, atol=1e-5 * float(turned[1].abs().max()), rtol=0)


def test_a_call_in_training_is_one_power_iteration():
    torch.manual_seed(0)
    model = without_dino().train()
    convolution = model.heads[0][0][0]
    u = convolution.weight_u.clone()
    weight = convolution.weight_orig.detach().flatten(1)
    model(torch.rand(1, 3, 224, 224))
    v = F.normalize(weight.T @ u, dim=0, eps=1e-12)
    expected = F.normalize(weight @ v, dim=0, eps=1e-12)
    torch.testing.assert_close(convolution.weight_u, expected)
    u = convolution.weight_u.clone()
    model.eval()(torch.rand(1, 3, 224, 224))
    assert torch.equal(convolution.weight_u, u)


def test_input_is_resized_or_cropped_as_the_seed_says():
    model = without_dino().train()
    # The value of each pixel encodes its position.
    images = torch.arange(300.0 * 300).view(1, 1, 300, 300).expand(2, 3, -1, -1)
    resized = F.interpolate(images, size=224, mode="area")
    torch.testing.assert_close(model.eval()._fitted(images), resized)
    resized = model._fitted(images)
    model.train()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model._fitted(images)

    drawn = [draw(seed) for seed in range(60)]
    assert all(torch.equal(draw(seed), drawn[seed]) for seed in range(5))
    crops = [x for x in drawn if not torch.equal(x, resized)]
    assert 15 <= len(crops) <= 45
    places = {divmod(int(x[0, 0, 0, 0]), 300) for x in crops}
    assert len(places) > 10
    for crop in crops:  # the same square of all images
        top, left = divmod(int(crop[0, 0, 0, 0]), 300)
        assert torch.equal(crop, images[..., top : top + 224, left : left + 224])
    small = torch.rand(1, 3, 112, 112)
    assert model._fitted(small).shape == (1, 3, 224, 224)


def test_heads_are_float32_under_autocast(vit: dict[str, Tensor]):
    model = DinoDiscriminator.from_files(vit).eval()
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.float32
    exact = model(images).detach()
    assert float((logits - exact).norm() / exact.norm()) < 0.2


def test_patch_discriminator():
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8)
    images = torch.rand(3, 3, 112, 112, requires_grad=True)
    logits = model(images)
    assert logits.shape == (3, 12 * 12)
    # One logit in the middle sees 70 pixels.
    (seen,) = torch.autograd.grad(PatchDiscriminator(8).eval()(images)[0, 6 * 12 + 6], images)
    rows = seen[0].abs().sum(dim=(0, 2)).nonzero()
    assert len(rows) >= 70
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
