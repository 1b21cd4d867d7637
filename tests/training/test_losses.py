"""Losses against their written-out formulas, and LPIPS against the authors' numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast.training import LPIPS, losses

LOGITS = torch.tensor([-30.0, -1.5, 0.0, 0.4, 2.0, 40.0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -20 else x


def test_generator_losses():
    values = LOGITS.tolist()
    expected = {
        "softplus": sum(-log_sigmoid(x) for x in values) / 6,
        "hinge": sum(-x for x in values) / 6,
        # log(1 - sigmoid(x)) = log sigmoid(-x)
        "vanilla": sum(log_sigmoid(-x) for x in values) / 6,
    }
    expected["non-saturating"] = expected["softplus"]
    assert expected.keys() == losses.GENERATOR.keys()
    for name, value in expected.items():
        assert float(losses.GENERATOR[name](LOGITS)) == pytest.approx(value, rel=1e-6), name


def test_discriminator_losses():
    real, fake = LOGITS, LOGITS.flip(0) * 0.5
    values = {"real": real.tolist(), "fake": fake.tolist()}
    cross = sum(-log_sigmoid(x) for x in values["real"]) / 6
    cross += sum(-log_sigmoid(-x) for x in values["fake"]) / 6
    hinge = sum(max(0, 1 - x) for x in values["real"]) / 6
    hinge += sum(max(0, 1 + x) for x in values["fake"]) / 6
    expected = {"hinge": hinge / 2, "vanilla": cross / 2, "non-saturating": cross / 2}
    assert expected.keys() == losses.DISCRIMINATOR.keys()
    for name, value in expected.items():
        loss = losses.DISCRIMINATOR[name](real, fake)
        assert float(loss) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("name", losses.GENERATOR)
def test_a_generator_wants_higher_logits_and_a_discriminator_tells_apart(name: str):
    fake = torch.zeros(4, requires_grad=True)
    losses.GENERATOR[name](fake).backward()
    assert (fake.grad < 0).all()
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    losses.DISCRIMINATOR.get(name, losses.hinge_discriminator_loss)(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


def test_semantic_loss():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert float(losses.semantic_loss(a, b)) == pytest.approx(float(1 - cosine.mean()), rel=1e-6)
    assert float(losses.semantic_loss(a, 3 * a)) == pytest.approx(0, abs=1e-6)
    assert float(losses.semantic_loss(a, -a)) == pytest.approx(2, rel=1e-6)
    # In half precision the angle is still computed in float32.
    half = losses.semantic_loss(a.bfloat16(), b)
    assert half.dtype == torch.float32
    assert torch.equal(half, losses.semantic_loss(a.bfloat16().float(), b))


def test_adaptive_weight():
    last = torch.ones(3, requires_grad=True)
    weight = losses.adaptive_weight((6 * last).sum(), (2 * last).sum(), last)
    assert float(weight) == pytest.approx(6 / (2 + 1e-4 / math.sqrt(3)), rel=1e-6)
    zero = (0 * last).sum()
    assert float(losses.adaptive_weight((6 * last).sum(), zero, last)) == 1e4


def test_adaptive_weight_of_float16():
    """With a scale, gradients below float16's smallest number count, as those of large batches.

    Gradients that overflow do not count.
    """
    wide = torch.ones(3, requires_grad=True)

    def weight(scale: float) -> float:
        last = wide.half()  # its gradient is rounded to float16
        small, other = 1e-9 * last.float().sum(), 1e-3 * last.float().sum()
        return float(losses.adaptive_weight(small, other, wide, scale))

    expected = 1e-9 * 3**0.5 / (1e-3 * 3**0.5 + 1e-4)
    assert weight(1.0) == 0.0
    assert weight(2.0**14) == pytest.approx(expected, rel=1e-2)
    assert weight(2.0**40) == 0.0  # a finite norm by an infinite one


def as_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return VGG16 under torchvision's names, with a part of the classifier as in its file."""
    convs = {k: v for k, v in weights.items() if k.startswith("net.")}
    renamed = {f"features.{k.split('.', 2)[2]}": v for k, v in convs.items()}
    return renamed | {"classifier.0.bias": torch.zeros(3)}


def test_lpips_gives_the_authors_numbers(golden, lpips_weights, reconstructed):
    case, (images, reconstruction) = golden("train_tokenizer_small"), reconstructed
    model = LPIPS.from_files(lpips_weights, lpips_weights)
    with torch.no_grad():
        parts = model.parts(images[:1], reconstruction)
        pair = model(images[:1], images[1:])
    torch.testing.assert_close(parts, case["lpips_layers"][:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.sum(1), case["lpips"][:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(pair, case["lpips_pair"].view(1), rtol=1e-5, atol=0)


def test_lpips_files_in_both_namings(lpips_weights, tmp_path: Path):
    theirs = as_torchvision(lpips_weights)
    linear = {key: value for key, value in lpips_weights.items() if key.startswith("lin")}
    torch.save(theirs, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    first = LPIPS.from_files(lpips_weights, lpips_weights)
    assert not first.training and LPIPS.from_files(lpips_weights, lpips_weights, 0.5).training
    second = LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.requires_grad


def test_lpips_names_what_does_not_fit(lpips_weights):
    theirs = as_torchvision(lpips_weights)
    del theirs["features.28.bias"]
    theirs["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    with pytest.raises(ValueError, match=r"missing 28\.bias; misshapen 0\.weight"):
        LPIPS.from_files(theirs, lpips_weights)
    with pytest.raises(ValueError, match=r"linear layers does not fit.*missing 0, 1, 2, 3, 4"):
        LPIPS.from_files(lpips_weights, as_torchvision(lpips_weights))


def test_lpips_takes_the_linear_layers_of_the_package(lpips_weights, tmp_path: Path, monkeypatch):
    linear = {key: value for key, value in lpips_weights.items() if key.startswith("lin")}
    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise ImportError('needs not be imported')")
    torch.save(linear, folder / "vgg.pth")
    monkeypatch.syspath_prepend(tmp_path)
    model = LPIPS.from_files(lpips_weights)
    assert torch.equal(model.weights[4], linear["lin4.model.1.weight"].flatten())


def test_lpips_says_what_to_install(lpips_weights, monkeypatch):
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'vfmtok-fast\[train\]'"):
        LPIPS.from_files(lpips_weights)


def test_lpips_dropout_is_an_option_and_only_in_training():
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 16, 16)
    plain, noisy = LPIPS(), LPIPS(dropout=0.5)
    noisy.load_state_dict(plain.state_dict())
    assert torch.equal(plain.train()(x, y), plain.eval()(x, y))
    assert torch.equal(noisy.eval()(x, y), plain(x, y))
    copies = x[:1].expand(64, -1, -1, -1), y[:1].expand(64, -1, -1, -1)
    drawn, exact = noisy.train()(*copies), plain(x[:1], y[:1])
    # The result is unbiased: the other terms make up for the dropped ones.
    assert drawn.std() > 0
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / math.sqrt(64)


def test_lpips_gradient_is_finite_where_all_features_are_zero():
    model = LPIPS()
    for layer in model.features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.bias, -5)  # every ReLU outputs zero
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = model(x, torch.ones(1, 3, 16, 16))
    distance.sum().backward()
    assert torch.isfinite(distance).all() and torch.isfinite(x.grad).all()


def test_lpips_under_autocast_compares_in_float32():
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 16, 16)
    model = LPIPS()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model(x, y), rtol=0.05, atol=0)


def test_pixel_losses():
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 4, 4)
    assert torch.equal(losses.PIXEL["l2"](x, y), (x - y).square().mean())
    assert torch.equal(losses.PIXEL["l1"](x, y), (x - y).abs().mean())
    assert F.mse_loss(x, y) > 0
