"""Ops without their checks, for arguments that are right by construction.

A wrong shape here may read or write out of bounds. For `GPT.step` and the engine, which have some
60 calls of small work: between two weights that flush the caches, the checks cost a CPU 5 % of a
step.
"""

from .append_code import _op as append_code
from .decode_attention import _op as decode_attention
from .gate_up import _op as gate_up
from .linear_residual import _op as linear_residual
from .norm_linear import _op as norm_linear
from .qkv_rotary import _op as qkv_rotary

__all__ = [
    "append_code",
    "decode_attention",
    "gate_up",
    "linear_residual",
    "norm_linear",
    "qkv_rotary",
]
