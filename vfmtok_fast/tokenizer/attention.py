"""torch's fused attention, and the causal layer of the region encoder and token decoder."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..tf32 import attention_dtype
from .layers import Linear


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Fused softmax attention over [B, heads, T, D], in the dtype that the precision requires."""
    dtype = attention_dtype(q)
    mixed = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
    return mixed.to(q.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention from each position to itself and the ones before it.

    ``dropout`` applies to the attention weights, in training mode.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C]."""
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.num_heads)
            for project in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(rearrange(mixed, "b h t d -> b t (h d)"))
