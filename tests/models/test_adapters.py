"""Models whose layers were replaced, adapted or hooked: used or refused, not passed over."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import vfmtok_fast as vf
from vfmtok_fast import GPT, GPTConfig, VFMTok, VFMTokConfig

GENERATOR = GPTConfig(num_layers=2, num_heads=2, dim=16, vocab_size=64, block_size=4, num_classes=3)
CLASSES = torch.arange(2)


class Adapted(nn.Module):
    """As adapters look: the weight and bias of what they wrap, and more in the forward pass."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def changed(how: str, model: GPT) -> None:
    block = model.blocks[1]
    if how == "adapter":
        block.attention.qkv = Adapted(block.attention.qkv)
    elif how == "head":
        model.head = Adapted(model.head)
    elif how == "bias":
        model.head = nn.Linear(model.config.dim, model.config.vocab_size)
    elif how == "hook":
        block.ffn_norm.register_forward_hook(lambda module, given, out: -out)
    elif how == "pruning":
        prune.l1_unstructured(block.ffn.down, "weight", 0.5)
    else:
        plain = block.ffn.down.forward
        block.ffn.down.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize("how", ["adapter", "head", "bias", "hook", "pruning", "method"])
def test_layers_that_a_step_would_not_call_are_refused(how: str):
    model = GPT(GENERATOR).eval()
    nn.init.normal_(model.head.weight)
    changed(how, model)
    with pytest.raises(TypeError, match="needs plain layers .* merge adapters"):
        model.generate(CLASSES[:2])
    # The loss is that of the logits, as what is trained.
    codes = torch.arange(8).view(2, 4)
    logits = model(codes, CLASSES[:2])
    want = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model.loss(codes, CLASSES[:2]), want)


@pytest.mark.parametrize("how", ["adapter", "hook", "quantised"])
@pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
def test_a_backbone_is_read_as_it_is_now(tiny: VFMTokConfig, how: str, enabled):
    """Its blocks are read past their own forward passes only while those are plain."""
    torch.manual_seed(0)
    tok = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with vf.enable(enabled), torch.inference_mode():
        before = tok.encode_regions(images)[0]
        attention = tok.backbone.vit.blocks[0].attn
        if how == "adapter":
            attention.qkv = Adapted(attention.qkv)
        elif how == "hook":
            attention.register_forward_hook(lambda module, given, out: -out)
        else:
            vit = torch.ao.quantization.quantize_dynamic(tok.backbone.vit, {nn.Linear})
            tok.backbone.vit = vit
        after = tok.encode_regions(images)[0]
        assert not torch.equal(before, after)
        maps = tok.backbone(images)
        x = torch.nn.functional.interpolate(
            (images + 1) / 2, tok.backbone.image_size, mode="bicubic", antialias=True
        ).clamp(0, 1)
        x = (x - tok.backbone.mean) / tok.backbone.std
        want = tok.backbone.vit.forward_features(x)[:, tok.backbone.vit.num_prefix_tokens :]
        torch.testing.assert_close(maps[-1], want, rtol=1e-4, atol=1e-4)
