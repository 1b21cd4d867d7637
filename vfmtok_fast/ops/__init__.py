"""The seam: public ops, each validated, then taken by the implementation that `switch` allows."""

from .add_norm import add_norm
from .decode_attention import decode_attention
from .decode_step import decode_step
from .deformable_sample import deformable_sample
from .linear import linear
from .nearest_code import nearest_code
from .sample_token import sample_token

__all__ = [
    "add_norm",
    "decode_attention",
    "decode_step",
    "deformable_sample",
    "linear",
    "nearest_code",
    "sample_token",
]
