"""Triton's group_norm_silu and residual_block against float64, on a GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from residual_blocks import block, maps
from torch import Tensor
from where_kernels_run import DEVICE, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops

pytest.importorskip("triton")
from vfmtok_fast.kernels import group_norm_silu as kernel
from vfmtok_fast.kernels import residual_block as block_kernel

FORWARD = ("_partial", "_combine", "_normalize")
BACKWARD = ("_grad_partial", "_grad")
SUMS = kernel.SUMS.setting({"values": 2048, "warps": 4, "chunks": 64})
pytestmark = pytest.mark.usefixtures("poison")


test_in_the_interpreter = in_the_interpreter(__file__)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make(B=2, C=12, H=5, W=7, dtype=torch.float32, mean=3.0) -> list[Tensor]:
    x = last(2 * maps(B, C, H, W) + mean)
    rest = maps(C, seed=1), maps(C, seed=2), maps(C, seed=3)
    return [t.to(DEVICE, dtype) for t in (x, *rest)]


def run(function, arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the result and the gradients of all arguments under a random output gradient."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in arguments]
    out = function(*leaves)
    cotangent = maps(*out.shape, seed=9).to(DEVICE, arguments[0].dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def formula(groups: int, eps: float, shifted: bool):
    def norm(x, weight, bias, shift=None):
        x = x + shift[:, None, None] if shifted else x
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    return norm


# Groups of one channel, of all channels, of a number that is not a power of two; one pixel; several
# chunks of several tiles with rows left over.
SHAPES = {
    "one channel": ({"C": 12}, 12),
    "all": ({"C": 5, "H": 3}, 1),
    "three": ({"C": 12}, 4),
    "one pixel": ({"H": 1, "W": 1, "C": 8}, 2),
    "chunks": ({"B": 1, "C": 160, "H": 61, "W": 67}, 8),
}


@runs
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients(shape, dtype, shifted, check_error, record):
    sizes, groups = SHAPES[shape]
    arguments = make(**sizes, dtype=dtype)[: 4 if shifted else 3]
    launched = record(kernel, *FORWARD, *BACKWARD)

    def ours(x, weight, bias, shift=None):
        return kernel.norm_silu(x, shift, weight, bias, groups, 1e-3)

    with kernel.SUMS.using(SUMS):
        got = run(ours, arguments, dtype)
    assert all(len(recorder.launches) == 1 for recorder in launched.values())
    function = formula(groups, 1e-3, shifted)
    truth = run(function, arguments, torch.float64)
    ruler = run(function, arguments, dtype)
    for one, exact, rounded in zip(got[:4], truth, ruler, strict=False):
        check_error(one, exact, rounded)
    if shifted:
        # The shift's gradient sums that of x over pixels, which is 0 in a group of one channel.
        # Each summand has one rounding.
        error, allowed = (float((x[4] - truth[4]).abs().max()) for x in (got, ruler))
        sizes = truth[1].abs().sum((0, 2, 3)) + truth[4].abs()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * float(sizes.max())
    if shape == "chunks":
        # A chunk has more tiles than are requested at once, and rows are left over.
        constants = launched["_partial"].constants[0]
        assert constants["CHUNK"] > (1 + kernel.AHEAD.value) * constants["ROWS"]
        assert constants["PIXELS"] % constants["CHUNK"] % constants["ROWS"]


@runs
def test_a_mean_far_above_the_deviation():
    """Sums of squares would lose all digits: the deviation is a 10,000th of the mean."""
    x, weight, bias, _ = make(B=1, C=128, H=120, W=120, mean=2e4)
    got = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    exact = formula(4, 1e-6, False)
    truth = exact(x.double(), weight.double(), bias.double())
    # The result depends on differences from the mean, each off by a rounding of the mean.
    assert float((got - truth).abs().max()) <= 4 * 2e4 * torch.finfo(torch.float32).eps


@runs
def test_a_first_pixel_far_from_all_others():
    """In its chunk, differences are taken from this pixel where it is the first of its place.

    The squares of all tiles then cancel, so the deviation has as many roundings as there are tiles.
    """
    x, weight, bias, _ = make(B=1, C=128, H=120, W=120)
    x[:, :, 0, 0] += 1e4
    exact = formula(4, 1e-6, False)
    truth = exact(x.double(), weight.double(), bias.double())
    got = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    ruler = float((exact(x, weight, bias) - truth).abs().max())
    setting = kernel.SUMS.defaults[80]
    tiles = -(-120 * 120 // setting.chunks) // (setting.values // 128) + 1
    allowed = 2 * ruler + tiles * torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert float((got - truth).abs().max()) <= allowed


@runs
def test_bits_repeat_and_do_not_depend_on_the_batch():
    x, weight, bias, _ = make(B=3, H=20, W=20)
    whole = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    assert torch.equal(whole, kernel.group_norm_silu(x, weight, bias, 4, 1e-6))
    alone = kernel.group_norm_silu(last(x[1:2]), weight, bias, 4, 1e-6)
    assert torch.equal(whole[1:2], alone)


@runs
def test_another_layout_is_copied():
    x, weight, bias, _ = make()
    want = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    for other in (x.contiguous(), x.mT.contiguous().mT):
        got = kernel.group_norm_silu(other, weight, bias, 4, 1e-6)
        assert torch.equal(got, want) and got.stride() == want.stride()


@runs
def test_what_is_not_finite_stays_in_its_group():
    x, weight, bias, _ = make(C=8)
    want = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    x[0, 2, 1, 1] = float("nan")
    got = kernel.group_norm_silu(x, weight, bias, 4, 1e-6)
    assert bool(got[0, 2:4].isnan().all())
    got[0, 2:4] = want[0, 2:4]
    assert torch.equal(got, want)


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Disable TF32, to which cuDNN rounds float32 by default."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@runs
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("O", [8, 12])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_block(O, grad, check_error, record):  # noqa: E741
    x = last(maps(2, 8, 5, 6).float()).to(DEVICE)
    flat = [t for pair in block(8, O, torch.float32, O != 8) if pair for t in pair]
    flat = [t.to(DEVICE) for t in flat]
    launched = record(block_kernel, "_add")

    def run_block(x, *parts):
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        pairs += [None] * (5 - len(pairs))
        return ops.residual_block(x, *pairs, num_groups=4)

    def results(dtype):
        if grad:
            return run(run_block, [x, *flat], dtype)
        with torch.no_grad():
            return [run_block(*(t.to(dtype) for t in (x, *flat)))]

    truth, ruler, kept = results(torch.float64), results(torch.float32), x.clone()
    with vfmtok_fast.enable("residual_block", strict=True):
        got = results(torch.float32)
        assert vfmtok_fast.status().ops["residual_block"].calls == {"triton": 1}
    # With gradients, autograd does the addition.
    assert len(launched["_add"].launches) == (not grad) and torch.equal(x, kept)
    for one, exact, rounded in zip(got, truth, ruler, strict=True):
        check_error(one, exact, rounded)


@runs
@pytest.mark.usefixtures("exact_convolutions")
def test_a_block_of_which_little_learns(check_error):
    """Every tensor that requires a gradient gets the right one, when no other does."""

    def gradient(number: int, dtype: torch.dtype) -> Tensor:
        x = last(maps(2, 8, 5, 6).to(DEVICE, dtype))
        flat = [t.to(DEVICE, dtype) for pair in block(8, 12, dtype) for t in pair]
        flat[number].requires_grad_()
        pairs = zip(flat[::2], flat[1::2], strict=True)
        out = ops.residual_block(x, *pairs, num_groups=4)
        return torch.autograd.grad(out.square().sum(), flat[number])[0]

    for number in range(10):
        truth, ruler = gradient(number, torch.float64), gradient(number, torch.float32)
        with vfmtok_fast.enable("residual_block", strict=True):
            got = gradient(number, torch.float32)
            assert vfmtok_fast.status().ops["residual_block"].calls == {"triton": 1}
        check_error(got, truth, ruler)


@runs
@pytest.mark.usefixtures("exact_convolutions")
def test_upsampling_adds_its_bias_in_place(check_error, record):
    x, weight, bias = (
        t.to(DEVICE).float() for t in (maps(2, 8, 5, 6), maps(12, 8, 3, 3), maps(12))
    )
    launched = record(block_kernel, "_add")
    truth = ops.upsample_conv(x.double(), weight.double(), bias.double())
    with torch.no_grad(), vfmtok_fast.enable("upsample_conv", strict=True):
        got = ops.upsample_conv(x, weight, bias)
        empty = ops.upsample_conv(x[:0], weight, bias)
    assert len(launched["_add"].launches) == 1 and empty.shape == (0, *got.shape[1:])
    check_error(got, truth, ops.upsample_conv(x, weight, bias))


@runs
def test_opcheck():
    x, weight, bias, shift = (t.requires_grad_() for t in make(H=2, W=3))
    registered = torch.ops.vfmtok_fast
    for by in (None, shift):
        torch.library.opcheck(registered.group_norm_silu_triton, (x, by, weight, bias, 4, 1e-6))
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    _, mean, rstd = registered.group_norm_silu_triton(x, None, weight, bias, 4, 1e-6)
    gradient = (torch.ones_like(x), x, None, weight, bias, mean, rstd, 4)
    torch.library.opcheck(registered.group_norm_silu_triton_grad, gradient)
    for more in ((None, None), (x, None), (x, bias)):
        torch.library.opcheck(registered.bias_add_triton, (x.clone(), bias, *more))


@runs
def test_second_derivatives_are_refused():
    x, weight, bias, _ = make(H=2, W=3)
    out = kernel.group_norm_silu(x.requires_grad_(), weight, bias, 4, 1e-6)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    arguments = make(H=2, W=3)[:3]
    function = torch.compile(lambda *t: ops.group_norm_silu(*t, 4), fullgraph=True)
    with vfmtok_fast.enable("group_norm_silu", strict=True):
        got = run(function, arguments, torch.float32)
        want = run(lambda *t: ops.group_norm_silu(*t, 4), arguments, torch.float32)
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager)


@runs
def test_calls_that_are_left_to_the_reference():
    x, weight, bias, _ = make()
    with vfmtok_fast.enable("group_norm_silu", strict=True):
        with pytest.raises(vfmtok_fast.switch.FallbackError, match="not torch.float64"):
            ops.group_norm_silu(x.double(), weight.double(), bias.double(), 4)
    assert "2048 channels, not 4096" in kernel.unsupported_map(x, 4096)


@runs
def test_no_images():
    x, weight, bias, _ = make(B=0)
    out = kernel.group_norm_silu(x.requires_grad_(), weight.requires_grad_(), bias, 4, 1e-6)
    out.sum().backward()
    assert out.shape == x.shape and float(weight.grad.abs().sum()) == 0
