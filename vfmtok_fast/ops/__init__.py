"""The seam: public ops, each validated, then taken by the implementation that `switch` allows."""

from .decode_attention import decode_attention
from .decode_step import decode_step
from .deformable_sample import deformable_sample
from .group_norm_silu import group_norm_silu
from .nearest_code import nearest_code
from .residual_block import residual_block
from .sample_token import sample_token
from .upsample_conv import upsample_conv

__all__ = [
    "decode_attention",
    "decode_step",
    "deformable_sample",
    "group_norm_silu",
    "nearest_code",
    "residual_block",
    "sample_token",
    "upsample_conv",
]
