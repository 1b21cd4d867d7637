"""The seam: public ops, each validated, then taken by the implementation that `switch` allows."""

from .decode_attention import decode_attention
from .decode_step import decode_step
from .deformable_sample import deformable_sample
from .nearest_code import nearest_code
from .sample_token import sample_token

__all__ = [
    "decode_attention",
    "decode_step",
    "deformable_sample",
    "nearest_code",
    "sample_token",
]
