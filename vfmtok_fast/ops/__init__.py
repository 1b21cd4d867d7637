"""The public ops: each validates its arguments, then calls what `switch` selects."""

from .add_norm import add_norm
from .decode_attention import decode_attention
from .decode_step import decode_step
from .deformable_sample import deformable_sample
from .group_norm_silu import group_norm_silu
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .nearest_code import nearest_code
from .patch_embed import patch_embed
from .residual_block import residual_block
from .sample_token import sample_token
from .upsample_conv import upsample_conv

__all__ = [
    "add_norm",
    "decode_attention",
    "decode_step",
    "deformable_sample",
    "group_norm_silu",
    "linear",
    "linear_cross_entropy",
    "nearest_code",
    "patch_embed",
    "residual_block",
    "sample_token",
    "upsample_conv",
]
