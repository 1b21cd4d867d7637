"""decode_step, the reference and the portable one: against plain mathematics in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.decoding import BlockWeights, KVCache, LayerCache, StepWeights, Weight
from vfmtok_fast.portable import decode_step as portable

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("decode_step")


def in_8_bits(full: Tensor) -> tuple[Tensor, Tensor]:
    scale = full.abs().amax(-1).clamp(min=1e-9) / 127
    return (full / scale[..., None]).round().to(torch.int8), scale.float()


def make(
    B=2, rows=None, H=2, D=8, T=6, ffn=20, V=11, layers=2, dtype=torch.float32, int8=False,
    int8_cache=False, seed=0,
):  # fmt: skip
    """Arguments of the op, by default R = B; NaN everywhere in the caches from position 3 on."""
    draw = torch.Generator().manual_seed(seed)
    rows = B if rows is None else rows
    C = H * D

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def weight(N: int, K: int) -> Weight:
        full = normal(N, K) / max(K, 1) ** 0.5
        return Weight(*in_8_bits(full)) if int8 else Weight(full.to(dtype))

    def norm() -> Tensor:
        return (1 + 0.2 * normal(C)).to(dtype)

    blocks = tuple(
        BlockWeights(
            norm(), weight(3 * C, C), weight(C, C), norm(), weight(ffn, C), weight(ffn, C),
            weight(C, ffn),
        )
        for _ in range(layers)
    )  # fmt: skip
    cached = []
    for _ in range(layers):
        parts = [normal(rows, H, T, D) for _ in range(2)]
        if int8_cache:
            (k, k_scale), (v, v_scale) = (in_8_bits(part) for part in parts)
            k_scale[:, :, 3:], v_scale[:, :, 3:] = float("nan"), float("nan")
            cached.append(LayerCache(k, v, k_scale, v_scale))
        else:
            for part in parts:
                part[:, :, 3:] = float("nan")
            cached.append(LayerCache(*(part.to(dtype) for part in parts)))
    angle = normal(T, D // 2)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1).float()
    weights = StepWeights(blocks, norm(), weight(V, C), rotary, EPS)
    code = torch.randint(0, 7, (B,), generator=draw)
    return [code, normal(7, C).to(dtype), weights, KVCache(tuple(cached)), 3]


def copied(arguments: list) -> list:
    """The same arguments, with a cache of their own."""
    layers = (LayerCache(*(t if t is None else t.clone() for t in layer)) for layer in arguments[3])
    return [*arguments[:3], KVCache(tuple(layers)), *arguments[4:]]


def oracle(code, embedding, weights, cache, position) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits in float64, and the keys and values of the new position in each layer."""

    def full(layer: Weight) -> Tensor:
        return layer.weight.double() * (1 if layer.scale is None else layer.scale.double()[:, None])

    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()

    rows, H, _, D = cache.layers[0].keys.shape
    x = embedding.double()[code].repeat(rows // max(len(code), 1), 1)
    turn = torch.complex(*weights.rotary[position].double().unbind(-1))
    written = []
    for block, layer in zip(weights.blocks, cache, strict=True):
        qkv = normalised(x, block.attention_norm) @ full(block.qkv).T
        q, k, v = qkv.view(rows, 3, H, D).unbind(1)
        q, k = (
            torch.view_as_real(torch.complex(a[..., ::2], a[..., 1::2]) * turn).flatten(-2)
            for a in (q, k)
        )
        written.append((k, v))
        if layer.key_scale is not None:
            k, v = (n.double() * by[..., None] for n, by in map(in_8_bits, (k, v)))
        old = [
            (part.double() if scale is None else part.double() * scale.double()[..., None])
            for part, scale in ((layer.keys, layer.key_scale), (layer.values, layer.value_scale))
        ]
        keys, values = (torch.cat([o[:, :, :position], n[:, :, None]], 2)
                        for o, n in zip(old, (k, v), strict=True))  # fmt: skip
        share = (torch.einsum("rhd,rhtd->rht", q, keys) / D**0.5).softmax(-1)
        x = x + torch.einsum("rht,rhtd->rhd", share, values).flatten(1) @ full(block.out).T
        y = normalised(x, block.ffn_norm)
        x = x + (F.silu(y @ full(block.gate).T) * (y @ full(block.up).T)) @ full(block.down).T
    return normalised(x, weights.norm) @ full(weights.head).T, written


def check(arguments: list, slack: float = 1.0) -> Tensor:
    want, written = oracle(*arguments)
    code, embedding, weights, cache, position = arguments = copied(arguments)
    before = copied(arguments)[3]
    got = ops.decode_step(*arguments)
    dtype = embedding.dtype
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Some thirty roundings a layer, of numbers around one, that add up at random.
    eps = torch.finfo(dtype).eps * slack
    torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * eps)
    for layer, old, (k, v) in zip(cache, before, written, strict=True):
        parts = ((layer.keys, layer.key_scale, k), (layer.values, layer.value_scale, v))
        for cached, scale, exact in parts:
            new = cached[:, :, position].double()
            step = 0.0
            if scale is not None:
                new = new * scale[:, :, position, None]
                step = 0.51 * float(exact.abs().max()) / 127
            torch.testing.assert_close(new, exact, rtol=0, atol=40 * eps + step)
        for now, then in zip(layer, old, strict=True):
            if now is not None:
                others = [t for t in range(now.shape[2]) if t != position]
                assert torch.equal(now[:, :, others].nan_to_num(), then[:, :, others].nan_to_num())
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("B", "rows"), [(1, 1), (1, 2), (2, 4), (3, 3), (5, 5), (20, 40)])
def test_against_plain_mathematics(B, rows, int8, dtype):
    check(make(B=B, rows=rows, dtype=dtype, int8=int8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cache_of_8_bits(dtype):
    """Scales are float32 in every type; in bfloat16 a value may be rounded to its neighbour."""
    check(make(B=3, dtype=dtype, int8_cache=True), slack=1e9 if dtype == torch.float64 else 4)


@given(
    B=st.integers(1, 4), guided=st.booleans(), H=st.integers(1, 3), half=st.integers(1, 6),
    ffn=st.integers(1, 30), V=st.integers(1, 30), position=st.integers(0, 3), int8=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_any_shape(B, guided, H, half, ffn, V, position, int8, seed):
    arguments = make(B, 2 * B if guided else B, H, 2 * half, 5, ffn, V, 1, int8=int8, seed=seed)
    check([*arguments[:4], position])


@pytest.mark.parametrize(
    "position", [torch.tensor([3]), torch.tensor(3), torch.tensor([3], dtype=torch.int32)], ids=str
)
def test_position_on_the_device(position):
    arguments = make(rows=4)
    want = ops.decode_step(*copied(arguments))
    for length in (None, position + 1):
        got = ops.decode_step(*copied(arguments)[:4], position, length)
        torch.testing.assert_close(got, want)


def test_the_class_position_vanishes():
    """The release stores cos = sin = 0 for it: its q and k are zero, v is not."""
    code, embedding, weights, cache, _ = make()
    weights.rotary[0] = 0
    ops.decode_step(code, embedding, weights, cache, 0)
    for layer in cache:
        assert not layer.keys[:, :, 0].any() and layer.values[:, :, 0].all()


def test_rows_of_a_larger_cache():
    """As guidance leaves it: a slice of the batch, written through to the whole."""
    code, embedding, weights, small, position = make(B=2)
    large = KVCache(
        tuple(LayerCache(*(torch.cat([t, t + 1]) for t in layer[:2])) for layer in small)
    )
    before = copied([code, embedding, weights, large])[3]
    got = ops.decode_step(code, embedding, weights, large.first_rows(2), position)
    assert torch.equal(got, ops.decode_step(code, embedding, weights, small, position))
    for whole, part, old in zip(large, small, before, strict=True):
        assert torch.equal(whole.keys[:2].nan_to_num(), part.keys.nan_to_num())
        assert torch.equal(whole.keys[2:].nan_to_num(), old.keys[2:].nan_to_num())


def test_guided_rows_start_from_the_same_codes():
    code, embedding, weights, cache, position = make(B=2, rows=4)
    for layer in cache:
        for part in layer[:2]:
            part[2:] = part[:2]
    logits = ops.decode_step(code, embedding, weights, cache, position)
    torch.testing.assert_close(logits[2:], logits[:2])


def test_no_images():
    code, embedding, weights, cache, position = make(B=0)
    assert ops.decode_step(code, embedding, weights, cache, position).shape == (0, 11)


def test_it_needs_no_gradient_and_leaves_none():
    arguments = make()
    arguments[1].requires_grad_()
    logits = ops.decode_step(*arguments)
    assert not logits.requires_grad and arguments[1].grad is None


def test_strided_weights():
    arguments = make()

    def spread(part):
        if not isinstance(part, Tensor) or part.ndim != 2:
            return part
        wide = part.new_full((part.shape[0], 2 * part.shape[1]), float("nan"))
        wide[:, ::2] = part
        return wide[:, ::2]

    weights = tree_map(spread, arguments[2])
    assert not weights.head.weight.is_contiguous()
    want = ops.decode_step(*copied(arguments))
    got = ops.decode_step(*arguments[:2], weights, *copied(arguments)[3:])
    torch.testing.assert_close(got, want)


def test_float16_int8_weights_do_not_overflow_where_the_product_does_not():
    """127 * 500 * 64 would, without the scale."""
    x, weight = torch.full((2, 64), 500.0).half(), torch.full((4, 64), 127, dtype=torch.int8)
    want = torch.full((2, 4), 64 * 500 * 0.127).half()
    got = portable.product(x, weight, torch.full((4,), 1e-3))
    assert torch.allclose(got, want, rtol=2e-3)


def test_bfloat16_int8_weights_take_torchs_kernel_only_where_it_is_right(monkeypatch):
    """It reads past the end of rows whose length is no multiple of 32."""
    took = []
    pack = torch._weight_int8pack_mm
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda *a: took.append(a[0].shape[1]) or pack(*a)
    )
    for K in (32, 40, 64):
        weight, scale = in_8_bits(torch.randn(6, K))
        x = torch.randn(2, K).bfloat16()
        got = portable.product(x, weight, scale)
        want = x.double() @ (weight.double() * scale.double()[:, None]).T
        assert float((got.double() - want).abs().max()) <= 2.0**-7 * float(want.abs().max())
        portable.product(x.float(), weight, scale)
    assert took == [32, 64]


@pytest.mark.slow
def test_torch_compile_takes_it_without_a_graph_break(implementation):
    arguments = make(rows=4)
    want = ops.decode_step(*copied(arguments)[:4], torch.tensor([3]))
    torch._dynamo.reset()
    compiled = torch.compile(ops.decode_step, backend="aot_eager", fullgraph=True)
    with vfmtok_fast.enable("decode_step" if implementation == "portable" else ()):
        got = compiled(*copied(arguments)[:4], torch.tensor([3]))
    torch.testing.assert_close(got, want)


def changed(**changes: Callable) -> list:
    """Arguments with some of them replaced by a function of what they were."""
    names = ("code", "embedding", "weights", "cache", "position")
    arguments = dict(zip(names, make(), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return list(arguments.values())


def with_block(weights: StepWeights, **parts) -> StepWeights:
    blocks = weights.blocks
    return weights._replace(blocks=(blocks[0], blocks[1]._replace(**parts)))


W8 = torch.ones(16, 20, dtype=torch.int8)


def with_layer(cache: KVCache, **parts) -> KVCache:
    return KVCache((cache.layers[0], cache.layers[1]._replace(**parts)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"code": Tensor.int},
            TypeError,
            r"code must be an int64 tensor \[B\], got torch.int32 \[",
        ),
        ({"code": Tensor.tolist}, TypeError, r"code must be an int64 tensor \[B\], got list"),
        ({"code": lambda c: c + 7}, ValueError, r"code must be in \[0, 7\), got \d+"),
        ({"code": lambda c: c - 7}, ValueError, r"code must be in \[0, 7\), got -\d+"),
        ({"code": lambda c: c[:0]}, ValueError, "the cache must have 0 or 0 rows, got 2"),
        ({"code": lambda c: c.repeat(3)}, ValueError, "the cache must have 6 or 12 rows, got 2"),
        ({"embedding": lambda e: e[0]}, ValueError, r"embedding must have shape \[N, C\], got"),
        ({"embedding": Tensor.int}, TypeError, "embedding must be floating point, got torch.int32"),
        ({"embedding": Tensor.double}, TypeError, "keys of layer 0 must be torch.float64, as"),
        ({"embedding": lambda e: e.to("meta")}, ValueError, "code must be on meta, as embedding"),
        ({"embedding": lambda e: e[:, :8]}, ValueError, r"attention_norm of block 0 must have"),
        ({"cache": lambda c: KVCache(c.layers[:1])}, ValueError, "the cache must have a layer for"),
        (
            {"cache": lambda c: with_layer(c, values=c.layers[1].values[:, :, :4])},
            ValueError,
            r"values of layer 1 must have shape \(2, 2, 6, 8\), got \(2, 2, 4, 8\)",
        ),
        (
            {"cache": lambda c: with_layer(c, keys=c.layers[1].keys.to(torch.int8))},
            TypeError,
            "keys of layer 1 must be torch.float32, as embedding is, or int8 with a scale, got",
        ),
        (
            {"weights": lambda w: with_block(w, up=Weight(w.blocks[1].up.weight[:5]))},
            ValueError,
            r"up of block 1 must have shape \(20, 16\), got \(5, 16\)",
        ),
        (
            {"weights": lambda w: with_block(w, out=Weight(w.blocks[1].out.weight.half()))},
            TypeError,
            "out of block 1 must be torch.float32, as embedding is, or int8 with a scale, got",
        ),
        (
            {"weights": lambda w: with_block(w, down=Weight(W8, torch.ones(3)))},
            ValueError,
            r"the scale of down of block 1 must be float32 of shape \(16,\), got torch.float32",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary[:, :2])},
            ValueError,
            r"rotary must have shape \(6, 4, 2\), got \(6, 2, 2\)",
        ),
        ({"weights": lambda w: w._replace(eps=-1.0)}, ValueError, "eps must be finite and at"),
        ({"position": lambda p: 6}, ValueError, "position must be in 0..5, got 6"),
        ({"position": lambda p: -1}, ValueError, "position must be in 0..5, got -1"),
        ({"position": lambda p: 1.0}, TypeError, "position must be an int or a tensor, got float"),
        (
            {"position": lambda p: torch.tensor([1, 2])},
            ValueError,
            "position must have 1 elements, got shape",
        ),
        (
            {"position": lambda p: torch.tensor([1.0])},
            TypeError,
            "position must hold integers, got torch.float32",
        ),
    ],
)
def test_refuses_in_one_line(changes, error, message):
    with pytest.raises(error, match=f"^decode_step: {message}") as caught:
        ops.decode_step(*changed(**changes))
    assert "\n" not in str(caught.value)
    # The call that every test here has to make.
    ops.decode_step(*make())


def test_refuses_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        ops.decode_step(*make())
    ops.decode_step(*make())
