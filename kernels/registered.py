"""Register kernel launchers as torch ops, which `torch.compile` calls without tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..functional import first_derivatives_only

# Ops live as long as the library object that defined them.
library = torch.library.Library("vfmtok_fast", "FRAGMENT")


def registered(
    schema: str, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.vfmtok_fast.<name>`` and return the op in its place.

    Args:
        schema: ``"name(Tensor x, Tensor(a!) written, ...) -> Tensor"``, in torch's schema syntax.
        fake: returns results of the right shape and dtype from arguments without values; None for
            an op that returns nothing.
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


def differentiable(
    launcher: str, setup: Callable[..., None], backward: Callable[..., Any], without: str
) -> None:
    """Register the first derivative of a launcher, and an error for second derivatives.

    Args:
        launcher: its name, as in the schema.
        setup, backward: as for `torch.library.register_autograd`.
        without: ops that the error says to leave out of ``enable``; the error names the first one
            as its source.
    """
    message = (
        f"{without.split()[0]}: its Triton kernels have first derivatives only; "
        f"leave {without} out of enable(ops=...)"
    )

    once = first_derivatives_only(message)(backward)
    torch.library.register_autograd(
        f"vfmtok_fast::{launcher}", once, setup_context=setup, lib=library
    )
