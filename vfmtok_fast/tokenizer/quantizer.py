"""From region features to codes and back (VFMTok section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import VFMTokConfig


@dataclass
class Quantized:
    """Codes [B, R] int64, vectors [B, R, d] with a straight-through gradient, and the losses."""

    codes: Tensor
    vectors: Tensor
    codebook_loss: Tensor
    commit_loss: Tensor
    entropy_loss: Tensor


class Quantizer(nn.Module):
    """Nearest neighbour by direction: queries and codebook rows are scaled to unit length."""

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        self.commit_beta = config.commit_beta
        self.entropy_weight = config.entropy_weight
        self.proj = nn.Linear(config.dim, config.codebook_dim)
        # Unit rows: an Adam step is as long as the learning rate, and would turn short rows.
        rows = torch.empty(config.codebook_size, config.codebook_dim).uniform_(-1, 1)
        self.codebook = nn.Parameter(F.normalize(rows, dim=-1))

    def queries(self, regions: Tensor) -> Tensor:
        """Turn region features [B, R, dim] into unit queries [B, R, d]."""
        return F.normalize(self.proj(regions), dim=-1)

    def nearest(self, queries: Tensor) -> Tensor:
        """Turn unit queries [B, R, d] into codes [B, R] int64."""
        # Under autocast the queries may be in half precision; the codebook keeps its own dtype.
        flat = queries.flatten(0, 1).to(self.codebook.dtype)
        return ops.nearest_code(flat, self.codebook).view(queries.shape[:2])

    def lookup(self, codes: Tensor) -> Tensor:
        """Turn codes [B, R] into unit codebook vectors [B, R, d]."""
        return F.normalize(F.embedding(codes, self.codebook), dim=-1)

    def forward(self, queries: Tensor) -> Quantized:
        """Quantise unit queries for training."""
        codes = self.nearest(queries)
        vectors = self.lookup(codes)
        entropy = queries.new_zeros(())
        if self.entropy_weight > 0:
            entropy = self.entropy_weight * entropy_loss(queries, self.codebook)
        return Quantized(
            codes=codes,
            vectors=queries + (vectors - queries).detach(),
            codebook_loss=F.mse_loss(vectors, queries.detach()),
            commit_loss=self.commit_beta * F.mse_loss(queries, vectors.detach()),
            entropy_loss=entropy,
        )


def entropy_loss(queries: Tensor, codebook: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each query's soft assignment minus the entropy of the mean assignment.

    This optional term holds an N x K matrix and its gradient in memory.

    Args:
        queries: [B, R, d], unit length.
        codebook: [K, d].
        temperature: divides the negative squared distances.

    Returns:
        Scalar.
    """
    z, e = queries.flatten(0, 1), F.normalize(codebook, dim=-1)
    distance = z.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * z @ e.T
    affinity = -distance / temperature
    probability = affinity.softmax(dim=-1)
    # The small constants are the release's.
    per_query = -(probability * (affinity + 1e-5).log_softmax(dim=-1)).sum(dim=-1).mean()
    mean = probability.mean(dim=0)
    return per_query + (mean * (mean + 1e-5).log()).sum()
