"""A launcher of kernels as an op of torch: what `torch.compile` calls without looking inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Ops live as long as the library that defined them.
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


def differentiable(
    launcher: str, setup: Callable[..., None], backward: Callable[..., Any],
    derivatives: Sequence[str], without: str,
) -> None:  # fmt: skip
    """Give a launcher its first derivative, and asking for a second one an error.

    Args:
        launcher: its name, as in the schema.
        setup, backward: as `torch.library.register_autograd` takes them.
        derivatives: launchers of the backward pass; torch would take their derivatives for zero.
        without: what the error says to leave out of ``enable``: ops, the first of which it names.
    """

    def refuse(ctx, *grads: Any) -> None:
        raise NotImplementedError(
            f"{without.split()[0]}: its Triton kernels have first derivatives only; "
            f"leave {without} out of enable(ops=...)"
        )

    torch.library.register_autograd(
        f"vfmtok_fast::{launcher}", backward, setup_context=setup, lib=library
    )
    for name in derivatives:
        torch.library.register_autograd(f"vfmtok_fast::{name}", refuse, lib=library)
