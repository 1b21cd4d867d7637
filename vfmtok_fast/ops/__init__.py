"""The seam: public ops, each validated, then taken by the implementation that `switch` allows."""

from .append_code import append_code
from .decode_attention import decode_attention
from .decode_step import decode_step
from .deformable_sample import deformable_sample
from .gate_up import gate_up
from .linear_residual import linear_residual
from .nearest_code import nearest_code
from .norm_linear import norm_linear
from .qkv_rotary import qkv_rotary
from .sample_token import sample_token

__all__ = [
    "append_code",
    "decode_attention",
    "deformable_sample",
    "gate_up",
    "linear_residual",
    "nearest_code",
    "norm_linear",
    "qkv_rotary",
    "sample_token",
]
