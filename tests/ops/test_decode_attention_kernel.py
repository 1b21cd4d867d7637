"""Triton's decode_attention against float64, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from where_kernels_run import DEVICE, GPU, INTERPRETED, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.decoding import in_8_bits
from vfmtok_fast.reference.decode_attention import decode_attention as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import decode_attention as kernel

pytestmark = pytest.mark.usefixtures("poison")
# Only half precision uses matrix products, which are wrong in the interpreter for bfloat16.
HALF = torch.bfloat16 if GPU else torch.float16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use short tiles in the interpreter, so that its short caches have several tiles.

    Caches are short there because it runs programs one after another.
    """
    if not GPU:
        monkeypatch.setattr(kernel, "MAX_KEYS", 16)


@pytest.fixture
def tile_of():
    """``tile_of(group, D, dtype)``: default keys per tile; a table for this card may differ."""
    spaces = {2: kernel.HALF, 4: kernel.FLOAT32}

    def tile(group: int, D: int, dtype: torch.dtype) -> int:
        values = spaces[dtype.itemsize].defaults[80].values
        return kernel._constants(group, D, dtype.itemsize == 2, values)["TILE"]

    with contextlib.ExitStack() as stack:
        for space in spaces.values():
            stack.enter_context(space.using(space.defaults[80]))
        yield tile


@pytest.fixture
def launches(record):
    return record(kernel, "_decode")["_decode"]


def make(B=2, H=2, G=2, T=70, D=64, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((B, H, D), (B, G, T, D), (B, G, T, D))
    q, k, v = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return q, k, v


def spoil(cache: Tensor, lengths: list[int], garbage: float = float("nan")) -> Tensor:
    """Return the cache with garbage in every dead position."""
    cache = cache.clone()
    for row, length in zip(cache, lengths, strict=True):
        row[:, length:] = garbage
    return cache


def attend(q: Tensor, k: Tensor, v: Tensor, length: int | Tensor) -> Tensor:
    length = length.to(DEVICE) if isinstance(length, Tensor) else length
    return kernel.decode_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), length).cpu()


def as_lengths(length: int | Tensor, rows: int) -> list[int]:
    lengths = length.flatten().tolist() if isinstance(length, Tensor) else [length]
    return lengths * rows if len(lengths) < rows else lengths


@pytest.fixture
def check(check_error):
    """``check(q, k, v, length)``: apply the tolerance rule, with garbage in dead positions."""

    def run(q: Tensor, k: Tensor, v: Tensor, length: int | Tensor, garbage=GARBAGE[0]) -> Tensor:
        lengths = as_lengths(length, len(q))
        got = attend(q, spoil(k, lengths, garbage), spoil(v, lengths, garbage), length)
        truth = reference(q.double(), k.double(), v.double(), torch.tensor(lengths))
        check_error(got, truth, reference(q, k, v, torch.tensor(lengths)))
        return got

    return run


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("D", "group"),
    [(8, 8), (24, 2), (60, 4), (64, 8), (80, 2), (100, 4), (128, 8)]
    + [(D, 1) for D in (8, 24, 60, 64, 80, 100, 128)],
)
def test_head_dims_and_groups(D: int, group: int, dtype: torch.dtype, check, launches):
    for length in (1, 37):
        check(*make(B=1, H=2 * group, G=2, T=40, D=D, dtype=dtype), length)
    assert [constants["D"] for constants in launches.constants] == [D, D]
    # Half precision reads a key-value head once for all query heads that share it.
    assert launches.constants[0]["R"] == (1 if dtype == torch.float32 else group)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_tile_borders(dtype: torch.dtype, check, tile_of):
    tile = tile_of(1, 64, dtype)
    T = 4 * tile + 3
    q, k, v = make(T=T, dtype=dtype)
    for length in (1, 2, tile - 1, tile, tile + 1, 3 * tile, 4 * tile, T - 1, T):
        check(q, k, v, length)


@runs
@pytest.mark.parametrize("stages", [1, 2] if GPU else [1])
@pytest.mark.parametrize("matrix", [0, 1])
@pytest.mark.parametrize("D", [64, 100] if GPU else [60])
def test_half_precision_with_and_without_the_matrix_unit(D, matrix, stages, check, launches):
    values = {"values": 4096, "stages": stages, "warps": 4, "matrix": matrix, "resident": 0}
    with kernel.HALF.using(kernel.HALF.setting(values)):
        for length in (1, 16, 33, 70):
            check(*make(D=D, dtype=HALF), length)
        # Queries that share keys always use the matrix unit.
        check(*make(H=4, D=D, dtype=HALF), 37)
    rows = [constants["ROWS"] for constants in launches.constants]
    assert rows == [16 if matrix else 1] * 4 + [16]


@runs
@pytest.mark.parametrize(
    ("H", "G", "D", "eight"), [(2, 2, 64, False), (6, 2, 24, False), (3, 3, 24, True)]
)
def test_programs_that_go_from_head_to_head_change_no_bit(H, G, D, eight, launches, monkeypatch):
    monkeypatch.setattr(kernel, "WANTED_PROGRAMS", 2)
    q, k, v = make(B=5, H=H, G=G, D=D)
    (k, k_scale), (v, v_scale) = (in_8_bits(x) if eight else (x.to(HALF), None) for x in (k, v))
    scales = {"k_scale": k_scale.to(DEVICE), "v_scale": v_scale.to(DEVICE)} if eight else {}
    tensors = [x.to(DEVICE) for x in (q.to(HALF), k, v)]
    default, got = kernel.HALF.defaults[80], {0: [], 2: []}
    for resident, made in got.items():
        with kernel.HALF.using(default._replace(resident=resident)):
            for length in (1, 16, 33, torch.tensor([70]), torch.tensor([0]), torch.tensor([9] * 5)):
                length = length.to(DEVICE) if isinstance(length, Tensor) else length
                made.append(kernel.decode_attention(*tensors, length, **scales))
    for one, other in zip(*got.values(), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    # If each row has its own length, each (row, head) pair has its own program.
    assert [c["RESIDENT"] for c in launches.constants] == [False] * 6 + [True] * 5 + [False]


@runs
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8])
def test_lengths_of_any_form(integer: torch.dtype, check, launches):
    q, k, v = make(B=3, dtype=HALF)
    check(q, k, v, torch.tensor([1, 70, 33], dtype=integer))
    check(q, k, v, torch.tensor([[9], [1], [16]], dtype=integer))
    check(q, k, v, torch.tensor([60, 0, 16, 0, 3, 0], dtype=integer)[::2])
    one = [check(q, k, v, length) for length in (torch.tensor([37]), torch.tensor(37), 37)]
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    assert [constants["EACH"] for constants in launches.constants] == [1, 1, 1, 0, 0, 0]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "D"), [(2, 2, 64), (6, 2, 100), (3, 1, 12)])
def test_caches_of_8_bits(H: int, G: int, D: int, dtype: torch.dtype, check_error):
    """Scales of dead positions are NaN; the truth uses the dequantised caches."""
    q, k, v = make(H=H, G=G, D=D)
    (k, k_scale), (v, v_scale) = in_8_bits(k), in_8_bits(v)
    q = q.to(dtype)
    for length in (1, 17, 70):
        spoilt = [x.clone().to(DEVICE) for x in (k, v, k_scale, v_scale)]
        for scale in spoilt[2:]:
            scale[:, :, length:] = float("nan")
        keys, values, k_by, v_by = spoilt
        got = kernel.decode_attention(
            q.to(DEVICE), keys, values, length, k_scale=k_by, v_scale=v_by
        ).cpu()
        full = [(x.double() * by[..., None]) for x, by in ((k, k_scale), (v, v_scale))]
        ruler = reference(q, k, v, length, k_scale=k_scale, v_scale=v_scale)
        check_error(got, reference(q.double(), *full, length), ruler)


@runs
@pytest.mark.parametrize("garbage", GARBAGE)
def test_dead_positions_do_not_matter(garbage: float, check):
    for dtype in (torch.float32, HALF):
        check(*make(H=4, dtype=dtype), torch.tensor([17, 3]), garbage=garbage)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_no_live_position_gives_nan_as_the_reference_does(dtype: torch.dtype):
    q, k, v = make(dtype=dtype)
    none = torch.tensor([0, 5])
    got, want = attend(q, k, v, none), reference(q, k, v, none)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got[0].isnan().all())


@runs
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_live_values_that_are_not_finite_show_as_in_the_reference(dtype: torch.dtype):
    q, k, v = make(B=6, T=40, dtype=dtype)
    q[:, :, 0] = q[:, :, 0].abs() + 1
    k[0, 0, 20, 3] = float("nan")
    k[1, 1, :20, 0] = -float("inf")  # Weight 0 in the first tiles: every key of some lanes.
    k[2, 0, :, 0] = -float("inf")
    k[3, 0, 39, 0] = float("inf")
    v[4, 0, 2, 5] = float("inf")
    got, want = attend(q, k, v, 40), reference(q, k, v, 40)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert not got[5].isnan().any() and not got[1].isnan().any()


@runs
def test_large_scores_pick_their_value():
    q, k, v = make(dtype=torch.float32)
    best = torch.einsum("bhd,bhtd->bht", q, k).argmax(-1)
    want = v.gather(2, best[:, :, None, None].expand(-1, -1, 1, 64))[:, :, 0]
    assert torch.equal(attend(q * 1e4, k, v, 70), want)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_any_strides(dtype: torch.dtype, check_error):
    """Accept layers of a larger cache, positions outside heads, and keys laid out unlike values.

    Bits are the same if the layout allows the same loads. If it allows only narrower loads, a GPU
    sums float32 in another order, and the tolerance rule applies. The matrix unit has only one
    order.
    """
    q, k, v = make(B=4, D=24, dtype=dtype)
    want = attend(q[:2].clone(), k[:2].clone(), v[:2].clone(), 50)
    layers = torch.stack([v, k, v]).to(DEVICE)[:, :2]
    assert torch.equal(attend(q[:2], layers[1], layers[2], 50), want)
    outside = k.transpose(1, 2).contiguous().transpose(1, 2)[:2].to(DEVICE)
    padded = torch.full((2, 2, 90, 40), float("nan"), dtype=dtype, device=DEVICE)
    padded[:, :, 5:75, 3:27] = v[:2].to(DEVICE)
    queries = torch.stack([q, q], -1)[:2, ..., 0].to(DEVICE)
    got = kernel.decode_attention(queries, outside, padded[:, :, 5:75, 3:27], 50).cpu()
    if dtype == torch.float32 and GPU:
        truth = reference(*(x[:2].double() for x in (q, k, v)), 50)
        check_error(got, truth, reference(q[:2], k[:2], v[:2], 50))
    else:
        assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_no_batch_compiles_a_variant():
    """The batch size must not select another compiled variant, or a row's bits could depend on it.

    The caches are laid out as in generation. The test compares what real launches compile, and
    needs no GPU.
    """
    from vfmtok_fast.kernels.compiling import compile_only

    def key(*tensors: Tensor) -> str:
        with compile_only(90) as launches:
            kernel.decode_attention(*tensors, 7)
        assert [launch.kernel for launch in launches] == ["_decode"]
        return launches[0].compiled.hash

    for H, T, D in ((12, 256, 64), (3, 16, 12)):
        for dtype in (torch.float32, torch.bfloat16):
            whole = make(8, H, H, T, D, dtype)
            apart = [make(B, H, H, T, D, dtype) for B in (1, 2, 3, 7)]
            parts = [[x[:B] for x in whole] for B in (1, 2, 4)]
            assert len({key(*tensors) for tensors in (whole, *apart, *parts)}) == 1
    # A check of the test itself: a layout with narrower loads compiles another variant.
    q, k, v = make(8, 3, 3, 16, 12)
    assert key(q, k.transpose(1, 2).contiguous().transpose(1, 2), v) != key(q, k, v)


@runs
def test_no_rows():
    q, k, v = make(B=0)
    for length in (3, torch.tensor([3]), torch.tensor([], dtype=torch.int64)):
        assert attend(q, k, v, length).shape == q.shape


@runs
@given(data=st.data(), G=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 33]),
       T=st.integers(1, 50), D=st.integers(1, 128), half=st.booleans(),
       seed=st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_shape(data, G, group, T, D, half, seed):
    q, k, v = make(2, G * group, G, T, D, HALF if half else torch.float32, seed)
    lengths = data.draw(st.lists(st.integers(1, T), min_size=2, max_size=2))
    length = data.draw(st.sampled_from([lengths[0], torch.tensor(lengths)]))
    lengths = as_lengths(length, 2)
    got = attend(q, spoil(k, lengths), spoil(v, lengths), length)
    truth = reference(q.double(), k.double(), v.double(), torch.tensor(lengths))
    ruler = (reference(q, k, v, torch.tensor(lengths)) - truth).abs().max()
    rounding = torch.finfo(q.dtype).eps * truth.abs().max()
    assert got.dtype == q.dtype and (got - truth).abs().max() <= 2 * ruler + rounding


@runs
def test_the_switch_takes_it_and_says_why_not():
    q, k, v = (x.to(DEVICE) for x in make(D=128))
    with vfmtok_fast.enable("decode_attention", strict=True):
        assert torch.equal(ops.decode_attention(q, k, v, 9).cpu(), attend(q, k, v, 9))
        assert vfmtok_fast.status().ops["decode_attention"].calls == {"triton": 1}
        wide = [torch.cat([x, x[..., :1]], -1) for x in (q, k, v)]
        for arguments, reason in (
            ([x.double() for x in (q, k, v)], "triton: .* not torch.float64"),
            (wide, "triton: .* not 129"),
            ([x[..., ::2] for x in (q, k, v)], "triton: it takes caches whose last stride is 1"),
            ([q.clone().requires_grad_(), k, v], "triton: it has no backward pass"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                ops.decode_attention(*arguments, 9)
        with torch.no_grad():
            ops.decode_attention(q.clone().requires_grad_(), k, v, 9)


@runs
@pytest.mark.parametrize("length", [9, torch.tensor([9]), torch.tensor([9, 20])])
def test_opcheck(length: int | Tensor):
    q, k, v = (x.to(DEVICE) for x in make(T=20, D=24))
    lengths, number = (length.to(DEVICE), 0) if isinstance(length, Tensor) else (None, length)
    op = torch.ops.vfmtok_fast.decode_attention_triton
    torch.library.opcheck(op, (q, k, v, None, None, lengths, number))
    (k, k_scale), (v, v_scale) = in_8_bits(k), in_8_bits(v)
    torch.library.opcheck(op, (q, k, v, k_scale, v_scale, lengths, number))


@runs
@pytest.mark.parametrize("form", ["int", "tensor"])
def test_torch_compile_takes_it_without_a_graph_break_or_a_graph_per_length(form: str):
    from torch._dynamo.testing import CompileCounterWithBackend

    q, k, v = (x.to(DEVICE) for x in make(T=20, D=24))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, length: int | Tensor) -> Tensor:
        return ops.decode_attention(q * 2, k, v, length) + 1

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    with vfmtok_fast.enable("decode_attention", strict=True):
        for n in (3, 4, 5, 16, 17, 20):
            length = n if form == "int" else torch.tensor([n], device=DEVICE)
            assert torch.equal(compiled(q, length), step(q, length))
        assert "triton (compiled)" in vfmtok_fast.status().ops["decode_attention"].calls
    # torch.compile first treats an int as a constant, then as a symbol of any value.
    assert graphs.frame_count <= (2 if form == "int" else 1)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_length_compiles_a_variant():
    kept = [p.name for p in kernel._decode.params if p.do_not_specialize]
    assert kept == ["length", "pairs"]


@pytest.mark.gpu
def test_lengths_share_compiled_kernels():
    q, k, v = (x.cuda() for x in make(T=256, dtype=torch.bfloat16))
    kernel.decode_attention(q, k, v, 7)
    before = len(kernel._decode.device_caches[q.device.index][0])
    for length in (1, 2, 15, 16, 17, 32, 255, 256):
        kernel.decode_attention(q, k, v, length)
    assert len(kernel._decode.device_caches[q.device.index][0]) == before


@pytest.mark.gpu
def test_cuda_graph_counts_on(check_error):
    """A captured graph stays correct when its length tensor grows between replays."""
    T = 256
    q, k, v = make(B=2, H=4, G=4, T=T, dtype=torch.bfloat16)
    at = torch.ones(1, dtype=torch.int64, device="cuda")
    arguments = [x.cuda() for x in (q, k, v)]
    kernel.decode_attention(*arguments, at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.decode_attention(*arguments, at)
        at.add_(T // 8 - 3)
    for length in range(1, T, T // 8 - 3):
        graph.replay()
        truth = reference(q.double(), k.double(), v.double(), length)
        check_error(captured.cpu(), truth, reference(q, k, v, length))


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """In a cache of 5 GB, the offset of the last row does not fit in 32 bits."""
    k = torch.zeros(5, 4, 2**20, 128, dtype=torch.bfloat16, device="cuda")
    k[4, 3, :3] = torch.randn(3, 128)
    q = torch.randn(5, 4, 128, dtype=torch.bfloat16, device="cuda")
    got = kernel.decode_attention(q, k, k, 3)
    want = reference(q, k, k, 3)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert float(got[4, 3].abs().max()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    q, k, v = make(dtype=torch.bfloat16)
    got = kernel.decode_attention(*(x.to("cuda:1") for x in (q, k, v)), 50)
    assert torch.equal(got.cpu(), attend(q, k, v, 50))
