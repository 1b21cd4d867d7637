"""The precision of a tokenizer: the caller's choice, and process-wide settings left unchanged."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from vfmtok_fast import BackboneConfig, VFMTok, VFMTokConfig, cache
from vfmtok_fast.tf32 import computing
from vfmtok_fast.tokenizer.attention import attend
from vfmtok_fast.tokenizer.precision import PRECISIONS, products

SMALL = {
    "image_size": 112, "dim": 64, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4,
    "decoder_mlp_dim": 96, "codebook_size": 100, "pixel_channels": 32,
    "pixel_channel_mult": (1, 1, 1, 1, 2),
    "backbone": BackboneConfig(dim=32, depth=4, num_heads=2, levels=(0, 1, 2, 3)),
}  # fmt: skip


def make(**changes) -> VFMTok:
    torch.manual_seed(0)
    return VFMTok(VFMTokConfig(**(SMALL | changes))).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_what_was_chosen_and_runs(precision):
    tok = make()
    assert tok.precision == "float32" and tok.set_precision(precision) is tok
    assert tok.precision == precision
    tok.set_precision(precision)  # once more changes nothing
    codes = tok.encode(images().to(tok.dtype))
    assert codes.shape == (2, 256) and tok.decode(codes).dtype == tok.dtype
    half = precision in ("float16", "bfloat16")
    assert tok.dtype == (getattr(torch, precision) if half else torch.float32)
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert other.precision == precision


def test_mixed_narrows_the_products_of_the_backbone_alone():
    tok, exact = make().set_precision("mixed"), make()
    narrow = {name for name, weight in tok.named_parameters() if weight.dtype == torch.float16}
    inside = {id(w) for layer in products(tok.backbone.vit) for w in layer.parameters()}
    assert narrow == {name for name, weight in tok.named_parameters() if id(weight) in inside}
    assert len(narrow) == 2 * (1 + 4 * 4) and all("backbone.vit" in name for name in narrow)
    queries, features = tok.encode_regions(images())
    assert queries.dtype == features.dtype == torch.float32
    want, _ = exact.encode_regions(images())
    off = float((queries - want).abs().max())
    # Roundings of 11 bits in four blocks, but not no rounding at all.
    assert 0 < off < 64 * torch.finfo(torch.float16).eps
    assert torch.equal(tok.decode(exact.encode(images())), exact.decode(exact.encode(images())))


@pytest.mark.parametrize("first", ["float16", "bfloat16", "mixed"])
@pytest.mark.parametrize("then", ["float32", "tf32", "mixed", "float16", "bfloat16"])
def test_what_was_rounded_is_not_taken_for_exact(first, then):
    tok = make().set_precision(first)
    if then == first:
        return
    with pytest.raises(ValueError, match=f"were rounded to {first}; load the model again for"):
        tok.set_precision(then)
    assert tok.precision == first


def test_casts_by_hand_are_seen():
    tok = make()
    assert tok.half().precision == "float16"
    assert make().double().precision == "float64"
    assert make().double().set_precision("float32").precision == "float32"
    tok = make()
    tok.quantizer.half()
    assert tok.precision == "float16 and float32"
    assert make().set_precision("tf32").set_precision("float32").precision == "float32"


def test_a_backbone_that_was_cast_by_hand():
    tok = make()
    tok.backbone.bfloat16()
    assert torch.equal(tok.encode(images()), tok(images()).codes)
    assert tok.probe_features(images(), "regions").dtype == torch.float32
    assert tok.sampling_points(images())[0].isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="must be one of float32, tf32, float16, bfloat16, mixed"):
        make().set_precision("fp8")
    tok = make()
    tok.backbone.vit.blocks[0].norm1 = torch.nn.Identity()
    with pytest.raises(ValueError, match="mixed needs a plain ViT"):
        tok.set_precision("mixed")
    assert tok.precision == "float32"


def switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(("tf32", "expected"), [(True, "tf32"), (False, "ieee")])
def test_the_process_keeps_its_own_switches(tf32, expected):
    """Process settings are restored, also after an error and with nested calls."""
    before = switches()
    cuda = torch.device("cuda")
    with pytest.raises(KeyError), computing(cuda, tf32):
        assert switches() == (expected, expected)
        # Inductor reads these; they raise if the old and the new names disagree.
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with computing(cuda, not tf32):
            assert switches() != (expected, expected)
        assert switches() == (expected, expected)
        raise KeyError
    assert switches() == before
    assert not torch.backends.cuda.matmul.allow_tf32
    with computing(torch.device("cpu"), tf32):  # On a CPU there is nothing to set.
        assert switches() == before


@pytest.mark.parametrize("named", ["medium", "high", "highest"])
def test_the_old_switch_comes_back_by_its_name(named):
    cuda, others = torch.device("cuda"), (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [other.fp32_precision for other in others]
    try:
        torch.set_float32_matmul_precision(named)
        with computing(cuda, True), computing(cuda, False):
            assert switches() == ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == named
    finally:
        torch.set_float32_matmul_precision("highest")
        for other, value in zip(others, before, strict=True):
            other.fp32_precision = value


def test_attention_beside_tf32_is_float16_where_no_gradient_is_asked_for():
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    narrow = F.scaled_dot_product_attention(q.half(), k.half(), v.half(), is_causal=True).float()
    assert not torch.equal(narrow, exact)
    with computing(torch.device("cuda"), True):
        assert torch.equal(attend(q, k, v, is_causal=True), exact)
        with torch.no_grad():
            got = attend(q, k, v, is_causal=True)
            assert got.dtype == torch.float32 and torch.equal(got, narrow)
            assert attend(q.double(), k.double(), v.double()).dtype == torch.float64
            with computing(torch.device("cuda"), False):
                assert torch.equal(attend(q, k, v, is_causal=True), exact)
            compiled = torch.compile(attend, backend="eager", fullgraph=True)
            assert torch.equal(compiled(q, k, v, is_causal=True), exact)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v, is_causal=True), exact)


def test_a_cache_holds_it(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (120, 130), "teal").save(tmp_path / "photos" / "a.png")
    covers = {}
    for precision in ("mixed", "tf32", "float32"):
        tok = make().set_precision(precision)
        cache.build(tmp_path / "photos", tmp_path / precision, tok, batch_size=1, workers=1)
        covers[precision] = cache.read_manifest(tmp_path / precision).covers
        assert covers[precision]["dtype"] == precision
    with pytest.raises(cache.FingerprintMismatch, match=r"dtype \(there mixed, here float32\)"):
        cache.build(tmp_path / "photos", tmp_path / "mixed", make(), batch_size=1, workers=1)
    with pytest.raises(cache.FingerprintMismatch, match=r"dtype \(there tf32, here float32\)"):
        cache.build(tmp_path / "photos", tmp_path / "tf32", make(), batch_size=1, workers=1)
