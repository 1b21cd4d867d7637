"""A new model starts like the authors', from where it can learn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast import VFMTok, VFMTokConfig


@pytest.fixture(scope="module")
def fresh(tiny: VFMTokConfig) -> VFMTok:
    torch.manual_seed(0)
    return VFMTok(tiny).requires_grad_(False)


def is_normal(values: Tensor, std: float) -> bool:
    """Return whether mean and spread match N(0, std**2) within five standard errors."""
    error = 5 * std / math.sqrt(values.numel())
    return abs(float(values.mean())) < error and abs(float(values.std()) - std) < error


def is_xavier(weight: Tensor) -> bool:
    """Return whether the weight stays within Xavier's bound and reaches almost to it."""
    bound = math.sqrt(6 / sum(weight.shape))
    largest = float(weight.abs().max())
    return largest <= bound and largest > bound * (1 - 10 / weight.numel())


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_codebook_rows_have_length_one(fresh: VFMTok):
    lengths = fresh.quantizer.codebook.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6)
    # Rows point in every direction: the mean of 256 unit rows of 12 numbers is about 1/16 long.
    assert float(fresh.quantizer.codebook.mean(dim=0).norm()) < 4 / 16


def test_the_first_step_of_adam_hardly_turns_a_code(tiny: VFMTokConfig):
    torch.manual_seed(0)
    model = VFMTok(tiny).train()
    codebook = model.quantizer.codebook
    before = codebook.detach().clone()
    out = model(torch.rand(2, 3, 64, 64) * 2 - 1)
    (out.codebook_loss + out.commit_loss + out.reconstruction.square().mean()).backward()
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(codebook.grad.norm()) < 0.5 * float(total)
    torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95)).step()
    used, after = out.codes.unique(), codebook.detach()
    turned = F.cosine_similarity(after[used], before[used], dim=-1)
    # A step of 1e-4 in each of 12 numbers turns a unit row by 3.5e-4 at most.
    assert float(turned.clamp(max=1).acos().max()) < 1e-3


def test_learned_tokens_and_positions(fresh: VFMTok):
    encoder, decoder, std = fresh.region_encoder, fresh.token_decoder, fresh.config.dim**-0.5
    assert is_normal(encoder.regions, std) and is_normal(encoder.position, std)
    assert is_normal(decoder.region_position, std) and is_normal(decoder.position, std)
    ones = torch.cat([decoder.class_token, decoder.pixel_mask, decoder.feature_mask])
    assert is_normal(ones, std)
    assert not decoder.registers.any()


def test_linear_layers(fresh: VFMTok):
    decoder = fresh.token_decoder
    layers = [m for layer in decoder.layers for m in layer.modules() if hasattr(m, "weight")]
    linear = [m for m in layers if m.weight.ndim == 2] + [decoder.feature_head]
    for layer in fresh.region_encoder.layers:
        linear += [layer.cross_attention.value, layer.cross_attention.out]
    assert len(linear) == 2 * 6 + 1 + 2 * 2
    for layer in linear:
        assert is_xavier(layer.weight) and not layer.bias.any()
    # Other layers have torch's default: uniform up to 1 / sqrt(inputs), biases too.
    for layer in (decoder.proj, fresh.quantizer.proj, fresh.region_encoder.layers[0].up):
        bound = layer.in_features**-0.5
        assert 0.9 * bound < float(layer.weight.abs().max()) <= bound and layer.bias.any()


def test_layers_of_the_encoder_start_alike_and_those_of_the_decoder_do_not(fresh: VFMTok):
    encoder, decoder = fresh.region_encoder, fresh.token_decoder
    assert same(*encoder.layers) and same(*encoder.projectors)
    assert not same(*decoder.layers)


def test_offsets_start_as_a_star(fresh: VFMTok):
    for layer in fresh.region_encoder.layers:
        attention = layer.cross_attention
        heads, levels, points = attention.shape
        star = attention.offsets.bias.view(heads, levels, points, 2)
        reach = star.abs().amax(dim=-1)
        assert torch.allclose(reach, torch.arange(1.0, points + 1).expand_as(reach))
        assert not attention.offsets.weight.any() and not attention.weights.weight.any()
