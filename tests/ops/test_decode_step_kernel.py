"""Triton's decode_step against float64, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from step_arguments import changed, copied, make
from torch import Tensor
from where_kernels_run import DEVICE, GPU, HALVES, INTERPRETED, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.decoding import Biases, KVCache, LayerCache, in_full
from vfmtok_fast.functional import modulated, rms_norm, rotate
from vfmtok_fast.reference.decode_attention import decode_attention as attention
from vfmtok_fast.reference.decode_step import decode_step as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import decode_step as kernel
from vfmtok_fast.kernels import launch

pytestmark = pytest.mark.usefixtures("poison")
H, T, D, EPS = 3, 5, 4, 1e-5
SIZES = {"H": H, "T": T, "D": D, "V": 30}
PARTS = ("queries", "add", "hidden", "logits")
# Numbers of rows at the ends of all three forms.
ROWS = (1, 2, 4, 5, 16, 64, 65)


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Use few columns at a time, so that the interpreter's small layers have several chunks."""
    if not GPU:
        monkeypatch.setattr(kernel.vector, "CHUNK", 64)


def moved(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE)


def inputs(
    part: str, rows: int, K: int, N: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, the norm's weight, the weight, and the residual or the rotary table."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    outputs = {"queries": 3 * H * D, "hidden": 2 * N}.get(part, N)
    weight = (normal(outputs, K) / K**0.5).to(dtype)
    last = normal(T, D // 2, 2) if part == "queries" else normal(rows, N).to(dtype)
    return normal(rows, K).to(dtype), 1 + 0.2 * normal(K).to(dtype), weight, last


def oracle(part: str, x: Tensor, norm: Tensor, weight: Tensor, last: Tensor) -> list[Tensor]:
    if part == "add":
        return [last + F.linear(x, weight)]
    x = rms_norm(x, norm, EPS)
    if part == "logits":
        y = F.linear(x, weight)
        return [y if y.dtype == torch.float64 else y.float()]
    if part == "hidden":
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return [F.silu(gate) * up]
    q, k, v = F.linear(x, weight).unflatten(-1, (3, H, D)).unbind(1)
    return [rotate(q, last[3]), rotate(k, last[3]), v]


def call(part: str, x: Tensor, norm: Tensor, weight: Tensor, last: Tensor) -> list[Tensor]:
    """Return the kernel's outputs on the CPU; check that only the new cache position is written."""
    x, norm, weight, last = (t.to(DEVICE) for t in (x, norm, weight, last))
    if part == "add":
        kernel._add(last, x, weight, True)
        out = [last]
    elif part == "logits":
        out = [kernel._logits(x, norm, weight, EPS)]
    elif part == "hidden":
        out = [kernel._hidden(x, norm, weight, EPS)]
    else:
        shape = (x.shape[0], H, T, D)
        caches = [x.new_full(shape, float("nan")) for _ in range(2)]
        at = torch.tensor([3], device=DEVICE)
        q = kernel._queries(x, norm, weight, last, *caches, None, None, at, EPS)
        others = [at for at in range(T) if at != 3]
        assert all(bool(cache[:, :, others].isnan().all()) for cache in caches)
        out = [q, *(cache[:, :, 3] for cache in caches)]
    return [t.cpu() for t in out]


def roundings(part: str, K: int) -> int:
    """Most float32 roundings that a product passes through, the sum included, in any order."""
    total = K + 1
    if part == "add":
        return total
    # The norm's weight times x, times 1 / rms, and x once more if it is normalised beforehand. Then
    # half of the error of the mean (product and sum of the squares, the division by K, eps), and
    # that of rsqrt, which is 2^-22.9 on a GPU (PTX ISA), so less than three.
    return total + 3 + -(-(K + 3) // 2) + 3


@pytest.fixture
def check(check_error, check_bound, float32_bounds) -> Callable[..., None]:
    """Check float32 results against their bound, and half precision by `check_error`."""

    def run(part: str, rows: int, K: int, N: int, dtype: torch.dtype, **options) -> None:
        x, norm, weight, last = inputs(part, rows, K, N, dtype, **options)
        wide = [x.double(), norm.double(), weight.double()]
        truth = oracle(part, *wide, last if part == "queries" else last.double())
        got = call(part, x, norm, weight, last.clone())
        if dtype == torch.float32:
            given = [wide[0], wide[2], last.double()] if part == "add" else wide[:3]
            given += [last] if part == "queries" else []
            bounds = float32_bounds(part, given, roundings(part, K))
            for one, exact, bound in zip(got, truth, bounds, strict=True):
                check_bound(one, exact, bound)
        else:
            ruler = oracle(part, x, norm, weight, last)
            for one, exact, own in zip(got, truth, ruler, strict=True):
                check_error(one, exact, own)

    return run


@runs
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(rows, torch.float32) for rows in ROWS]
    # In the interpreter, which is slow, one number of rows for each form.
    + [(rows, dtype) for rows in (ROWS if GPU else (2, 16, 65)) for dtype in HALVES],
)
@pytest.mark.parametrize("part", PARTS)
def test_every_form(part, rows, dtype, check, record):
    launched = record(kernel, "_vector", "_matrix")
    check(part, rows, 200, 40, dtype)
    took = [len(launched[name].launches) for name in ("_vector", "_matrix")]
    assert took == [int(rows <= 4), int(4 < rows <= 64)]


@runs
@given(
    part=st.sampled_from(PARTS), rows=st.integers(1, 9), K=st.integers(1, 150),
    N=st.integers(1, 50), half=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=25 if GPU else 12, deadline=None)
def test_any_shape(part, rows, K, N, half, seed, check_error, check_bound, float32_bounds):
    x, norm, weight, last = inputs(part, rows, K, N, torch.float32, seed)
    if half:
        x, norm = x.half(), norm.half()
        weight = weight.half()
        last = last if part == "queries" else last.half()
    wide = weight.double()
    exact_last = last if part == "queries" else last.double()
    truth = oracle(part, x.double(), norm.double(), wide, exact_last)
    ruler = oracle(part, x, norm, weight, last)
    for one, exact, own in zip(
        call(part, x, norm, weight, last.clone()), truth, ruler, strict=True
    ):
        error, allowed = (float((t.double() - exact).abs().max()) for t in (one, own))
        eps = torch.finfo(x.dtype).eps
        # One rounding on top of twice the reference's error, and a float32 sum of K products in any
        # order.
        slack = eps * float(exact.abs().max()) + 4 * K * 2.0**-24 * (1 + K**0.5)
        assert error <= 2 * allowed + slack


@runs
@pytest.mark.parametrize("space", kernel.SPACES, ids=lambda space: space.name)
def test_every_setting(space, check):
    parts = {"qkv": "queries", "out": "add", "gate_up": "hidden", "down": "add", "head": "logits"}
    kind = space.name.partition(".")[2]
    settings = space.candidates()
    if INTERPRETED and kind in parts:
        # The interpreter has no warps, and at this K no number of them makes a tile smaller.
        settings = list({setting.tile: setting for setting in settings}.values())
    for setting in settings:
        with space.using(setting):
            for part in [parts[kind]] if kind in parts else ("queries", "hidden"):
                for dtype in (torch.float32, torch.float16):
                    check(part, 2 if kind in parts else 6, 136, 19, dtype)


@runs
@pytest.mark.parametrize("part", ["hidden", "logits", "queries"])
@pytest.mark.parametrize("size", [3e4, 1e-3])
@pytest.mark.parametrize("rows", [2, 6])
def test_the_norm_leaves_float16_no_overflow(part, size, rows):
    """x times the norm's weight would overflow, or lose its digits."""
    x, norm, weight, last = inputs(part, rows, 64, 16, torch.float16)
    given = [x.clamp(-1, 1) * size, norm * 8, weight, last]
    wide = weight.double()
    truth = oracle(part, given[0].double(), given[1].double(), wide, last)
    for one, exact in zip(call(part, *given), truth, strict=True):
        assert bool(one.isfinite().all())
        assert float((one - exact).abs().max()) <= 2e-2 * float(exact.abs().max())


@runs
@pytest.mark.parametrize("part", PARTS)
def test_a_row_does_not_depend_on_the_others(part):
    """Within the form that the number of rows selects, a row's bits depend on that row alone."""
    x, norm, weight, last = inputs(part, 9, 200, 40, torch.float32)

    def rows(which: slice | list[int]) -> list[Tensor]:
        own = last if part == "queries" else last[which].clone()
        return call(part, x[which], norm, weight, own)

    # NumPy's products, which the interpreter uses, may round differently by number of columns. Five
    # and eight rows are padded to the same number, nine rows to more.
    last_row = 8 if GPU else 7
    four, many = rows(slice(0, 4)), rows(slice(0, last_row + 1))
    for i in range(4):
        for alone, together in zip(rows([i]), four, strict=True):
            assert torch.equal(alone[0], together[i])
        for two, together in zip(rows([(i + 1) % 4, i]), four, strict=True):
            assert torch.equal(two[1], together[i])
    for few, together in zip(rows([last_row, 3, 2, 1, 0]), many, strict=True):
        assert torch.equal(few, together[[last_row, 3, 2, 1, 0]])


class Noted:
    """In a kernel's place: notes the constants of a launch, and computes nothing."""

    def __init__(self) -> None:
        self.constants: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.constants.append(constants)


@pytest.mark.parametrize(
    ("space", "rows"), [(kernel.FEW, (5, 8, 9, 16)), (kernel.SOME, (17, 32, 33, 64))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("part", ["hidden", "logits"])
def test_a_setting_sums_in_one_order_for_all_rows_of_its_class(
    part, dtype, space, rows, monkeypatch
):
    """Whatever tune chooses: an image must not depend on how many others there are."""
    monkeypatch.setattr(kernel, "_rms_norm", Noted())
    for setting in space.candidates():
        monkeypatch.setattr(kernel, "_matrix", noted := Noted())
        with space.using(setting):
            for count in rows:
                call(part, *inputs(part, count, 1024, 64, dtype))
        assert len({(c["DEPTH"], c["SLICES"]) for c in noted.constants}) == 1, setting
        assert len(noted.constants) == len(rows)


@runs
@pytest.mark.parametrize("rows", [2, 6, 66])
@pytest.mark.parametrize("position", [torch.tensor([0]), torch.tensor(4, dtype=torch.int32)])
def test_position_of_any_form(position, rows):
    """The rows belong to a larger cache; the rest of the batch keeps its values."""
    x, norm, weight, table = inputs("queries", rows, 64, 0, torch.float32)
    caches = [torch.full((rows + 2, H, T, D), 7.0, device=DEVICE) for _ in range(2)]
    q = kernel._queries(
        *(t.to(DEVICE) for t in (x, norm)), weight.to(DEVICE), table.to(DEVICE),
        *(cache[:rows] for cache in caches), None, None, position.to(DEVICE), EPS,
    )  # fmt: skip
    rolled = table.roll(3 - int(position), 0)
    truth = oracle("queries", x, norm, weight, rolled)
    for got, want in zip((q, *(c[:rows, :, int(position)] for c in caches)), truth, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    for cache in caches:
        assert int((cache != 7).sum()) == rows * H * D


@runs
@pytest.mark.parametrize("rar", [None, 10, 80, 88])
@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [2, 3, 8, 70])
def test_a_whole_step(rows, dtype, int8_cache, rar, check_error):
    """Through the op: dispatch uses these kernels for the step and Triton for attention.

    ``rar``: None is a GPT's step, else the size of a RAR's heads.
    """
    sizes = SIZES if rar is None else {**SIZES, "D": rar, "H": 3 if rar == 10 else 1, "rar": True}
    if INTERPRETED and rar in (80, 88) and (rows > 2 or int8_cache):
        pytest.skip("slow in the interpreter, and covered by the other sizes")
    given = make(rows, dtype=dtype, int8_cache=int8_cache, **sizes)
    there = changed(given, moved)
    with vfmtok_fast.enable(["decode_step", "decode_attention"], strict=True):
        got = ops.decode_step(*there)
    assert vfmtok_fast.status().ops["decode_step"].calls["triton"] == 1
    written = changed(there, Tensor.cpu)[3]
    wide = changed(given, lambda t: t.double() if t.dtype == dtype else t)
    # Scales and the table stay float32 in every dtype.
    wide[2] = wide[2]._replace(rotary=given[2].rotary)
    layers = (
        LayerCache(*layer[:2], *(None if s is None else s.float() for s in layer[2:]))
        for layer in wide[3]
    )
    wide[3] = KVCache(tuple(layers))
    # An 8-bit value next to a tie may be rounded the other way, which no dtype's rounding bounds.
    # So the oracle attends to the cache that the kernel wrote, and that cache is checked below.
    attends = (attending_to(written) if int8_cache else attention for _ in range(2))
    truth = reference(*wide, 4, next(attends))
    own = copied(given)
    ruler = reference(*own, 4, next(attends))
    if dtype == torch.float32:
        # Each part has its bound above, but no bound covers two layers. The limit here is a
        # hundredth of a float16 rounding.
        error = float((got.cpu() - truth).abs().max())
        assert error <= 1e-5 * float(truth.abs().max())
    else:
        check_error(got.cpu(), truth, ruler)
    for layer, other in zip(written, own[3], strict=True):
        for ours, want in zip(in_position_3(layer), in_position_3(other), strict=True):
            # Within what the dtype can hold; an 8-bit value may be off by half a step, too.
            most = float(want.abs().max())
            step = most / 127 if int8_cache else 0.0
            assert float((ours - want).abs().max()) <= 8 * torch.finfo(dtype).eps * most + step
        if int8_cache and dtype == torch.float32:
            # Few values are next to a tie. Truncation instead of rounding would change every second
            # one.
            pairs = ((layer[i][:, :, 3], other[i][:, :, 3]) for i in (0, 1))
            assert all(float((ours != want).float().mean()) <= 0.01 for ours, want in pairs)


def attending_to(cache: KVCache) -> Callable[..., Tensor]:
    """Return an attention that reads ``cache``, one layer per call, instead of its arguments."""
    layers = iter(cache)

    def attend(q: Tensor, keys: Tensor, values: Tensor, length: int, **scales: Tensor) -> Tensor:
        layer = next(layers)
        return attention(q, layer.keys, layer.values, length, **layer.scales)

    return attend


def in_position_3(layer: LayerCache) -> list[Tensor]:
    """Return keys and values of the new position, dequantised if they have 8 bits."""
    keys, values, *scales = (None if part is None else part[:, :, 3] for part in layer)
    return [in_full(x, s, torch.float64) for x, s in zip((keys, values), scales, strict=True)]


@runs
@pytest.mark.parametrize("rows", [2, 6])
def test_the_same_bits_on_every_run(rows):
    given = make(rows, dtype=HALVES[0], **SIZES)
    first, *others = (kernel.decode_step(*changed(given, moved), 4, attention) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@runs
def test_no_images():
    given = changed(make(0, **SIZES), moved)
    assert kernel.decode_step(*given, 4, attention).shape == (0, 30)


@runs
def test_what_it_cannot_take():
    given = changed(make(2, **SIZES), moved)
    reason = kernel.unsupported_reason
    assert reason(*given, 4) is None
    assert "not torch.float64" in reason(given[0], given[1].double(), *given[2:], 4)
    strided = given[2]._replace(head=given[2].head.T.contiguous().T)
    assert "contiguous" in reason(*given[:2], strided, *given[3:], 4)
    half = given[2]._replace(rotary=given[2].rotary.half())
    assert "float32 rotary" in reason(*given[:2], half, *given[3:], 4)
    rar = changed(make(2, rar=True, **SIZES), moved)
    assert reason(*rar, 4) is None
    turned = rar[2].condition.transpose(1, 2).contiguous().transpose(1, 2)
    strided = rar[2]._replace(condition=turned)
    assert "conditions" in reason(*rar[:2], strided, *rar[3:], 4)


@runs
@pytest.mark.parametrize("rows", [2, 6, 66])
def test_each_part_of_a_block_is_chosen_by_itself(rows):
    """Biases, head norms and rotation, each without the others."""
    gpt, rar = make(rows, **SIZES), make(rows, rar=True, **SIZES)
    changes = [
        {"biases": rar[2].blocks[0].biases._replace(up=None)},
        {"head_norms": rar[2].blocks[0].head_norms},
        {},
    ]
    for change in changes:
        given = copied(gpt)
        blocks = tuple(block._replace(**change) for block in given[2].blocks)
        given[2] = given[2]._replace(blocks=blocks)
        if not change:
            given[2] = given[2]._replace(rotary=None, head_bias=rar[2].head_bias)
        want = reference(*copied(given), 4, attention)
        got = kernel.decode_step(*changed(given, moved), 4, attention).cpu()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # A condition with rotation, and with SwiGLU.
    turned = copied(rar)
    blocks = (
        g._replace(attention_norm=None, ffn_norm=None, condition=r.condition)
        for g, r in zip(gpt[2].blocks, rar[2].blocks, strict=True)
    )
    turned[2] = rar[2]._replace(blocks=tuple(blocks), rotary=gpt[2].rotary)
    want = reference(*copied(turned), 4, attention)
    got = kernel.decode_step(*changed(turned, moved), 4, attention).cpu()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    bare = [*rar[:2], rar[2]._replace(head_bias=None), *rar[3:]]
    blocks = (b._replace(biases=Biases(), head_norms=None) for b in bare[2].blocks)
    bare[2] = bare[2]._replace(blocks=tuple(blocks))
    want = reference(*copied(bare), 4, attention)
    got = kernel.decode_step(*changed(bare, moved), 4, attention).cpu()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize("size", [3e4, 1e-3])
def test_a_condition_leaves_float16_no_overflow(size):
    x, _, weight, _ = inputs("logits", 3, 64, 16, torch.float16)
    x, condition = x.clamp(-1, 1) * size, torch.full((3, 2, 64), 0.5, dtype=torch.float16)
    truth = F.linear(modulated(x.double(), *condition.double().unbind(1), EPS), weight.double())
    got = kernel._logits(*(t.to(DEVICE) for t in (x, x[0])), weight.to(DEVICE), EPS, None,
                         condition.to(DEVICE)).cpu()  # fmt: skip
    assert bool(got.isfinite().all())
    assert float((got - truth).abs().max()) <= 2e-2 * float(truth.abs().max())


@runs
def test_torch_knows_the_ops_of_a_rar():
    _, embedding, weights, cache, _ = changed(make(2, rar=True, **SIZES), moved)
    block, layer, x = weights.blocks[0], cache[0], embedding[:2].clone()
    at, check, condition = torch.tensor([3], device=DEVICE), torch.library.opcheck, block.condition
    last = block.biases.qkv, list(block.head_norms), condition[:, :2]
    check(kernel._queries, (x, None, block.qkv, None, *layer, at, EPS, *last))
    check(kernel._add, (x, x.clone(), block.out, True, block.biases.out, condition[:, 2]))
    check(kernel._hidden, (x, None, block.up, EPS, True, block.biases.up, condition[:, 3:5]))
    check(kernel._logits, (x, None, weights.head, EPS, weights.head_bias, condition[:, :2]))


@runs
@pytest.mark.parametrize("options", [{}, {"int8_cache": True}], ids=str)
def test_torch_knows_the_ops(options):
    _, embedding, weights, cache, _ = changed(make(2, **SIZES, **options), moved)
    block, layer, x = weights.blocks[0], cache[0], embedding[:2].clone()
    at, check = torch.tensor([3], device=DEVICE), torch.library.opcheck
    check(kernel._queries, (x, block.attention_norm, block.qkv, weights.rotary, *layer, at, EPS))
    check(kernel._add, (x, x.clone(), block.out, True))
    check(kernel._hidden, (x, block.ffn_norm, block.up, EPS))
    check(kernel._logits, (x, weights.norm, weights.head, EPS))


@runs
@pytest.mark.parametrize("rar", [False, True], ids=["gpt", "rar"])
def test_compiles_without_graph_breaks(rar):
    given = make(2, rar=rar, **SIZES)
    at = torch.tensor([3], device=DEVICE)
    eager = changed(given, moved)
    with vfmtok_fast.enable(["decode_step", "decode_attention"], strict=True):
        want = ops.decode_step(*eager[:4], at)
        compiled = torch.compile(ops.decode_step, backend="aot_eager", fullgraph=True)
        traced = changed(given, moved)
        assert torch.equal(compiled(*traced[:4], at), want)
    for layer, other in zip(eager[3], traced[3], strict=True):
        assert torch.equal(layer.keys[:, :, 3], other.keys[:, :, 3])


@pytest.mark.skipif(INTERPRETED, reason="runs without a kernel")
@pytest.mark.parametrize("part", PARTS)
def test_the_bound_tells_float32_from_less(part, check_bound, float32_bounds):
    """Products of TF32 operands, with ten bits, exceed the bound, so it is not too wide."""
    x, norm, weight, last = inputs(part, 3, 200, 40, torch.float32)
    wide = [x.double(), norm.double(), weight.double()]
    exact_last = last if part == "queries" else last.double()
    truth = oracle(part, *wide, exact_last)
    given = [wide[0], wide[2], exact_last] if part == "add" else [*wide, exact_last]
    bounds = float32_bounds(part, given, roundings(part, 200))
    cut = (weight.view(torch.int32) & ~0x1FFF).view(torch.float32)
    with contextlib.suppress(AssertionError):
        for one, exact, bound in zip(oracle(part, x, norm, cut, last), truth, bounds, strict=True):
            check_bound(one, exact, bound)
        pytest.fail("TF32 passed")


@pytest.mark.gpu
@pytest.mark.parametrize("rar", [False, True], ids=["gpt", "rar"])
@pytest.mark.parametrize("rows", [2, 32, 128])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_graph_replays_the_same_bits(rows, overlap, rar, monkeypatch):
    """With overlap, kernels form a chain: each reads what the previous one wrote."""
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    monkeypatch.setattr(launch, "OVERLAP", False)
    given = changed(make(rows, dtype=torch.bfloat16, layers=4, rar=rar, **SIZES), moved)[:4]
    at = torch.tensor([3], device=DEVICE)
    with vfmtok_fast.enable(["decode_step", "decode_attention"], strict=True):
        want = ops.decode_step(*given, at).clone()
        monkeypatch.setattr(launch, "OVERLAP", overlap)
        ops.decode_step(*given, at)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.decode_step(*given, at)
        for _ in range(10):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, want)
