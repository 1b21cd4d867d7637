"""The generator's linear layers, whose weights may be of 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoding import Weight, in_8_bits, in_full


class Linear(nn.Linear):
    """x @ weight.T; after `quantize` the weight is int8 and ``scale`` [N] float32, else None."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.scale: Tensor | None
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, in_full(self.weight, self.scale, x.dtype))

    def weights(self) -> Weight:
        """As `ops.decode_step` takes it."""
        return Weight(self.weight, self.scale)

    @torch.no_grad()
    def quantize(self) -> None:
        """Round every row to multiples of its largest magnitude / 127; a second time does nothing.

        The weight must be finite.
        """
        if self.scale is not None:
            return
        weight, scale = in_8_bits(self.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale

    def _apply(self, fn, recurse: bool = True) -> Linear:
        # .to(bfloat16) must not round the scale, which the kernels read as float32, and
        # .type(bfloat16) not widen the weight.
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        if scale is not None and self.weight.dtype != weight.dtype:
            moved = weight.detach().to(self.weight.device)
            self.weight = nn.Parameter(moved, requires_grad=False)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, extra, errors):
        """As torch has it, but weights of 8 bits and others are never copied into each other."""
        weight = state_dict.get(f"{prefix}weight")
        there = weight is not None and weight.dtype == torch.int8
        if weight is not None and there != (self.scale is not None):
            kinds = {True: "int8", False: "full"}
            errors.append(
                f"{prefix}weight is {kinds[there]}, the model's {kinds[not there]}; load full "
                "weights into a new model and call quantize_weights after that"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)
