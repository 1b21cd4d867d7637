"""Check the result of a `Call` against the op's reference in float64, on a few rows.

`tune` uses this, because it must never keep a setting that gives a wrong result. The first rows
stand for all: an error caused by a tile size, a number of warps or pipelining shows there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import switch
from ..decoding import KVCache, LayerCache
from .calls import Call

# How many rows are compared: images, queries or rows of logits.
ROWS = {"nearest_code": 512, "deformable_sample": 1, "decode_attention": 4}
MANY = 64
# The error of a certified search is smaller; both scores compared here are float64 sums.
TIE = 1e-12

Check = Callable[[Sequence[Tensor]], str]


def oracle(call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Check:
    """Return a function that checks a result of `Call.run`: "" if it is right, else the problem."""
    reference = switch.reference(call.op)
    if call.op == "nearest_code":
        return _search(args, kwargs)
    if call.op == "sample_token":
        with torch.no_grad():
            want = reference(*args, **kwargs)
        # One code in a batch may be a tie within rounding.
        return lambda got: _say(int((got[0] != want).sum()), 1, "codes differ from the reference's")
    if call.op == "decode_step":
        return _step(reference, args)
    return _continuous(call, reference, args, kwargs)


def _say(found: float, allowed: float, what: str) -> str:
    return "" if found <= allowed else f"{found:.3g} {what}, {allowed:.3g} allowed"


def _search(args: Sequence[Any], kwargs: dict[str, Any]) -> Check:
    z, codebook = (torch.nn.functional.normalize(x.double(), dim=-1) for x in args)
    rows, k = min(ROWS["nearest_code"], z.shape[0]), kwargs.get("k", 1)
    scores = z[:rows] @ codebook.T
    best = scores.topk(k, dim=1).values

    def check(got: Sequence[Tensor]) -> str:
        codes = got[0][:rows].view(rows, k)
        lost = (best - scores.gather(1, codes)) > TIE
        return _say(int(lost.sum()), 0, "codes are not the nearest")

    return check


def _step(reference: Callable, args: Sequence[Any]) -> Check:
    """Check only the logits of a step: its weights and cache are too large to compare."""
    code, embedding, weights, cache, position, length = args

    def logits(dtype: torch.dtype | None) -> Tensor:
        def same(value: Any) -> Any:
            if isinstance(value, Tensor):
                wide = dtype is not None and value.dtype == embedding.dtype
                return value.to(dtype) if wide else value.clone()
            return value

        own = tree_map(same, weights)
        # Scales are float32 whatever the dtype of the computation, because a step writes them as
        # float32.
        layers = KVCache(
            LayerCache(same(keys), same(values), *(s if s is None else s.clone() for s in scales))
            for keys, values, *scales in cache
        )
        with torch.no_grad():
            given = (code, same(embedding), own, layers, position, length)
            return reference(*given, switch.reference("decode_attention"))

    truth, ruler = logits(torch.float64), logits(None)
    return lambda got: _compared(got[0], truth, ruler, embedding.dtype)


def _compared(got: Tensor, truth: Tensor, ruler: Tensor, dtype: torch.dtype) -> str:
    """Compare errors with those of the ruler, the reference in ``dtype``.

    Twice what the tests allow: another order of summation passes, a different sum does not.
    """
    error, own = (float((x.double() - truth).abs().max()) for x in (got, ruler))
    rounding = torch.finfo(dtype).eps * float(truth.abs().max())
    if error <= 4 * own + 2 * rounding:
        return ""
    return f"it is off by {error:.2e}, the reference by {own:.2e}"


def _continuous(
    call: Call, reference: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> Check:
    rows = ROWS.get(call.op, MANY)
    batch = call.sizes.get("B", call.sizes.get("rows"))

    def some(value: Any, dtype: torch.dtype | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        value = value[:rows] if value.shape[:1] == (batch,) else value
        # This copies the caches that an op writes to, so the reference gets its own.
        return (value.to(dtype) if dtype and value.is_floating_point() else value).clone()

    def results(dtype: torch.dtype | None, out: Tensor) -> list[Tensor]:
        few = [some(value, dtype) for value in args]
        for i in call.backward:
            few[i].requires_grad_()
        keywords = {name: some(value, dtype) for name, value in kwargs.items()}
        with torch.set_grad_enabled(bool(call.backward)):
            made = reference(*few, **keywords)
        if not call.backward:
            return [made]
        inputs = [few[i] for i in call.backward]
        return [made.detach(), *torch.autograd.grad(made, inputs, out.to(made.dtype))]

    def check(got: Sequence[Tensor]) -> str:
        got = [tensor[:rows] for tensor in got]
        truth, ruler = results(torch.float64, got[0]), results(None, got[0])
        parts = zip(got, truth, ruler, strict=True)
        wrong = (_compared(one, exact, rounded, one.dtype) for one, exact, rounded in parts)
        return next(filter(None, wrong), "")

    return check
