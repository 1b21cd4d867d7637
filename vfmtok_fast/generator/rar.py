"""RAR: a GPT that was trained in random orders of the codes, with its class in every norm.

A sequence is a start token, the class, and the codes; a code's place predicts the next one. Beside
its own position in the image, each place but the first is told the position that it predicts, so
that one model knows any order. Codes are generated row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoint import (
    RAR_MORE_POSITIONS,
    RAR_WRAPPERS,
    load_rar,
    rar_fields,
    read_tensors,
)
from ..checks import check_class_ids, check_codes, check_device
from ..configs import check_numbers, check_positive, config_from_mapping
from ..decoding import Biases, BlockWeights, HeadNorms, StepWeights
from ..functional import through
from ..hub import unfilled
from ..ops.checks import check_integers
from .decoder import Kept
from .model import Generator, check_eps, check_plain

# Rows of the table of times beyond one per code; only one is read.
MORE_TIMES = 100


@dataclass(frozen=True)
class RARConfig:
    """Shape of a RAR over image codes; the defaults are RAR-L's.

    Args:
        num_layers, num_heads, dim, mlp_dim: transformer size.
        vocab_size: number of codes K.
        block_size: codes per image.
        num_classes: number of classes; one more embedding stands for "no class".
        norm_eps: epsilon of all norms.
    """

    num_layers: int = 24
    num_heads: int = 16
    dim: int = 1024
    mlp_dim: int = 4096
    vocab_size: int = 16384
    block_size: int = 256
    num_classes: int = 1000
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_heads", "dim", "mlp_dim", "vocab_size", "block_size")
        check_positive(self, (*counts, "num_classes"))
        check_numbers(self, {"norm_eps": (0, 1)})
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                "RARConfig: dim / num_heads must be an even number, "
                f"got {self.dim} / {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class RARBlock(nn.Module):
    """Pre-norm attention and MLP; shift, scale and gate of both come from the condition (adaLN)."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.num_heads, dim, eps = config.num_heads, config.dim, config.norm_eps
        self.condition = nn.Linear(dim, 6 * dim)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.LayerNorm(config.head_dim, eps)
        self.key_norm = nn.LayerNorm(config.head_dim, eps)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps)
        self.up = nn.Linear(dim, config.mlp_dim)
        self.down = nn.Linear(config.mlp_dim, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x and condition [B, P, C], all places at once."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.condition(condition).chunk(6, -1)
        y = self.attention_norm(x) * (1 + scale) + shift
        q, k, v = rearrange(self.qkv(y), "b p (part h d) -> part b h p d", part=3, h=self.num_heads)
        q, k = self.query_norm(q), self.key_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + gate * self.out(rearrange(mixed, "b h p d -> b p (h d)"))
        y = self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift
        return x + ffn_gate * self.down(F.gelu(self.up(y)))

    def fill_condition(self, out: Tensor, condition: Tensor) -> None:
        """Write shift, gain and gate of both branches, [..., 6, C], for `ops.decode_step`."""
        parts = self.condition(condition).unflatten(-1, (6, -1))
        for at, norm in ((0, self.attention_norm), (3, self.ffn_norm)):
            shift, scale, gate = parts[..., at : at + 3, :].unbind(-2)
            # (LayerNorm * weight + bias) * (1 + scale) + shift, multiplied out.
            out[..., at, :] = norm.bias * (1 + scale) + shift
            out[..., at + 1, :] = norm.weight * (1 + scale)
            out[..., at + 2, :] = gate

    def step_weights(self, condition: Tensor) -> BlockWeights:
        check_plain(self, RARBlock)
        linears = self.qkv, self.out, self.up, self.down
        for layer in (*linears, self.condition):
            check_plain(layer, nn.Linear, bias=True)
        for norm in self.norms():
            check_plain(norm, nn.LayerNorm, bias=True)
        q, k = self.query_norm, self.key_norm
        return BlockWeights(
            None, self.qkv.weight, self.out.weight, None, self.up.weight, self.down.weight,
            Biases(*(layer.bias for layer in linears)),
            HeadNorms(q.weight, q.bias, k.weight, k.bias), condition,
        )  # fmt: skip

    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.attention_norm, self.query_norm, self.key_norm, self.ffn_norm


class RAR(Generator, library_name="vfmtok_fast", tags=["vfmtok"]):
    """Randomised autoregressive model of VFMTok codes. It generates; it cannot be trained here.

    Args:
        config: a `RARConfig`, or its fields as a mapping.

    Source: RAR (arXiv 2411.00776); VFMTok's release trains it on VFMTok's codes.
    """

    def __init__(self, config: RARConfig | Mapping | None = None):
        super().__init__()
        if isinstance(config, Mapping):
            config = config_from_mapping(RARConfig, config)
        config = RARConfig() if config is None else config
        if not isinstance(config, RARConfig):
            raise TypeError(
                f"RAR: config must be a RARConfig or its fields, got {type(config).__name__}"
            )
        self.config = config
        dim, places = config.dim, config.block_size
        # Codes, a mask that is never used, classes, "no class".
        self.embedding = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, dim)
        self.start = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, places + RAR_MORE_POSITIONS, dim))
        self.target_position = nn.Parameter(torch.empty(1, places + RAR_MORE_POSITIONS, dim))
        self.time = nn.Parameter(torch.empty(1, places + MORE_TIMES, dim))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.num_layers))
        self.head_condition = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.vocab_size)
        self.condition_size = 3 + 6 * config.num_layers
        self.grad_checkpointing = False
        self.kept = Kept()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.position, self.target_position, self.time):
            nn.init.trunc_normal_(table, std=0.02)
        for layer in (*(block.condition for block in self.blocks), self.head_condition):
            nn.init.zeros_(layer.weight)

    @property
    def anchor(self) -> Tensor:
        return self.start

    def forward(self, codes: Tensor, class_ids: Tensor, orders: Tensor | None = None) -> Tensor:
        """Return the logits of every code, given the class and the codes before it in its order.

        Args:
            codes: [B, block_size] integers in [0, vocab_size), row by row.
            class_ids: [B] integers in [0, num_classes]; num_classes stands for "no class".
            orders: [B, block_size], in each row a permutation of 0..block_size - 1: where in the
                image the first code lies, the second, and so on; None is row by row.

        Returns:
            float32 [B, block_size, vocab_size] (float64 for a float64 model); position i predicts
            the code at ``orders[:, i]``.

        Raises:
            TypeError, ValueError: wrong shape, dtype or range.
        """
        config = self.config
        check_codes("RAR", codes, config.block_size, config.vocab_size, self.device)
        B = len(codes)
        check_class_ids("RAR", class_ids, config.num_classes + 1)
        check_device("RAR", "class_ids", class_ids, self.device)
        if B != len(class_ids):
            raise ValueError(
                f"RAR: codes and class_ids must have one batch size, got {B} and {len(class_ids)}"
            )
        raster = torch.arange(config.block_size, device=self.device).expand(B, -1)
        if orders is None:
            orders = raster
        else:
            check_integers("RAR", "orders", orders, tuple(codes.shape))
            check_device("RAR", "orders", orders, self.device)
            orders = orders.long()
            if not torch.equal(orders.sort().values, raster):
                raise ValueError("RAR: each row of orders must be a permutation of all codes")
        seen = codes.long().gather(1, orders)[:, :-1]
        classes = self.embedding(self._rows_of(class_ids))[:, None]
        x = torch.cat([self.start.expand(B, -1, -1), classes, self.embedding(seen)], dim=1)
        x = x + self._positions(orders)
        condition = F.silu(classes + self.time[:, : x.shape[1]])
        x = through(self.blocks, x, condition, recompute=self.grad_checkpointing)
        scale, shift = self.head_condition(condition).chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=config.norm_eps) * (1 + scale) + shift
        logits = self.head(x[:, 1:])
        return logits if logits.dtype == torch.float64 else logits.float()

    def _rows_of(self, class_ids: Tensor) -> Tensor:
        return class_ids.long() + self.config.vocab_size + 1

    def _positions(self, orders: Tensor) -> Tensor:
        """What is added at each place, [B, 1 + block_size, C]: its position and the next code's."""
        own = F.pad(2 + orders[:, :-1], (2, 0))
        own[:, 1] = 1
        target = F.embedding(2 + orders, self.target_position[0])
        return F.embedding(own, self.position[0]) + F.pad(target, (0, 0, 1, 0))

    def step_weights(self, condition: Tensor) -> StepWeights:
        """See `Generator.step_weights`."""
        if type(self).forward is not RAR.forward:
            raise TypeError(
                f"generate: computes what RAR does, and {type(self).__name__} overrides forward"
            )
        check_plain(self, type(self))
        for layer in (self.head, self.head_condition):
            check_plain(layer, nn.Linear, bias=True)
        pairs = zip(self.blocks, condition[:, 3:].split(6, dim=1), strict=True)
        blocks = tuple(block.step_weights(part) for block, part in pairs)
        check_eps([norm for block in self.blocks for norm in block.norms()], self.config.norm_eps)
        return StepWeights(
            blocks, None, self.head.weight, None, self.config.norm_eps, self.head.bias,
            condition[:, :3],
        )  # fmt: skip

    def embeddings(self) -> tuple[Tensor, ...]:
        check_plain(self.embedding, nn.Embedding)
        K, C = self.config.vocab_size, self.config.dim
        codes, _, classes = self.embedding.weight.tensor_split((K, K + 1))
        return self.start[0].expand(len(classes), C), classes, codes

    @torch.no_grad()
    def fill_condition(self, out: Tensor, class_ids: Tensor, first: int) -> None:
        """See `Generator.fill_condition`; every adaLN's product is done here, once for P places."""
        places = slice(first, first + len(out))
        classes = self.embedding(self._rows_of(class_ids))
        condition = F.silu(classes + self.time[0, places, None])
        raster = torch.arange(self.config.block_size, device=self.device)[None]
        out[:, :, 0] = self._positions(raster)[0, places, None]
        scale, shift = self.head_condition(condition).chunk(2, -1)
        out[:, :, 1], out[:, :, 2] = shift, 1 + scale
        for number, block in enumerate(self.blocks):
            block.fill_condition(out[:, :, 3 + 6 * number : 9 + 6 * number], condition)

    @classmethod
    def from_official(
        cls, checkpoint: str | Path | Mapping, config: RARConfig | Mapping | None = None
    ) -> RAR:
        """Load a RAR of the authors' release; see `vfmtok_fast.checkpoint.load_rar`.

        Args:
            checkpoint: the authors' ``.safetensors`` file, or the mapping in it.
            config: a `RARConfig`, or those of its fields that the shapes of the weights do not
                tell; None for none.
        """
        tensors = read_tensors(checkpoint, RAR_WRAPPERS, "RAR checkpoint")
        if not isinstance(config, RARConfig):
            config = rar_fields(tensors) | dict(config or {})
        return load_rar(unfilled(cls, config), tensors)
