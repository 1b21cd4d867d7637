"""The Triton kernel of append_code: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops

pytest.importorskip("triton")
from vfmtok_fast.kernels import append_code

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in the child pytest")
runs = pytest.mark.gpu if GPU else HERE
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run here")
def test_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__)


def make(B: int, C: int, position: int | Tensor, dtype: torch.dtype, copies: int) -> list:
    embedding = torch.randn(50, C).to(dtype)
    code = torch.randint(0, 50, (B,))
    made = [code, torch.full((B, 6), -1), position, embedding, torch.empty(copies * B, C).to(dtype)]
    return [t.to(DEVICE) if isinstance(t, Tensor) else t for t in made]


def check(*given: int | Tensor) -> None:
    """The same values as the reference, everywhere."""
    other = [t.clone() if isinstance(t, Tensor) else t for t in given]
    other[4].fill_(float("nan"))
    with torch.no_grad():
        ops.append_code(*other)
        given[4].fill_(float("nan"))
        with vfmtok_fast.enable("append_code", strict=True):
            ops.append_code(*given)
    for one, want in zip(given, other, strict=True):
        assert torch.equal(one, want) if isinstance(one, Tensor) else one == want


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("B", "C"), [(1, 1), (3, 96), (300, 7)])
@pytest.mark.parametrize(
    "position", [0, 1, 5, torch.tensor([3]), torch.tensor([5, 6]), torch.tensor([2, 9])], ids=str
)
def test_writes_what_the_reference_writes(B, C, copies, dtype, position, record):
    counters = position.clone() if isinstance(position, Tensor) else position
    kernel = record(append_code, "_append_code")["_append_code"]
    check(*make(B, C, counters, dtype, copies))
    assert len(kernel.launches) == 1


@runs
def test_no_images_and_no_copies():
    check(*make(0, 8, torch.tensor([2, 3]), torch.float32, 2))
    check(*make(0, 8, 2, torch.float32, 2))
    check(*make(3, 8, torch.tensor([2]), torch.float32, 0))


@runs
def test_a_position_outside_writes_no_code():
    """The host does not know it, and no memory but its own may be written."""
    for outside in (-1, 6, 2**40):
        code, codes, position, embedding, x = make(2, 8, torch.tensor([outside]), torch.float32, 1)
        with vfmtok_fast.enable("append_code", strict=True):
            ops.append_code(code, codes, position, embedding, x)
        assert bool((codes == -1).all()) and torch.equal(x, embedding[code])
        assert int(position) == outside + 1


@runs
def test_what_it_cannot_take():
    def reason(*given: int | Tensor) -> str:
        with vfmtok_fast.enable("append_code", strict=True), pytest.raises(RuntimeError) as caught:
            ops.append_code(*given)
        return str(caught.value)

    code, codes, position, embedding, x = make(2, 8, 1, torch.float32, 1)
    assert "no backward" in reason(code, codes, position, embedding.requires_grad_(), x)
    embedding = embedding.detach()
    assert "contiguous" in reason(code, codes.T.contiguous().T, position, embedding, x)
    assert "contiguous" in reason(code, codes, position, embedding.T.contiguous().T, x)
    at = torch.arange(4, device=DEVICE)[::2]
    assert "contiguous position" in reason(code, codes, at, embedding, x)
    wide = torch.zeros(2, 2**15 + 1, device=DEVICE)
    assert "32768" in reason(code % 2, codes, position, wide, wide)


@runs
@pytest.mark.parametrize("position", [1, torch.tensor([1, 2])], ids=str)
def test_torch_knows_the_op(position):
    code, codes, at, embedding, x = make(2, 8, position, torch.float32, 2)
    given = (None, at) if isinstance(position, int) else (at, 0)
    target = torch.ops.vfmtok_fast.append_code_triton.default
    torch.library.opcheck(target, (code, codes, *given, embedding, x))


@pytest.mark.gpu
def test_a_graph_goes_on_counting():
    """Every replay is one step further: columns in turn, each the column before it, plus one."""
    embedding = torch.arange(50.0, device="cuda")[:, None].repeat(1, 8)
    code, codes = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.full((4, 6), -1).cuda()
    at, x = torch.tensor([0, 1], device="cuda"), torch.zeros(8, 8, device="cuda")
    with vfmtok_fast.enable("append_code", strict=True):
        ops.append_code(code, codes.clone(), at.clone(), embedding, x.clone())  # Compiles.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.append_code(code, codes, at, embedding, x)
            code.copy_(x[:4, 0].long() + 1)
    for _ in range(6):
        graph.replay()
    assert torch.equal(codes, torch.arange(6, device="cuda").expand(4, 6))
    assert at.tolist() == [6, 7]
