"""decode_step: reference and CPU implementation against plain mathematics in float64."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from step_arguments import copied, make
from torch import Tensor
from torch.utils._pytree import tree_map

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.decoding import Biases, KVCache, LayerCache, in_8_bits
from vfmtok_fast.ops import decode_attention
from vfmtok_fast.reference import decode_step as reference

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *HALVES]
WORDS = {"H": 4, "D": 16, "ffn": 96, "V": 40}


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("decode_step")


def oracle(code, embedding, weights, cache, position) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return logits in float64, and the keys and values of the new position in each layer."""

    def layer_norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + weights.eps).sqrt()

    def normalised(x: Tensor, weight: Tensor | None, of_rows: Tensor | None, at: int) -> Tensor:
        if weight is None:
            return layer_norm(x) * of_rows.double()[:, at + 1] + of_rows.double()[:, at]
        return x / (x.square().mean(1, keepdim=True) + weights.eps).sqrt() * weight.double()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight.double().T + (0 if bias is None else bias.double())

    rows, H, _, D = cache[0].keys.shape
    x = embedding.double()[code]
    if weights.condition is not None:
        x = x + weights.condition[:, 0].double()
    written = []
    for block, layer in zip(weights.blocks, cache, strict=True):
        biases, of_rows = block.biases, block.condition
        gates = (1, 1) if of_rows is None else (of_rows[:, 2].double(), of_rows[:, 5].double())
        y = normalised(x, block.attention_norm, of_rows, 0)
        q, k, v = linear(y, block.qkv, biases.qkv).view(rows, 3, H, D).unbind(1)
        if block.head_norms is not None:
            norms = [part.double() for part in block.head_norms]
            q, k = layer_norm(q) * norms[0] + norms[1], layer_norm(k) * norms[2] + norms[3]
        if weights.rotary is not None:
            turn = torch.complex(*weights.rotary[position].double().unbind(-1))
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
        mixed = torch.einsum("rht,rhtd->rhd", share, values).flatten(1)
        x = x + gates[0] * linear(mixed, block.out, biases.out)
        y = linear(normalised(x, block.ffn_norm, of_rows, 3), block.up, biases.up)
        if len(block.up) == block.down.shape[1]:
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
        else:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        x = x + gates[1] * linear(y, block.down, biases.down)
    y = normalised(x, weights.norm, weights.condition, 1)
    return linear(y, weights.head, weights.head_bias), written


def check(arguments: list, slack: float = 1.0) -> Tensor:
    want, written = oracle(*arguments)
    code, embedding, weights, cache, position = arguments = copied(arguments)
    before = copied(arguments)[3]
    got = ops.decode_step(*arguments)
    dtype = embedding.dtype
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # About thirty roundings per layer, of numbers around one, that add up at random. In half
    # precision there are fewer, only where that dtype is stored. Largest seen: 21 and 9.
    roundings = 12 if dtype in HALVES else 40
    atol = roundings * slack * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    for layer, old, (k, v) in zip(cache, before, written, strict=True):
        parts = ((layer.keys, layer.key_scale, k), (layer.values, layer.value_scale, v))
        for cached, scale, exact in parts:
            new = cached[:, :, position].double()
            step = 0.0
            if scale is not None:
                new = new * scale[:, :, position, None]
                step = 0.51 * float(exact.abs().max()) / 127
            torch.testing.assert_close(new, exact, rtol=0, atol=atol + step)
        for now, then in zip(layer, old, strict=True):
            if now is not None:
                others = [t for t in range(now.shape[2]) if t != position]
                assert torch.equal(now[:, :, others].nan_to_num(), then[:, :, others].nan_to_num())
    return got


@pytest.mark.parametrize("rar", [False, True], ids=["gpt", "rar"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 40])
def test_against_plain_mathematics(rows, dtype, rar):
    check(make(rows, dtype=dtype, rar=rar))


@pytest.mark.parametrize("rar", [False, True], ids=["gpt", "rar"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [WORDS, {"ffn": 2050}, {"ffn": 0}], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_sizes_that_take_other_ways(rows, sizes, dtype, rar):
    """Products of whole vectors, of long rows, and with no elements."""
    check(make(rows, dtype=dtype, rar=rar, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_each_part_of_a_block_is_chosen_by_itself(rows, dtype):
    """A rotated RAR, one without head norms, one without biases, and a GPT with some of them."""
    rotary, gpt, rar = (make(rows, dtype=dtype, rar=kind) for kind in (False, False, True))
    given = [
        [*rar[:2], rar[2]._replace(rotary=rotary[2].rotary), *rar[3:]],
        with_blocks(rar, head_norms=None),
        with_blocks(rar, biases=Biases()),
        with_blocks(gpt, head_norms=rar[2].blocks[0].head_norms),
        with_blocks(gpt, biases=rar[2].blocks[0].biases._replace(up=None)),
        [*gpt[:2], gpt[2]._replace(head_bias=rar[2].head_bias, rotary=None), *gpt[3:]],
    ]
    for arguments in given:
        check(arguments)


def with_blocks(arguments: list, **parts) -> list:
    code, embedding, weights, *rest = arguments
    blocks = tuple(block._replace(**parts) for block in weights.blocks)
    return [code, embedding, weights._replace(blocks=blocks), *rest]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "sizes", [{}, WORDS, {"H": 1, "D": 38, "ffn": 37}, {"rar": True, "D": 38, "ffn": 37}], ids=str
)
@pytest.mark.parametrize("rows", [1, 4, 7, 33])
def test_rounds_no_worse_than_the_reference(rows, sizes, dtype, implementation, check_error):
    arguments = make(rows, dtype=dtype, **sizes)
    want, _ = oracle(*arguments)
    ruler = reference.decode_step(*copied(arguments), arguments[4] + 1, decode_attention)
    got = ops.decode_step(*copied(arguments))
    check_error(got, want, ruler)
    assert implementation == "cpu" or torch.equal(got, ruler)


@pytest.mark.parametrize("rar", [False, True], ids=["gpt", "rar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_8_bits(dtype, rar):
    """Scales are float32 in every dtype; half-precision values may round to a neighbour."""
    slack = {torch.float64: 1e9, torch.float16: 4}.get(dtype, 1)
    check(make(3, dtype=dtype, int8_cache=True, rar=rar), slack)


@pytest.mark.parametrize("dtype", HALVES)
def test_rotates_in_float32(dtype):
    """Keys equal those of an identity rotation, rotated in float32 and rounded once more."""
    arguments = make(3, layers=1, dtype=dtype)
    turned, idle = copied(arguments), copied(arguments)
    table = torch.tensor([1.0, 0.0]).expand(6, 4, 2).contiguous()
    idle[2] = idle[2]._replace(rotary=table)
    for one in (turned, idle):
        ops.decode_step(*one)
    keys, still = (one[3][0].keys[:, :, 3].double() for one in (turned, idle))
    turn = torch.complex(*arguments[2].rotary[3].double().unbind(-1))
    want = torch.view_as_real(torch.view_as_complex(still.unflatten(-1, (-1, 2))) * turn)
    # Half an ulp is at most half of eps, and float32's own errors are far smaller.
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(keys, want.flatten(-2), rtol=1.01 * half, atol=2.0**-20)


@pytest.mark.parametrize("size", [3e4, 1e-3])
def test_the_norm_leaves_float16_no_overflow(size):
    """x squared would overflow, or lose its digits."""
    code, embedding, weights, cache, position = make(3, layers=1, dtype=torch.float16)
    embedding = embedding.clamp(-1, 1) * size
    arguments = [code, embedding, weights, cache, position]
    _, ((k, v),) = oracle(*arguments)
    logits = ops.decode_step(*arguments)
    assert logits.isfinite().all()
    eps = torch.finfo(torch.float16).eps
    for cached, exact in ((cache[0].keys, k), (cache[0].values, v)):
        torch.testing.assert_close(cached[:, :, 3].double(), exact, rtol=0, atol=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eps_counts(dtype):
    code, embedding, weights, cache, position = make(dtype=dtype, layers=1)
    for eps in (0, 0.5, 1e3):
        check([code, embedding, weights._replace(eps=eps), cache, position])
    # An input of zeros does not divide by zero.
    ops.decode_step(code, embedding * 0, weights, cache, position)
    for part in cache[0][:2]:
        assert not part[:, :, 3].any()


@given(
    rows=st.integers(1, 8), H=st.integers(1, 3), half=st.integers(1, 6),
    ffn=st.integers(1, 30), V=st.integers(1, 30), position=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES[:2]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(rows, H, half, ffn, V, position, dtype, seed):
    """With two channels a sum may nearly vanish, and the next norm amplifies its rounding error."""
    arguments = make(rows, H, 2 * half, 5, ffn, V, 1, dtype, seed=seed)
    check([*arguments[:4], position], slack=1e3)


@pytest.mark.parametrize(
    "position", [torch.tensor([3]), torch.tensor(3), torch.tensor([3], dtype=torch.int32)], ids=str
)
def test_position_on_the_device(position):
    arguments = make(4)
    want = ops.decode_step(*copied(arguments))
    for length in (None, position + 1):
        got = ops.decode_step(*copied(arguments)[:4], position, length)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
def test_the_class_position_vanishes(int8_cache):
    """The release stores cos = sin = 0 for this position: its q and k are zero, but v is not."""
    code, embedding, weights, cache, _ = arguments = make(int8_cache=int8_cache)
    weights.rotary[0] = 0
    if not int8_cache:
        check([*arguments[:4], 0])
    assert ops.decode_step(code, embedding, weights, cache, 0).isfinite().all()
    for layer in cache:
        assert not layer.keys[:, :, 0].any()
        # With 8 bits, some of the small values are zero.
        assert layer.values[:, :, 0].any(-1).all() if int8_cache else layer.values[:, :, 0].all()
        assert all(scale[:, :, 0].isfinite().all() for scale in layer.scales.values())


def test_a_rotary_table_may_lie_anyhow_and_be_longer():
    """Any strides work, though a complex number needs two adjacent values at an even offset."""
    arguments = make()
    table = arguments[2].rotary
    want = ops.decode_step(*copied(arguments))
    flat = torch.cat([torch.zeros(1), table.flatten()])
    wide = torch.cat([table.flatten(1), torch.zeros(6, 1)], dim=1)
    for other in (
        table.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        flat[1:].view(table.shape),
        wide[:, :8].unflatten(1, (4, 2)),
        torch.cat([table, table]),
    ):
        assert torch.equal(other[:6], table)
        weights = arguments[2]._replace(rotary=other)
        got = ops.decode_step(*arguments[:2], weights, *copied(arguments)[3:])
        assert torch.equal(got, want)


def test_rows_of_a_larger_cache():
    """Guidance passes such a slice of the batch; the whole cache is written through it."""
    code, embedding, weights, small, position = make(2)
    large = KVCache(
        tuple(LayerCache(*(torch.cat([t, t + 1]) for t in layer[:2])) for layer in small)
    )
    before = copied([code, embedding, weights, large])[3]
    got = ops.decode_step(code, embedding, weights, large.first_rows(2), position)
    assert torch.equal(got, ops.decode_step(code, embedding, weights, small, position))
    for whole, part, old in zip(large, small, before, strict=True):
        assert torch.equal(whole.keys[:2].nan_to_num(), part.keys.nan_to_num())
        assert torch.equal(whole.keys[2:].nan_to_num(), old.keys[2:].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, WORDS, {"int8_cache": True}], ids=str)
def test_no_images(options, dtype):
    arguments = make(0, dtype=dtype, **options)
    for position in (3, torch.tensor([3])):
        logits = ops.decode_step(*arguments[:4], position)
        assert logits.shape == (0, options.get("V", 11))
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_it_needs_no_gradient_and_leaves_none(rows):
    """Weights require gradients, as parameters do; the logits and the cache must not."""
    arguments = make(rows)
    want = ops.decode_step(*copied(arguments))

    def learning(part):
        floats = isinstance(part, Tensor) and part.is_floating_point()
        return part.clone().requires_grad_() if floats else part

    embedding, weights = learning(arguments[1]), tree_map(learning, arguments[2])
    code, _, _, cache, position = copied(arguments)
    logits = ops.decode_step(code, embedding, weights, cache, position)
    assert torch.equal(logits, want) and not logits.requires_grad and embedding.grad is None
    assert not any(t.requires_grad for layer in cache for t in layer[:2])


def test_strided_weights():
    arguments = make()

    def spread(part):
        if not isinstance(part, Tensor) or part.ndim != 2:
            return part
        wide = part.new_full((part.shape[0], 2 * part.shape[1]), float("nan"))
        wide[:, ::2] = part
        return wide[:, ::2]

    weights = tree_map(spread, arguments[2])
    assert not weights.head.is_contiguous()
    want = ops.decode_step(*copied(arguments))
    got = ops.decode_step(*arguments[:2], weights, *copied(arguments)[3:])
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_torch_compile_takes_it_without_a_graph_break(implementation):
    arguments = make(4)
    want = ops.decode_step(*copied(arguments)[:4], torch.tensor([3]))
    torch._dynamo.reset()
    compiled = torch.compile(ops.decode_step, backend="aot_eager", fullgraph=True)
    with vfmtok_fast.enable("decode_step" if implementation == "cpu" else ()):
        got = compiled(*copied(arguments)[:4], torch.tensor([3]))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
def test_positions_compile_no_variants(int8_cache):
    """One graph for the first position, one for all others; torch.compile gives up after eight."""
    arguments = make(layers=1, int8_cache=int8_cache)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ops.decode_step, backend=counter, fullgraph=True)
    for position in range(5):
        given = [*copied(arguments)[:4], position]
        want = ops.decode_step(*copied(given))
        torch.testing.assert_close(compiled(*given), want, equal_nan=True)
    assert counter.frame_count <= 2
