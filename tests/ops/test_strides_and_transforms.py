"""Every differentiable op accepts any strides and any torch.func transform.

The CPU implementations are tested here, the kernels on a GPU or in a child pytest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from where_kernels_run import DEVICE, GPU, INTERPRETED, in_the_interpreter

import vfmtok_fast as vf
from vfmtok_fast import ops

KERNELS = GPU or INTERPRETED
# On a CPU these ops have only their references.
WITHOUT = {"group_norm_silu", "residual_block"}
pytestmark = [pytest.mark.gpu] if GPU else []

test_in_the_interpreter = in_the_interpreter(__file__)


def made(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw).to(DEVICE) for shape in shapes)


# A function of tensors and the tensors for it.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (ops.linear, made((5, 16), (8, 16), (8,))),
    **{
        f"linear, {name}": (partial(ops.linear, activation=name), made((5, 16), (8, 16), (8,)))
        for name in ("gelu", "relu", "swiglu")
    },
    "add_norm": (lambda *a: ops.add_norm(*a, eps=1e-6)[1], made((5, 16), (5, 16), (16,), (16,))),
    "upsample_conv": (ops.upsample_conv, made((1, 16, 3, 4), (16, 16, 3, 3), (16,))),
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, w, b, 4),
        made((1, 16, 3, 4), (16,), (16,)),
    ),
    "residual_block": (
        lambda x, w1, b1, c1, d1, w2, b2, c2, d2: ops.residual_block(
            x, (w1, b1), (c1, d1), (w2, b2), (c2, d2), num_groups=4
        ),
        made(*[(1, 16, 3, 4), *2 * [(16,), (16,), (16, 16, 3, 3), (16,)]]),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, torch.arange(5, device=DEVICE), bias=b),
        made((5, 16), (24, 16), (24,)),
    ),
    "deformable_sample": (
        lambda value, at, *how: ops.deformable_sample(value, ((4, 4),), at.sigmoid(), *how),
        made((1, 16, 2, 16), (1, 3, 1, 2), (1, 3, 2, 1, 4, 2), (1, 3, 2, 4)),
    ),
}  # fmt: skip


def spread(tensor: Tensor) -> Tensor:
    """Return the same values as every other element of a last dimension twice as large."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def check_taken(name: str) -> None:
    """Check that all calls used the implementation under test."""
    op = name.partition(",")[0]
    expected = "triton" if KERNELS else "reference" if op in WITHOUT else "cpu"
    assert set(vf.status().ops[op].calls) == {expected}


@pytest.fixture(autouse=True)
def enabled(clean_switch):
    with vf.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", vf.switch.FallbackWarning)
        yield


@pytest.mark.parametrize("name", CASES)
def test_strides(name: str):
    """Values and gradients are right if one tensor, or every one, is strided."""
    call, given = CASES[name]

    def of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        tensors = tuple(tensor.requires_grad_() for tensor in tensors)
        out = call(*tensors)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    want = of(tuple(tensor.clone() for tensor in given))
    chosen = [{i} for i in range(len(given))] + [set(range(len(given)))]
    for which in chosen:
        got = of(tuple(spread(t) if i in which else t.clone() for i, t in enumerate(given)))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(call(*map(spread, given)), want[0], rtol=1e-5, atol=1e-5)
    check_taken(name)


@pytest.mark.parametrize("name", CASES)
def test_a_row_for_all(name: str):
    """The last argument is one number, expanded: its storage has one element only."""
    call, given = CASES[name]
    one = given[-1].flatten()[:1].expand(given[-1].numel()).view(given[-1].shape)
    with torch.inference_mode():
        got, want = call(*given[:-1], one), call(*given[:-1], one.clone())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    check_taken(name)


@pytest.mark.parametrize("name", CASES)
def test_transforms_are_the_references(name: str):
    """Transforms use the references, because kernels have no tangents and no batching rules.

    Otherwise the tangent would silently count as zero.
    """
    call, given = CASES[name]
    tangents = made(*(tensor.shape for tensor in reversed(given)))[::-1]

    def answers() -> list[Tensor]:
        backward = torch.func.grad(lambda *tensors: call(*tensors).square().sum())(*given)
        rows = torch.func.vmap(lambda x: call(x, *given[1:]))(torch.stack([given[0]] * 2))
        if name == "deformable_sample":  # torch's grid_sample has no forward mode, and says so.
            return [backward, rows]
        with forward_ad.dual_level():
            x = forward_ad.make_dual(given[0], tangents[0])
            forward = forward_ad.unpack_dual(call(x, *given[1:])).tangent
        return [backward, rows, forward, *torch.func.jvp(call, given, tangents)]

    got = answers()
    with vf.enable([]):
        want = answers()
    for ours, theirs in zip(got, want, strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    op = name.partition(",")[0]
    assert any("torch.func" in why for why in vf.status().ops[op].fallbacks)


def test_gradients_of_each_image():
    """Codes and classes are mapped too; their range is checked all the same."""
    config = vf.GPTConfig(
        num_layers=1, num_heads=2, dim=16, vocab_size=32, block_size=4, num_classes=3
    )
    model = vf.GPT(config).eval()
    torch.nn.init.normal_(model.head.weight)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    codes, classes = torch.randint(32, (3, 4)), torch.arange(3)

    def loss(weights: dict[str, Tensor], codes: Tensor, class_id: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (codes[None], class_id[None]))
        return ops.linear_cross_entropy(logits[0], torch.eye(32), codes)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, codes, classes)
    for image in range(3):
        one = torch.func.grad(loss)(weights, codes[image], classes[image])
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[image], one[name], rtol=1e-4, atol=1e-6)
    for wrong in (
        lambda: torch.func.grad(loss)(weights, codes[0], classes[0] + 3),
        lambda: torch.func.vmap(loss, (None, 0, 0))(weights, codes, classes + 1),
    ):
        with pytest.raises(ValueError, match=r"class_ids must be in \[0, 3\), got 3"):
            wrong()


def test_transforms_are_refused_where_a_fallback_is():
    call, given = CASES["linear"]
    with vf.enable(strict=True), pytest.raises(vf.switch.FallbackError, match=r"torch\.func"):
        torch.func.jvp(call, given, given)


@pytest.mark.skipif(KERNELS, reason="what a CPU keeps")
def test_draws_under_tracing_leave_nothing_behind():
    logits, ids = torch.randn(4, 50), torch.arange(4)
    want = ops.sample_token(logits, ids, 1)
    with FakeTensorMode() as mode:
        assert ops.sample_token(mode.from_tensor(logits), mode.from_tensor(ids), 1).shape == (4,)
    traced = torch.func.functionalize(lambda x: ops.sample_token(x, ids, 1))(logits)
    assert torch.equal(traced, want)
    with FakeTensorMode() as mode:  # Another shape, for which nothing is cached.
        ops.sample_token(torch.randn(3, 50), torch.arange(3), 1)
    assert torch.equal(ops.sample_token(logits[:3], ids[:3], 1), want[:3])
