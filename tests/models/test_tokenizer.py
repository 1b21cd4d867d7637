"""The tokenizer from a user's view: shapes, other sizes, other backbones, errors, training."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vfmtok_fast
from vfmtok_fast import BackboneConfig, VFMTok, VFMTokConfig, functional, ops
from vfmtok_fast.functional import resize_positions
from vfmtok_fast.tokenizer.quantizer import entropy_loss

BACKBONE = BackboneConfig(dim=32, depth=4, num_heads=2, levels=(0, 1, 2, 3))
SMALL = {
    "image_size": 112,
    "dim": 64,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "num_heads": 4,
    "decoder_mlp_dim": 96,
    "codebook_size": 100,
    "pixel_channels": 32,
    "pixel_channel_mult": (1, 1, 1, 1, 2),
    "backbone": BACKBONE,
}


def make(**changes) -> VFMTok:
    """Return a small tokenizer with weights that make regions look at different places."""
    torch.manual_seed(0)
    model = VFMTok(VFMTokConfig(**(SMALL | changes))).eval()
    for layer in model.region_encoder.layers:
        torch.nn.init.normal_(layer.cross_attention.offsets.weight, std=0.1)
        torch.nn.init.normal_(layer.cross_attention.weights.weight, std=0.1)
    return model


def pictures(count: int = 2, size: int = 112, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 28, size // 28, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


@pytest.fixture(scope="module")
def tok() -> VFMTok:
    return make()


@pytest.fixture(scope="module")
def codes(tok: VFMTok) -> torch.Tensor:
    return tok.encode(pictures())


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message and "\n" not in message
    return message


def test_shapes(tok: VFMTok, codes: torch.Tensor):
    queries, features = tok.encode_regions(pictures())
    assert queries.shape == (2, 256, 12) and features.shape == (2, 64, 32)
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(2, 256))
    assert codes.shape == (2, 256) and codes.dtype == torch.int64
    assert len(codes.unique()) > 5, "the codes depend on nothing"
    assert tok.decode(codes).shape == (2, 3, 112, 112)
    small = tok.decode_to_uint8(codes, size=32)
    assert small.shape == (2, 32, 32, 3) and small.dtype == torch.uint8
    with pytest.raises(ValueError, match="size must be at least 1"):
        tok.decode_to_uint8(codes, size=0)


class LiveBytes(TorchDispatchMode):
    """Records the most bytes that tensors created inside hold at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
def test_decoding_many_takes_the_memory_of_a_few(enabled, tok: VFMTok, monkeypatch):
    """Besides what grows with the batch, memory is limited to the maps of 3 images at a time."""
    per_picture = 5 * 4 * tok.pixel_decoder.largest_map
    monkeypatch.setattr("vfmtok_fast.tokenizer.model._PIECE_BYTES", 3 * per_picture)
    codes = torch.randint(0, tok.config.codebook_size, (10, 256))
    with vfmtok_fast.enable(enabled), torch.no_grad():
        with LiveBytes() as live:
            pixels = tok._pictures(codes)
        monkeypatch.setattr("vfmtok_fast.tokenizer.model._PIECE_BYTES", 2**40)
        with LiveBytes() as at_once:
            whole = tok._pictures(codes)
    # The pieces, and all of them joined.
    assert live.most - 2 * pixels.nbytes <= 3 * per_picture
    assert at_once.most - pixels.nbytes > 5 * per_picture
    torch.testing.assert_close(pixels, whole, rtol=1e-4, atol=1e-4)


def test_8_bit_rule(tok: VFMTok, codes: torch.Tensor):
    """Bicubic without antialiasing, then clamp(127.5 x + 128, 0, 255), truncated."""
    resized = F.interpolate(
        tok.decode(codes), size=(256, 256), mode="bicubic", align_corners=False, antialias=False
    )
    expected = (127.5 * resized + 128).clamp(0, 255).floor().permute(0, 2, 3, 1)
    assert torch.equal(tok.decode_to_uint8(codes).float(), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_dim": 8},
        {"dim": 48, "num_heads": 2},
        {"dim": 120, "num_heads": 2},
        {"dim": 200, "num_heads": 2},
        {"encoder_depth": 1, "decoder_depth": 3},
        {"num_regions": 64, "num_points": 3},
        {"image_size": 224},
        {"image_size": 336},
        {"backbone": BackboneConfig(dim=48, depth=6, num_heads=2, levels=(1, 5), num_registers=0)},
    ],
    ids=[
        "codes of 8",
        "heads of 24",
        "of 60",
        "of 100",
        "depths",
        "regions",
        "224",
        "336",
        "backbone",
    ],
)
def test_other_sizes(changes: dict):
    model = make(**changes)
    config = model.config
    images = pictures(1, config.image_size)
    codes = model.encode(images)
    assert codes.shape == (1, config.num_regions)
    queries, features = model.encode_regions(images)
    assert queries.shape == (1, config.num_regions, config.codebook_dim)
    assert features.shape == (1, config.feature_grid**2, config.backbone.dim)
    assert model.decode(codes).shape == images.shape
    output = model.train()(images)
    assert output.semantic.shape == features.shape
    assert torch.equal(output.codes, codes)


def test_grids_at_224():
    config = VFMTokConfig(image_size=224)
    assert (config.feature_grid, config.pixel_grid) == (16, 14)


def test_published_sizes():
    config = VFMTokConfig()
    assert (config.feature_grid, config.pixel_grid, config.pixel_patch) == (24, 21, 16)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (1024, 1368)
    with torch.device("meta"):
        model = VFMTok(config)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    # The paper's model: 304M, 20M, 20M, 33M.
    assert [round(count[n] / 1e6) for n in ("backbone", "pixel_decoder")] == [304, 33]
    assert 19e6 < count["region_encoder"] < 21e6 and 19e6 < count["token_decoder"] < 21e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 65}, "dim must be a multiple of num_heads, got 65 and 4"),
        ({"num_regions": 200}, "num_regions must be a square number, got 200"),
        ({"image_size": 300}, "image_size must be a multiple of 16"),
        ({"pixel_channels": 40}, "pixel_channels must be a multiple of 32"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"codebook_size": "100"}, "codebook_size must be an integer of at least 1, got '100'"),
        ({"backbone": {"dim": 32, "colour": 1}}, "BackboneConfig: unknown field colour"),
        ({"backbone": {"levels": (3, 1)}}, r"levels must be rising block indices, got \(3, 1\)"),
        ({"backbone": {"position_resize": "?"}}, "position_resize must be 'auto'"),
        ({"backbone": {"depth": 2}}, "levels must be below DINOv2's depth 2"),
    ],
)
def test_refused_configurations(changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        VFMTok(SMALL | changes)
    one_line(error.value)


def test_encode_is_deterministic_and_independent_of_the_batch(tok: VFMTok):
    images = pictures(3)
    together = tok.encode(images)
    assert torch.equal(tok.encode(images), together)
    for i, image in enumerate(images):
        assert torch.equal(tok.encode(image[None])[0], together[i])
    assert torch.equal(tok.encode(images.flip(0)), together.flip(0))
    assert tok.encode(images[:0]).shape == (0, 256)
    assert tok.decode(together[:0]).shape == (0, 3, 112, 112)
    with pytest.raises(ValueError, match="must hold at least one picture"):
        tok(images[:0])


def test_overshoot_is_clamped(tok: VFMTok):
    images = pictures()
    assert torch.equal(tok.encode(images * 1.4), tok.encode((images * 1.4).clamp(-1, 1)))


@pytest.mark.parametrize("name", ["encode", "encode_regions", "forward", "sampling_points"])
@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (
            torch.zeros(1, 3, 256, 256),
            ValueError,
            r"shape \[B, 3, 112, 112\], got \(1, 3, 256, 256\)",
        ),
        (torch.zeros(3, 112, 112), ValueError, "shape"),
        (torch.zeros(1, 112, 112, 3), ValueError, "shape"),
        (torch.zeros(1, 1, 112, 112), ValueError, "shape"),
        (
            torch.zeros(1, 3, 112, 112, dtype=torch.uint8),
            TypeError,
            "floating point.*got torch.uint8",
        ),
        (torch.full((1, 3, 112, 112), 255.0), ValueError, r"in \[-1, 1\], got a magnitude of 255"),
        (torch.full((1, 3, 112, 112), 2.6), ValueError, r"in \[-1, 1\]"),
        (
            torch.full((1, 3, 112, 112), math.nan),
            ValueError,
            r"in \[-1, 1\], got NaN",
        ),
        (torch.full((1, 3, 112, 112), -math.inf), ValueError, r"in \[-1, 1\]"),
        (torch.zeros(1, 3, 112, 112, device="meta"), ValueError, "model's device cpu, got meta"),
        (None, TypeError, "torch.Tensor, got NoneType"),
    ],
    ids=["256", "3-d", "NHWC", "grey", "uint8", "255", "normalised", "nan", "inf", "meta", "None"],
)
def test_refused_images(tok: VFMTok, name: str, bad, kind: type, message: str):
    with pytest.raises(kind, match=message) as error:
        getattr(tok, name)(bad)
    assert one_line(error.value).startswith("VFMTok: images ")


def test_one_nan_is_enough(tok: VFMTok):
    images = pictures()
    images[1, 2, 111, 111] = math.nan
    with pytest.raises(ValueError, match="got NaN"):
        tok.encode(images)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (torch.full((1, 256), 100), ValueError, r"codes must be in \[0, 100\), got 100"),
        (torch.full((1, 256), -1), ValueError, r"codes must be in \[0, 100\), got -1"),
        (torch.zeros(1, 255, dtype=torch.long), ValueError, r"shape \[B, 256\], got \(1, 255\)"),
        (torch.zeros(256, dtype=torch.long), ValueError, r"shape \[B, 256\], got \(256,\)"),
        (torch.zeros(1, 16, 16, dtype=torch.long), ValueError, r"shape \[B, 256\]"),
        (torch.zeros(1, 256), TypeError, "integers, got torch.float32"),
        (torch.zeros(1, 256, dtype=torch.long, device="meta"), ValueError, "device cpu, got meta"),
        ([[0] * 256], TypeError, "torch.Tensor, got list"),
    ],
)
def test_refused_codes(tok: VFMTok, bad, kind: type, message: str):
    for method in (tok.decode, tok.decode_to_uint8):
        with pytest.raises(kind, match=message) as error:
            method(bad)
        assert one_line(error.value).startswith("VFMTok: codes ")


def test_backbone_is_frozen():
    model = make().train()
    assert model.training and model.region_encoder.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    features = model(pictures()).features
    assert not features.requires_grad
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model(pictures()).reconstruction.sum().backward()
    optimizer.step()
    after = model.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(model(pictures()).features, features)


def test_every_trainable_parameter_learns():
    model = make(entropy_weight=0.1).train()
    output = model(pictures())
    target = F.cosine_similarity(output.semantic, output.features, dim=-1)
    loss = F.mse_loss(output.reconstruction, pictures()) + (1 - target).mean()
    (loss + output.codebook_loss + output.commit_loss + output.entropy_loss).backward()
    trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert not [k for k, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()]
    # The bias of keys shifts every logit of a row alike, which softmax ignores, so its gradient is
    # zero except for rounding. The registers come last in a causal sequence, as in the release, so
    # no patch ever sees them. Everything else must get a gradient.
    silent = {k for k, p in trainable.items() if not p.grad.any()}
    silent = {k for k in silent if not k.endswith(("attention.k.bias", "middle.1.k.bias"))}
    assert silent == {"token_decoder.registers"}


def test_what_the_semantic_branch_alone_trains():
    """Without the semantic branch these parameters get no gradient, and all others get one."""
    model = make().train()
    output = model(pictures())
    (output.reconstruction.square().mean() + output.codebook_loss + output.commit_loss).backward()
    without = {k for k, p in model.named_parameters() if p.requires_grad and p.grad is None}
    only = ("feature_mask", "feature_norm.weight", "feature_norm.bias")
    only = {f"token_decoder.{name}" for name in (*only, "feature_head.weight", "feature_head.bias")}
    assert without == only


def test_gradients_pass_straight_through(tok: VFMTok):
    """The encoder gets the decoder's gradient as without a quantiser; the codebook gets none."""
    quantizer = make().quantizer
    queries = F.normalize(torch.randn(1, 256, 12), dim=-1).requires_grad_()
    quantized = quantizer(queries)
    torch.testing.assert_close(quantized.vectors, quantizer.lookup(quantized.codes))
    weight = torch.randn(1, 256, 12)
    (quantized.vectors * weight).sum().backward()
    assert torch.equal(queries.grad, weight) and quantizer.codebook.grad is None
    quantized = quantizer(queries.detach())
    error = (quantizer.lookup(quantized.codes) - queries).square().mean()
    torch.testing.assert_close(quantized.codebook_loss, error)
    torch.testing.assert_close(quantized.commit_loss, 0.25 * error)


def test_each_quantiser_loss_trains_its_own_side():
    quantizer = make().quantizer
    queries = F.normalize(torch.randn(1, 256, 12), dim=-1).requires_grad_()
    inputs = (queries, quantizer.codebook)
    quantized = quantizer(queries)
    for loss, trained in ((quantized.codebook_loss, 1), (quantized.commit_loss, 0)):
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert grads[trained].any() and grads[1 - trained] is None


def test_entropy_term():
    """It matches its definition, summed explicitly in float64."""
    torch.manual_seed(0)
    z, e = torch.randn(2, 5, 4).double(), torch.randn(7, 4).double()
    z = F.normalize(z, dim=-1)
    rows = [
        torch.stack([-(q - c / c.norm()).square().sum() / 0.01 for c in e]) for q in z.flatten(0, 1)
    ]
    p = torch.stack([row.exp() / row.exp().sum() for row in rows])
    own = -(p * p.clamp_min(1e-300).log()).sum(-1).mean()
    mean = p.mean(0)
    # The release adds 1e-5 inside the logarithm of the mean.
    expected = own + (mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(entropy_loss(z, e), expected, rtol=1e-9, atol=1e-12)
    output = make(entropy_weight=0.5).train()(pictures(1))
    assert output.entropy_loss.requires_grad and output.entropy_loss != 0
    assert make().train()(pictures(1)).entropy_loss == 0


def test_evaluation_has_no_semantic_branch():
    model, images = make().double(), pictures().double()
    output = model(images)
    assert output.semantic is None
    assert torch.equal(output.codes, model.encode(images))
    # Not equal: with straight-through, a vector is query + (vector - query).
    torch.testing.assert_close(output.reconstruction, model.decode(output.codes), atol=1e-9, rtol=0)


def test_decoder_dropout():
    model = make(decoder_dropout=0.1).train()
    first, second = (model(pictures(1)).semantic for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.encode(pictures(1)), make().encode(pictures(1)))
    model = make().train()
    assert torch.equal(*(model(pictures(1)).semantic for _ in range(2)))


def test_sampling_points_are_those_of_the_last_layer(tok: VFMTok):
    """Points and weights alone reproduce the layer's cross-attention, which a hook records."""
    caught = {}
    attention = tok.region_encoder.layers[-1].cross_attention
    hook = attention.register_forward_hook(lambda m, args, out: caught.update(args=args, out=out))
    tok.encode(pictures())
    hook.remove()
    points, weights = tok.sampling_points(pictures())
    assert points.shape == (2, 256, 4, 4, 4, 2) and weights.shape == (2, 256, 4, 4, 4)
    torch.testing.assert_close(weights.sum(dim=(3, 4)), torch.ones(2, 256, 4))
    _, memory, shapes, _ = caught["args"]
    value = attention.value(memory).unflatten(-1, (4, -1))
    # ops.deformable_sample adds a reference and offsets in pixels: here the points, from a corner.
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)[:, None]
    sampled = ops.deformable_sample(
        value, shapes, torch.zeros(1, 256, 4, 2), points * size, weights.flatten(3).log()
    )
    torch.testing.assert_close(attention.out(sampled), caught["out"], atol=1e-5, rtol=1e-4)


def test_regions_stand_on_the_grid_row_by_row(tok: VFMTok):
    points = tok.region_encoder.reference_points
    assert points.shape == (1, 256, 4, 2)
    expected = torch.tensor([(17 % 16 + 0.5) / 16, (17 // 16 + 0.5) / 16])
    assert torch.equal(points[0, 17], expected.expand(4, 2))


@pytest.mark.parametrize(
    ("config", "antialias"),
    [
        (BackboneConfig(), True),
        (BackboneConfig(dim=384, depth=12, num_heads=6), True),
        (BackboneConfig(dim=768, depth=12, num_heads=12), True),
        (BackboneConfig(num_registers=0), False),
        (BackboneConfig(dim=96, num_heads=4), False),
        (BackboneConfig(position_resize="offset"), False),
        (BackboneConfig(dim=96, num_heads=4, position_resize="antialias"), True),
    ],
)
def test_which_models_come_with_antialiased_positions(config: BackboneConfig, antialias: bool):
    """These are the DINOv2 releases with registers, in sizes S, B and L."""
    assert config.antialias_positions == antialias


@pytest.mark.parametrize("antialias", [False, True])
def test_position_tables(antialias: bool):
    table = torch.randn(1, 37 * 37, 5)
    image = table.view(1, 37, 37, 5).permute(0, 3, 1, 2)
    how = {"size": (24, 24)} if antialias else {"scale_factor": (24 + 0.1) / 37}
    expected = F.interpolate(image, mode="bicubic", antialias=antialias, **how)
    ours = resize_positions(table, 24, antialias=antialias)
    assert torch.equal(ours.view(1, 24, 24, 5).permute(0, 3, 1, 2), expected)
    assert resize_positions(table, 37, antialias=antialias) is table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "grid"), [(24, 21), (37, 24), (5, 11)])
def test_position_tables_side_after_side(side: int, grid: int, dtype: torch.dtype):
    """A GPU resizes one side after the other."""
    image = torch.randn(1, 6, side, side, dtype=torch.float64).to(dtype)
    scale = (grid + 0.1) / side
    # In float32, torch computes the coordinates in float32 as well.
    wide = image if dtype == torch.float64 else image.float()
    truth = F.interpolate(wide, scale_factor=scale, mode="bicubic")
    ours = functional._resized_by_sides(image, scale)
    assert ours.dtype == dtype and ours.shape == truth.shape
    allowed = 8 * torch.finfo(wide.dtype).eps + (dtype != wide.dtype) * torch.finfo(dtype).eps / 2
    assert float((ours - truth).abs().max()) <= allowed * float(truth.abs().max())


@pytest.mark.slow
def test_bfloat16_and_autocast(codes: torch.Tensor):
    """Both run, and most codes stay: half precision changes only those near a border."""
    model, images = make(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        assert float((model.encode(images) == codes).float().mean()) > 0.8
        assert model.decode(codes).dtype == torch.bfloat16
        output = model.train()(images)
    (output.semantic.float().mean() + output.commit_loss + output.codebook_loss).backward()
    assert model.quantizer.proj.weight.grad.isfinite().all()
    model = model.eval().bfloat16()
    assert float((model.encode(images) == codes).float().mean()) > 0.8
    assert model.decode(codes).isfinite().all()


@pytest.mark.slow
def test_export_with_any_number_of_images(tok: VFMTok, codes: torch.Tensor, monkeypatch):
    class Decoder(torch.nn.Module):
        def __init__(self, model: VFMTok):
            super().__init__()
            self.model = model

        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            return self.model.decode(self.model.encode(self.model.decode(codes).clamp(-1, 1)))

    # `decode` takes one image at a time, as it takes 7 of the full size.
    monkeypatch.setattr("vfmtok_fast.tokenizer.model._PIECE_BYTES", 1)
    batch = {0: torch.export.Dim("batch", max=8)}
    exported = torch.export.export(Decoder(tok), (codes,), dynamic_shapes=(batch,)).module()
    for given in (codes, torch.cat([codes, codes[:1]])):
        torch.testing.assert_close(exported(given), Decoder(tok)(given), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_under_torch_compile(tok: VFMTok, codes: torch.Tensor):
    """torch.compile makes one graph without a break."""
    torch.compiler.reset()
    encode = torch.compile(tok.encode, backend="eager", fullgraph=True)
    assert torch.equal(encode(pictures()), codes)
    decode = torch.compile(tok.decode, backend="eager", fullgraph=True)
    torch.testing.assert_close(decode(codes), tok.decode(codes), atol=1e-5, rtol=0)
