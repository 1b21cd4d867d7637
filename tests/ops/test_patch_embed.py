"""`ops.patch_embed`: argument errors, and its kernel against float64, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from where_kernels_run import DEVICE, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.patch_embed import patch_embed as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import patch_embed as kernel

test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def exact():
    """Disable TF32 in cuDNN's float32 convolutions, which are the ruler."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def make(B=2, side=28, P=14, C=9, dtype=torch.float32, images=torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    given = [
        (0.7 * normal(B, 3, side, side)).to(images),
        0.5 + 0.05 * normal(3),
        0.25 + 0.02 * normal(3),
        (normal(C, 3, P, P) / P).to(dtype),
        normal(C).to(dtype),
    ]
    return [part.to(DEVICE) for part in given]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("side", "P"), [(28, 14), (32, 16), (16, 8), (15, 5), (14, 14)])
def test_results(side, P, dtype, check_error, record):
    launches = record(kernel, "_patches")["_patches"].launches
    given = make(3, side, P, dtype=dtype)
    got = kernel.patch_embed(*given)
    truth = reference(*(part.double() for part in given))
    check_error(got, truth, reference(*given))
    assert got.shape == (3, (side // P) ** 2, 9) and len(launches) == 1


@runs
@pytest.mark.parametrize("kind", HALVES)
def test_pictures_of_another_dtype_strides_and_none(kind, check_error):
    given = make(images=kind)
    check_error(
        kernel.patch_embed(*given), reference(*(p.double() for p in given)), reference(*given)
    )
    images, *rest = make()
    assert torch.equal(
        kernel.patch_embed(images.transpose(2, 3).contiguous().transpose(2, 3), *rest),
        kernel.patch_embed(images, *rest),
    )
    assert kernel.patch_embed(images[:0], *rest).shape == (0, 4, 9)


@runs
def test_a_patch_that_is_not_finite_spoils_itself_alone():
    images, *rest = make()
    images[0, 1, 3, 15] = float("nan")
    images[1, 0, 20, 2] = float("inf")
    got = kernel.patch_embed(images, *rest)
    assert got[0, 1].isnan().all()
    got[0, 1] = 0
    assert got.isfinite().all()


@runs
def test_opcheck_and_what_is_taken():
    given = make()
    args = (*given[:3], 14, torch.float16)
    torch.library.opcheck(torch.ops.vfmtok_fast.patches_triton.default, args)
    with torch.no_grad(), vfmtok_fast.enable("patch_embed", strict=True):
        ops.patch_embed(*given)
    assert vfmtok_fast.status().ops["patch_embed"].calls == {"triton": 1}


def test_what_the_kernel_cannot_take():
    given = make()
    assert kernel.unsupported_reason(*given) is None
    double = [part.double() for part in given]
    assert "not torch.float64" in kernel.unsupported_reason(*double)
    given[3].requires_grad_()
    assert "no backward pass" in kernel.unsupported_reason(*given)
    with torch.no_grad():
        assert kernel.unsupported_reason(*given) is None


def test_the_reference_learns():
    given = [part.double().requires_grad_() for part in make(1, 8, 4, 2)]
    assert torch.autograd.gradcheck(ops.patch_embed, given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(2, 3, 28, 14)}, ValueError, "images"),
        ({0: torch.zeros(2, 3, 30, 30)}, ValueError, "multiple of the patch's 14 pixels"),
        ({0: torch.zeros(2, 3, 28, 28, dtype=torch.int32)}, TypeError, "images"),
        ({1: torch.zeros(4)}, ValueError, "mean"),
        ({3: torch.zeros(9, 4, 14, 14)}, ValueError, "weight"),
        ({4: torch.zeros(8)}, ValueError, "bias"),
        ({4: torch.zeros(9, dtype=torch.float16)}, TypeError, "bias"),
        ({2: torch.zeros(3, device="meta")}, ValueError, "std"),
    ],
)
def test_bad_arguments(change, error, message):
    given = [part.cpu() for part in make()]
    for i, value in change.items():
        given[i] = value
    with pytest.raises(error, match=message):
        ops.patch_embed(*given)
