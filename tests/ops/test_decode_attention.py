"""decode_attention: reference and CPU implementation against full attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vfmtok_fast.decoding import in_8_bits
from vfmtok_fast.ops import decode_attention

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("decode_attention")


def make(B=3, H=4, G=4, T=9, D=24, seed=0, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(B, H, D), normal(B, G, T, D), normal(B, G, T, D)


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The last row of causal attention over the live positions, one image at a time."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b, length in enumerate(lengths):
        keys, values = (x[b, :, :length].double().repeat_interleave(group, dim=0) for x in (k, v))
        queries = torch.zeros_like(keys)
        queries[:, -1] = q[b].double()
        mixed = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True
        )
        rows.append(mixed[0, :, -1])
    return torch.stack(rows)


def bound(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return a first-order bound of the rounding error of the result.

    A score is D products and sums, rounded to q's dtype, of magnitude up to max|q.k| / sqrt(D). An
    error e of the scores changes the output by at most 2 e max|v|. The weights, their sum and the
    output are each rounded once more, and the sum over T positions adds its own error.
    """
    wide = q.dtype == torch.float64
    eps = torch.finfo(q.dtype).eps
    inner = eps if wide else max(torch.finfo(torch.float32).eps, eps / q.shape[-1])
    size = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) / math.sqrt(
        q.shape[-1]
    )
    scores = (q.shape[-1] * inner + eps) * size
    return (2 * scores + 3 * eps + k.shape[2] * inner) * float(v.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("D", [1, 24, 60, 64, 100])
def test_matches_full_attention(D, H, G, dtype):
    q, k, v = make(H=H, G=G, D=D, dtype=dtype)
    for length in (1, 5, 9):
        got = decode_attention(q, k, v, length)
        assert got.dtype == dtype and got.shape == q.shape
        error = (got.double() - oracle(q, k, v, [length] * 3)).abs().max()
        assert error <= bound(q, k, v), length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_full_attention_of_many_heads(dtype):
    """On a CPU this many heads take another code path; positions beyond the length hold NaN."""
    q, k, v = make(B=50, H=8, G=4, T=12, D=16, dtype=dtype)
    k[:, :, 7:], v[:, :, 7:] = float("nan"), float("nan")
    for length in (7, torch.tensor([7])):
        got = decode_attention(q, k, v, length)
        assert got.dtype == dtype
        live = k[:, :, :7], v[:, :, :7]
        assert (got.double() - oracle(q, k, v, [7] * 50)).abs().max() <= bound(q, *live)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), B=st.integers(1, 4), G=st.integers(1, 3), group=st.integers(1, 3),
    T=st.integers(1, 20), D=st.integers(1, 20), garbage=st.sampled_from(GARBAGE),
)  # fmt: skip
def test_length_in_every_form_and_garbage_beyond_it(data, B, G, group, T, D, garbage):
    q, k, v = make(B, G * group, G, T, D, dtype=torch.float64)
    lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    integer = data.draw(st.sampled_from([torch.int64, torch.int32, torch.uint16]))

    def spoil(x: Tensor, lengths: list[int]) -> Tensor:
        x = x.clone()
        for row, length in zip(x, lengths, strict=True):
            row[:, length:] = garbage
        return x

    per_row = decode_attention(
        q, spoil(k, lengths), spoil(v, lengths), torch.tensor(lengths, dtype=integer)
    )
    torch.testing.assert_close(per_row, oracle(q, k, v, lengths), rtol=1e-12, atol=1e-12)
    same = [lengths[0]] * B
    want = oracle(q, k, v, same)
    for length in (lengths[0], torch.tensor(lengths[:1], dtype=integer), torch.tensor(lengths[0])):
        got = decode_attention(q, spoil(k, same), spoil(v, same), length)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2)])
def test_caches_of_8_bits_stand_for_numbers_times_scales(H, G, dtype):
    q, k, v = make(H=H, G=G)
    (k, k_scale), (v, v_scale) = in_8_bits(k), in_8_bits(v)
    full = [(x.double() * by[..., None]) for x, by in ((k, k_scale), (v, v_scale))]
    q = q.to(dtype)
    k_scale[:, :, 7:], v_scale[:, :, 7:] = float("nan"), float("nan")
    for length, lengths in ((7, [7] * 3), (torch.tensor([7, 1, 3]), [7, 1, 3])):
        got = decode_attention(q, k, v, length, k_scale=k_scale, v_scale=v_scale)
        assert got.dtype == dtype
        # Keys and values are rounded to q's dtype once more.
        allowed = bound(q, *full) + 2 * bound(q.to(dtype), *full) / 3
        assert float((got - oracle(q, *full, lengths)).abs().max()) <= allowed


def test_8_bits_need_both_caches_and_both_scales():
    q, k, v = make()
    (k8, k_scale), (v8, v_scale) = in_8_bits(k), in_8_bits(v)
    for caches, scales, error, message in (
        ((k8, v8), (None, None), TypeError, "k_cache must be floating point, got torch.int8"),
        ((k8, v8), (k_scale, None), TypeError, "with scales v_scale must be torch.float32 of 3"),
        ((k8, v), (k_scale, v_scale), TypeError, "with scales v_cache must be torch.int8 of 4"),
        ((k8, v8), (k_scale, v_scale[:, :, :5]), ValueError, r"v_scale must have shape \(3, 4, 9"),
    ):
        with pytest.raises(error, match=f"^decode_attention: {message}"):
            decode_attention(q, *caches, 3, k_scale=scales[0], v_scale=scales[1])
    # A valid call, the base of every wrong one above.
    decode_attention(q, k8, v8, 3, k_scale=k_scale, v_scale=v_scale)


def test_one_position_gives_its_value():
    q, k, v = make()
    assert torch.equal(decode_attention(q, k, v, 1), v[:, :, 0])


def test_large_scores_do_not_overflow():
    q, k, v = make(dtype=torch.float64)
    got = decode_attention(q * 1e4, k, v, 9)
    best = torch.einsum("bhd,bhtd->bht", q, k).argmax(-1)
    assert torch.equal(got, v.gather(2, best[:, :, None, None].expand(-1, -1, 1, 24))[:, :, 0])


def test_a_slice_of_a_larger_cache():
    """The generator passes such slices: one layer, some rows, strides unlike a new tensor's."""
    q, k, v = make(B=4)
    keys, values = torch.stack([v, k, v]), torch.stack([k, v, k])
    got = decode_attention(q[:2], keys[1, :2], values[1, :2], 7)
    assert torch.equal(got, decode_attention(q[:2], k[:2].clone(), v[:2].clone(), 7))


Q, K, V = make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0], K, V, 1), ValueError, r"q must have shape \[B, H, D\], got \(4, 24\)"),
        ((Q, K[0], V, 1), ValueError, r"k_cache must have shape \[B, G, T, D\], got \(4, 9, 24\)"),
        (
            (Q, K[:2], V, 1),
            ValueError,
            r"k_cache must have shape \(3, 4, 9, 24\), got \(2, 4, 9, 24",
        ),
        ((Q, K[..., :8], V, 1), ValueError, r"k_cache must have shape \(3, 4, 9, 24\), got"),
        (
            (Q, K, V[:, :, :8], 1),
            ValueError,
            r"v_cache must have shape \(3, 4, 9, 24\), got \(3, 4, 8",
        ),
        ((Q, K, None, 1), TypeError, "v_cache must be a torch.Tensor, got NoneType"),
        (
            (Q, K[:, :3], V[:, :3], 1),
            ValueError,
            "query heads must be a multiple of .* 4 and 3",
        ),
        (
            (Q, K[:, :0], V[:, :0], 1),
            ValueError,
            "query heads must be a multiple of .* 4 and 0",
        ),
        (
            (Q.half(), K, V, 1),
            TypeError,
            "k_cache must be torch.float16, as q is, got torch.float32",
        ),
        ((Q, K, V.double(), 1), TypeError, "v_cache must be torch.float32, as q is, got"),
        ((Q, K, V.to("meta"), 1), ValueError, "v_cache must be on cpu, as q is, got meta"),
        ((Q.long(), K, V, 1), TypeError, "q must be floating point, got torch.int64"),
        ((Q, K, V, 0), ValueError, r"length must be in \[1, 10\), got 0"),
        ((Q, K, V, 10), ValueError, r"length must be in \[1, 10\), got 10"),
        ((Q, K, V, True), TypeError, "length must be an int, got bool"),
        ((Q, K, V, 2.0), TypeError, "length must be an int, got float"),
        ((Q, K, V, torch.tensor(2.0)), TypeError, "length must hold integers, got torch.float32"),
        ((Q, K, V, torch.tensor(True)), TypeError, "length must hold integers, got torch.bool"),
        (
            (Q, K, V, torch.ones(2).long()),
            ValueError,
            r"length must have 1 or 3 elements, got .*\(2,",
        ),
        ((Q, K, V, torch.tensor([1], device="meta")), ValueError, "length must be on cpu, as q is"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^decode_attention: {message}") as caught:
        decode_attention(*arguments)
    assert "\n" not in str(caught.value)
