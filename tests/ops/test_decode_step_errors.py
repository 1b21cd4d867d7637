"""decode_step: what every implementation refuses, each in one line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from step_arguments import make
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.decoding import Biases, HeadNorms, KVCache, LayerCache, StepWeights


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("decode_step")


def with_changes(**changes: Callable) -> list:
    """Return arguments, some of them replaced by a function of their old value."""
    names = ("code", "embedding", "weights", "cache", "position")
    arguments = dict(zip(names, make(), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return list(arguments.values())


def with_block(weights: StepWeights, **parts) -> StepWeights:
    blocks = weights.blocks
    return weights._replace(blocks=(blocks[0], blocks[1]._replace(**parts)))


K8, S8 = torch.ones(2, 2, 6, 8, dtype=torch.int8), torch.ones(2, 2, 6)


def with_layer(cache: KVCache, **parts) -> KVCache:
    return KVCache((cache[0], cache[1]._replace(**parts)))


def every_layer(cache: KVCache, change: Callable[[Tensor], Tensor]) -> KVCache:
    return KVCache(tuple(LayerCache(*map(change, layer[:2])) for layer in cache))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"code": Tensor.int}, TypeError, "code must be torch.int64, got torch.int32"),
        ({"code": Tensor.float}, TypeError, "code must hold integers, got torch.float32"),
        ({"code": lambda c: c[None]}, ValueError, r"code must have shape \(2,\), got \(1, 2\)"),
        ({"code": Tensor.tolist}, TypeError, "code must be a torch.Tensor, got list"),
        ({"code": lambda c: c + 7}, ValueError, r"code must be in \[0, 7\), got \d+"),
        ({"code": lambda c: c - 7}, ValueError, r"code must be in \[0, 7\), got -\d+"),
        ({"code": lambda c: c[:1]}, ValueError, r"code must have shape \(2,\), got \(1,\)"),
        ({"embedding": lambda e: e[0]}, ValueError, r"embedding must have shape \[N, C\], got"),
        ({"embedding": Tensor.int}, TypeError, "embedding must be floating point, got torch.int32"),
        ({"embedding": Tensor.double}, TypeError, "keys of layer 0 must be torch.float64, as"),
        ({"embedding": lambda e: e.to("meta")}, ValueError, "code must be on meta, as embedding"),
        ({"embedding": lambda e: e[:, :8]}, ValueError, r"attention_norm of block 0 must have"),
        (
            {"embedding": lambda e: None},
            TypeError,
            "embedding must be a torch.Tensor, got NoneType",
        ),
        ({"cache": lambda c: KVCache(c[:1])}, ValueError, "the cache must have a layer for"),
        (
            {"weights": lambda w: w._replace(blocks=())},
            ValueError,
            "the cache must have a layer for",
        ),
        (
            {"cache": lambda c: every_layer(c, lambda t: t[0])},
            ValueError,
            r"keys of layer 0 must have shape \[R, H, T, D\], D even, got \(2, 6, 8\)",
        ),
        (
            {"cache": lambda c: every_layer(c, lambda t: t[..., :7])},
            ValueError,
            r"keys of layer 0 must have shape \[R, H, T, D\], D even, got \(2, 2, 6, 7\)",
        ),
        (
            {"cache": lambda c: every_layer(c, lambda t: t[:, :1])},
            ValueError,
            r"qkv of block 0 must have shape \(24, 16\), got \(48, 16\)",
        ),
        (
            {"cache": lambda c: with_layer(c, keys=c[1].keys[:1])},
            ValueError,
            r"keys of layer 1 must have shape \(2, 2, 6, 8\), got \(1, 2, 6, 8\)",
        ),
        (
            {"cache": lambda c: with_layer(c, values=c[1].values.to("meta"))},
            ValueError,
            "values of layer 1 must be on cpu, as embedding is, got meta",
        ),
        (
            {"cache": lambda c: with_layer(c, keys=K8, key_scale=S8)},
            TypeError,
            "keys and values of layer 1 must both have scales, or none",
        ),
        (
            {"cache": lambda c: with_layer(c, values=K8, value_scale=S8)},
            TypeError,
            "keys and values of layer 1 must both have scales, or none",
        ),
        (
            {"cache": lambda c: with_layer(c, key_scale=S8, value_scale=S8)},
            TypeError,
            "keys of layer 1 must be int8, as it has a scale, got torch.float32",
        ),
        (
            {"cache": lambda c: KVCache((c[0], LayerCache(K8, K8, S8, S8[:, :1])))},
            ValueError,
            r"the scale of values of layer 1 must be float32 of shape \(2, 2, 6\), got",
        ),
        (
            {"cache": lambda c: KVCache((c[0], LayerCache(K8, K8, S8, S8.double())))},
            ValueError,
            r"the scale of values of layer 1 must be float32 of shape \(2, 2, 6\), got",
        ),
        (
            {"cache": lambda c: with_layer(c, values=c[1].values[:, :, :4])},
            ValueError,
            r"values of layer 1 must have shape \(2, 2, 6, 8\), got \(2, 2, 4, 8\)",
        ),
        (
            {"cache": lambda c: with_layer(c, keys=c[1].keys.to(torch.int8))},
            TypeError,
            "keys of layer 1 must be torch.float32, as embedding is, got",
        ),
        (
            {"weights": lambda w: with_block(w, up=w.blocks[1].up[:5])},
            ValueError,
            r"up of block 1 must have shape \(4, 16\), got \(5, 16\)",
        ),
        (
            {"weights": lambda w: with_block(w, up=w.blocks[1].up[:6])},
            ValueError,
            r"down of block 1 must have shape \(16, 3\), got \(16, 20\)",
        ),
        (
            {"weights": lambda w: with_block(w, out=w.blocks[1].out.half())},
            TypeError,
            "out of block 1 must be torch.float32, as embedding is, got",
        ),
        (
            {"weights": lambda w: with_block(w, down=w.blocks[1].down.to(torch.int8))},
            TypeError,
            "down of block 1 must be torch.float32, as embedding is, got torch.int8 without",
        ),
        (
            {"weights": lambda w: with_block(w, down=w.blocks[1].down.to("meta"))},
            ValueError,
            "down of block 1 must be on cpu, as embedding is, got meta",
        ),
        (
            {"weights": lambda w: with_block(w, up=w.blocks[1].up[0])},
            ValueError,
            r"up of block 1 must have shape \(16, 16\), got \(16,\)",
        ),
        (
            {"weights": lambda w: with_block(w, qkv=w.blocks[1].qkv[:9])},
            ValueError,
            r"qkv of block 1 must have shape \(48, 16\), got \(9, 16\)",
        ),
        (
            {"weights": lambda w: with_block(w, out=w.blocks[1].out[:, :7])},
            ValueError,
            r"out of block 1 must have shape \(16, 16\), got \(16, 7\)",
        ),
        (
            {"weights": lambda w: with_block(w, ffn_norm=w.norm[:7])},
            ValueError,
            r"ffn_norm of block 1 must have shape \(16,\), got \(7,\)",
        ),
        (
            {"weights": lambda w: with_block(w, attention_norm=w.norm.double())},
            TypeError,
            "attention_norm of block 1 must be torch.float32, as embedding is, got",
        ),
        (
            {"weights": lambda w: w._replace(norm=w.norm[:7])},
            ValueError,
            r"norm must have shape \(16,\), got \(7,\)",
        ),
        (
            {"weights": lambda w: w._replace(norm=w.norm.to("meta"))},
            ValueError,
            "norm must be on cpu, as embedding is, got meta",
        ),
        (
            {"weights": lambda w: w._replace(head=w.head[:, :7])},
            ValueError,
            r"head must have shape \(11, 16\), got \(11, 7\)",
        ),
        (
            {"weights": lambda w: w._replace(rotary=[1.0])},
            TypeError,
            "rotary must be a torch.Tensor, got list",
        ),
        (
            {"weights": lambda w: w._replace(norm=None)},
            TypeError,
            "norm must be a torch.Tensor, got NoneType",
        ),
        (
            {"weights": lambda w: with_block(w, ffn_norm=None)},
            TypeError,
            "ffn_norm of block 1 must be a torch.Tensor, got NoneType",
        ),
        (
            {"weights": lambda w: with_block(w, condition=torch.ones(2, 6, 16))},
            TypeError,
            "all blocks must have a condition, and the head, or none",
        ),
        (
            {"weights": lambda w: with_block(w, biases=Biases(up=torch.ones(40)))},
            ValueError,
            "up of block 1 must have no bias, because it has a gate",
        ),
        (
            {"weights": lambda w: with_block(w, biases=Biases(down=torch.ones(3)))},
            ValueError,
            r"bias of down of block 1 must have shape \(16,\), got \(3,\)",
        ),
        (
            {"weights": lambda w: w._replace(head_bias=torch.ones(11).half())},
            TypeError,
            "head_bias must be torch.float32, as embedding is, got torch.float16",
        ),
        (
            {"weights": lambda w: with_block(w, head_norms=HeadNorms(*[torch.ones(9)] * 4))},
            ValueError,
            r"query_weight of block 1 must have shape \(8,\), got \(9,\)",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary.int())},
            TypeError,
            "rotary must be floating point, got torch.int32",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary[0])},
            ValueError,
            r"rotary must have shape \[T, D / 2, 2\], got \(4, 2\)",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary.to("meta"))},
            ValueError,
            "rotary must be on cpu, as embedding is, got meta",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary[:3])},
            ValueError,
            r"position must be in \[0, 3\), got 3",
        ),
        (
            {"weights": lambda w: w._replace(rotary=w.rotary[:, :2])},
            ValueError,
            r"rotary must have shape \(6, 4, 2\), got \(6, 2, 2\)",
        ),
        ({"weights": lambda w: w._replace(eps=-1.0)}, ValueError, "eps must be finite and at"),
        ({"weights": lambda w: w._replace(eps=math.nan)}, ValueError, "eps must be finite and at"),
        ({"weights": lambda w: w._replace(eps=math.inf)}, ValueError, "eps must be finite and at"),
        ({"weights": lambda w: w._replace(eps=None)}, TypeError, "eps must be a number, got None"),
        ({"weights": lambda w: w._replace(eps="a")}, TypeError, "eps must be a number, got str"),
        ({"position": lambda p: 6}, ValueError, r"position must be in \[0, 6\), got 6"),
        ({"position": lambda p: -1}, ValueError, r"position must be in \[0, 6\), got -1"),
        ({"position": lambda p: True}, TypeError, "position must be an int, got bool"),
        ({"position": lambda p: 1.0}, TypeError, "position must be an int, got float"),
        (
            {"position": lambda p: torch.tensor([1, 2])},
            ValueError,
            "position must have 1 elements, got shape",
        ),
        (
            {"position": lambda p: torch.tensor([1], device="meta")},
            ValueError,
            "position must be on cpu, as embedding is, got meta",
        ),
        (
            {"position": lambda p: torch.tensor([1.0])},
            TypeError,
            "position must hold integers, got torch.float32",
        ),
    ],
)
def test_refuses_in_one_line(changes, error, message):
    arguments = with_changes(**changes)
    with pytest.raises(error, match=f"^decode_step: {message}") as caught:
        ops.decode_step(*arguments)
    assert "\n" not in str(caught.value)
    if "cache" not in changes:  # Nothing was written before the error.
        assert all(t[:, :, 3].isnan().all() for layer in arguments[3] for t in layer[:2])
    # A valid call, the base of every wrong one above.
    ops.decode_step(*make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(norm=w.head[0]), "norm must be None, because there is a condition"),
        (
            lambda w: with_block(w, attention_norm=w.head[0]),
            "attention_norm of block 1 must be None, because there is a condition",
        ),
        (
            lambda w: with_block(w, condition=None),
            "all blocks must have a condition, and the head, or none",
        ),
        (
            lambda w: with_block(w, condition=w.blocks[1].condition[:1]),
            r"condition of block 1 must have shape \(2, 6, 16\), got \(1, 6, 16\)",
        ),
        (
            lambda w: w._replace(condition=w.blocks[1].condition),
            r"condition must have shape \(2, 3, 16\), got \(2, 6, 16\)",
        ),
        (
            lambda w: with_block(w, up=w.blocks[1].up[:10]),
            "up of block 1 must have no bias, because it has a gate",
        ),
    ],
)
def test_refuses_a_condition_that_does_not_fit(change, message):
    code, embedding, weights, *rest = make(rar=True)
    with pytest.raises((TypeError, ValueError), match=f"^decode_step: {message}"):
        ops.decode_step(code, embedding, change(weights), *rest)


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (0, ValueError, r"length must be in \[1, 7\), got 0"),
        (7, ValueError, r"length must be in \[1, 7\), got 7"),
        (4.0, TypeError, "length must be an int, got float"),
        (torch.tensor([4, 4]), ValueError, "length must have 1 elements, got shape"),
        (torch.tensor([4.0]), TypeError, "length must hold integers, got torch.float32"),
        (torch.tensor([4], device="meta"), ValueError, "length must be on cpu, as embedding is"),
    ],
    ids=str,
)
def test_refuses_a_length_in_one_line(length, error, message):
    with pytest.raises(error, match=f"^decode_step: {message}") as caught:
        ops.decode_step(*make(), length)
    assert "\n" not in str(caught.value)
    ops.decode_step(*make(), 4)


def test_refuses_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        ops.decode_step(*make())
    ops.decode_step(*make())
