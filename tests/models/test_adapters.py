"""Models with replaced, adapted or hooked layers use the change or refuse it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import vfmtok_fast as vf
from vfmtok_fast import GPT, GPTConfig, VFMTok, VFMTokConfig
from vfmtok_fast.tokenizer import layers, pixel_decoder, vit
from vfmtok_fast.tokenizer.layers import Conv

GENERATOR = GPTConfig(num_layers=2, num_heads=2, dim=16, vocab_size=64, block_size=4, num_classes=3)
CLASSES = torch.arange(2)


class Adapted(nn.Module):
    """Like a common adapter: it exposes the wrapped weight and bias, but its forward does more."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def zeros(self: nn.Module, x: Tensor, rotary: Tensor) -> Tensor:
    return torch.zeros_like(x)


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
    elif how == "block hook":
        block.register_forward_hook(lambda module, given, out: 0 * out)
    elif how == "attention hook":
        block.attention.register_forward_pre_hook(lambda module, given: (2 * given[0], given[1]))
    elif how == "subclass":
        block.attention.__class__ = type("Other", (type(block.attention),), {"forward": zeros})
    elif how == "input hook":
        model.dropout.register_forward_hook(lambda module, given, out: -out)
    elif how == "pruning":
        prune.l1_unstructured(block.ffn.down, "weight", 0.5)
    else:
        plain = block.ffn.down.forward
        block.ffn.down.forward = lambda x: 2 * plain(x)


HOW = ["adapter", "head", "bias", "hook", "pruning", "method", "subclass"]
HOOKS = ["block hook", "attention hook", "input hook"]


@pytest.mark.parametrize("how", HOW + HOOKS)
def test_layers_that_a_step_would_not_call_are_refused(how: str):
    model = GPT(GENERATOR).eval()
    nn.init.normal_(model.head.weight)
    changed(how, model)
    with pytest.raises(TypeError, match="needs plain layers .* merge adapters"):
        model.generate(CLASSES[:2])
    # The loss is the cross-entropy of the model's own logits, so training uses the changed layers.
    codes = torch.arange(8).view(2, 4)
    logits = model(codes, CLASSES[:2])
    want = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model.loss(codes, CLASSES[:2]), want)


def test_a_head_that_shows_no_weight_is_called():
    torch.manual_seed(0)
    model = GPT(GENERATOR).eval()
    nn.init.normal_(model.head.weight)
    codes, want = torch.zeros(2, 4, dtype=torch.int64), 2 * model.head(torch.ones(16))
    model.head = nn.Sequential(model.head, nn.Identity())
    model.head.register_forward_hook(lambda module, given, out: 2 * out)
    torch.testing.assert_close(model.head(torch.ones(16)), want)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    logits = model(codes, CLASSES)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model.loss(codes, CLASSES), loss)
    with pytest.raises(TypeError, match="needs plain layers .* got Sequential"):
        model.generate(CLASSES)


def test_what_a_subclass_or_a_norm_computes_otherwise_is_refused():
    class Scaled(GPT):
        def predict(self, x: Tensor) -> Tensor:
            return 2 * super().predict(x)

    model = Scaled(GENERATOR).eval()
    nn.init.normal_(model.head.weight)
    with pytest.raises(TypeError, match="Scaled overrides embed, hidden or predict"):
        model.generate(CLASSES)
    codes = torch.arange(8).view(2, 4)
    logits = model(codes, CLASSES).flatten(0, 1)
    want = nn.functional.cross_entropy(logits, codes.flatten())
    torch.testing.assert_close(model.loss(codes, CLASSES), want)
    model = GPT(GENERATOR)
    model.blocks[0].ffn_norm.eps = 1.0
    with pytest.raises(ValueError, match=r"must have the config's norm_eps 1e-05, got 1\.0"):
        model.generate(CLASSES)
    # What changes no result is taken: a forward of its own around the same logits, no dropout.
    plain = GPT(GENERATOR).eval()
    other = type("Other", (GPT,), {"forward": lambda self, *args: None})(GENERATOR).eval()
    other.load_state_dict(plain.state_dict())
    for block in other.blocks:
        block.ffn.dropout = nn.Identity()
    assert torch.equal(other.generate(CLASSES), plain.generate(CLASSES))


class AdaptedConv(Adapted):
    """The same around a convolution."""

    def __init__(self, base: nn.Conv2d):
        nn.Module.__init__(self)
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace(tok: VFMTok, path: str, make) -> nn.Module:
    """Put ``make(layer)`` in the place of a layer, and return it."""
    parent, _, name = path.rpartition(".")
    layer = make(tok.get_submodule(path))
    setattr(tok.get_submodule(parent), name, layer)
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, given, out: 2 * out)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def reflecting(layer: nn.Conv2d) -> nn.Module:
    other = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, padding_mode="reflect")
    other.load_state_dict(layer.state_dict())
    return other


BLOCK = "pixel_decoder.levels.0.blocks.0"
PLACES = [
    (f"{BLOCK}.conv1", AdaptedConv), (f"{BLOCK}.conv2", pruned), (f"{BLOCK}.conv1", reflecting),
    (f"{BLOCK}.norm1", hooked), ("pixel_decoder.levels.0.upsample", AdaptedConv),
    ("pixel_decoder.levels.0.upsample", hooked), ("pixel_decoder.norm_out", hooked),
    ("pixel_decoder.middle.1.q", AdaptedConv), ("pixel_decoder.middle.1.out", hooked),
    ("pixel_decoder.conv_in", AdaptedConv), ("token_decoder.layers.0.gate_up", Adapted),
    ("token_decoder.layers.0.ffn_norm", hooked), ("token_decoder.layers.0.attention.q", hooked),
    ("region_encoder.layers.0.up", Adapted), ("region_encoder.layers.0.cross_norm", hooked),
    ("region_encoder.layers.0.ffn_norm", lambda layer: Doubled(layer.normalized_shape)),
    ("region_encoder.layers.0.down", pruned),
    ("token_decoder.layers.0.ffn_norm", lambda layer: nn.RMSNorm(layer.normalized_shape)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "make"), PLACES)
@pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
def test_every_layer_of_the_tokenizer_that_is_no_longer_plain_is_called(
    tiny: VFMTokConfig, path: str, make, enabled
):
    """As if no op read weights: outputs change, the layer runs, and it gets gradients."""
    torch.manual_seed(0)
    tok = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with vf.enable(enabled):
        before = tok(images)
        layer = replace(tok, path, make)
        runs = []
        layer.register_forward_hook(lambda module, given, out: runs.append(out))
        after = tok(images)
        assert runs
        which = "queries" if path.startswith("region_encoder") else "reconstruction"
        assert not torch.equal(getattr(before, which), getattr(after, which))
        getattr(after, which).square().sum().backward()
        learned = [weight for weight in layer.parameters() if weight.requires_grad]
        assert learned and all(weight.grad is not None for weight in learned)


def test_an_adapter_is_what_its_merged_weights_are(tiny: VFMTokConfig):
    """Before the activation, where a layer fuses one."""
    torch.manual_seed(0)
    tok = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    paths = ("region_encoder.layers.0.up", "token_decoder.layers.0.gate_up")
    adapters = [replace(tok, path, Adapted) for path in paths]
    adapted = tok(images)
    for path, adapter in zip(paths, adapters, strict=True):
        base = adapter.base
        with torch.no_grad():
            base.weight += adapter.up.weight @ adapter.down.weight
        replace(tok, path, lambda layer, base=base: base)
    merged = tok(images)
    torch.testing.assert_close(adapted.queries, merged.queries)
    torch.testing.assert_close(adapted.reconstruction, merged.reconstruction)


def set_everywhere(tok: VFMTok, kind: type, **values) -> None:
    for module in tok.pixel_decoder.modules():
        for name, value in values.items() if type(module) is kind else ():
            setattr(module, name, value)


@pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
def test_layers_that_were_set_otherwise_are_called(tiny: VFMTokConfig, monkeypatch, enabled):
    """As in seamless textures: in place, so that the classes stay what they were."""
    torch.manual_seed(0)
    plain = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    codes = torch.arange(plain.config.num_regions)[None] % plain.config.codebook_size
    with vf.enable(enabled):
        before = plain.decode(codes)
        circular, uneven = copy.deepcopy(plain), copy.deepcopy(plain)
        set_everywhere(circular, Conv, padding_mode="circular")
        for level in uneven.pixel_decoder.levels:
            level.blocks[0].norm2.eps = 1.0
        found = circular.decode(codes), uneven.decode(codes)
        for module in (layers, pixel_decoder):
            monkeypatch.setattr(module, "are_plain", lambda *parts: False)
        for tok, after in zip((circular, uneven), found, strict=True):
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, tok.decode(codes), rtol=1e-4, atol=1e-4)


def test_a_norm_without_a_bias_is_called(tiny: VFMTokConfig):
    tok = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4)).eval()
    norm = nn.LayerNorm(tok.config.dim, bias=False)
    replace(tok, "region_encoder.layers.0.cross_norm", lambda layer: norm)
    assert tok.encode(torch.zeros(1, 3, 64, 64)).shape == (1, tok.config.num_regions)


class Tripled(Adapted):
    """An adapter of any layer."""

    def __init__(self, base: nn.Module):
        nn.Module.__init__(self)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.base(x)


def change_vit(vit: nn.Module, how: str) -> None:
    if how == "patches":
        vit.patch_embed.proj = Tripled(vit.patch_embed.proj)
    elif how == "norm":
        vit.patch_embed.norm = nn.LayerNorm(vit.embed_dim)
    elif how == "activation":
        for block in vit.blocks:
            block.mlp.act = nn.ReLU()
    else:
        vit.blocks[0].register_forward_hook(lambda module, given, out: -out)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["patches", "norm", "activation", "hook"])
def test_a_changed_backbone_is_read_as_timm_computes_it(
    tiny: VFMTokConfig, monkeypatch, how: str, compiled: bool
):
    torch.manual_seed(0)
    # Images that need no resizing, so that an op cuts the patches.
    backbone = dataclasses.replace(tiny.backbone, patch_size=16)
    tok = VFMTok(dataclasses.replace(tiny, image_size=64, grid=4, backbone=backbone))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    before = tok.eval().encode_regions(images)[0]
    change_vit(tok.backbone.vit, how)

    def encode(x: Tensor) -> Tensor:
        return tok.encode_regions(x)[0]

    after = torch.compile(encode, backend="eager")(images) if compiled else encode(images)
    assert not torch.equal(before, after)
    monkeypatch.setattr(vit, "is_plain", lambda module: False)
    torch.testing.assert_close(after, encode(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["adapter", "hook", "quantised"])
@pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
def test_a_backbone_is_read_as_it_is_now(tiny: VFMTokConfig, how: str, enabled):
    """The backbone bypasses the forward passes of its blocks only while those are plain."""
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
