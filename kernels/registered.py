"""A launcher of kernels as an op of torch: what `torch.compile` calls without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Ops live as long as the library that defined them; also for `torch.library.register_autograd`.
library = torch.library.Library("vfmtok_fast", "FRAGMENT")


def registered(
    schema: str, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.vfmtok_fast.<name>`` and return the op in its place.

    Args:
        schema: ``"name(Tensor x, Tensor(a!) written, ...) -> Tensor"``, as torch words it.
        fake: makes results of the right shape and dtype from arguments without values; None for an
            op that returns nothing.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        library.define(schema)
        library.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"vfmtok_fast::{name}", fake or (lambda *args: None), lib=library
        )
        return getattr(torch.ops.vfmtok_fast, name)

    return register
