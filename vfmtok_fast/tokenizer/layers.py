"""Layers of the tokenizer that call ops."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """`nn.Linear` computed by `ops.linear`."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation=activation)
