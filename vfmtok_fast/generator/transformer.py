"""The generator: a class-conditional LlamaGen-style GPT over the 256 codes of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import ops
from ..checkpoint import check_there, fetch_official, load_gpt
from ..checks import check_class_ids, check_codes, check_device
from ..configs import config_from_mapping
from ..decoding import BlockWeights, StepWeights
from ..functional import rms_norm, rotate, through
from ..hub import register_constant, unfilled
from .config import PRESETS, GPTConfig
from .decoder import Kept
from .model import Generator, check_eps, check_plain, is_plain


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_table(config: GPTConfig) -> Tensor:
    """Cosine and sine of every position, [1 + block_size, head_dim / 2, 2] float32 on the CPU.

    The first half of the pairs rotates with the row of the code, the second half with its column.
    The first position, the class, holds zeros for both, as in the release: its q and k vanish.
    """
    half = config.head_dim // 2
    steps = torch.arange(0, half, 2, device="cpu").float()
    frequency = 1.0 / config.rope_base ** (steps / half)
    side = math.isqrt(config.block_size)
    angle = torch.arange(side, device="cpu").float()[:, None] * frequency
    by_row = angle[:, None].expand(side, side, -1)
    by_column = angle[None, :].expand(side, side, -1)
    angles = torch.cat([by_row, by_column], dim=-1).reshape(side * side, half)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x [B, T, C], all positions at once; rotary [T, D / 2, 2]."""
        q, k, v = rearrange(self.qkv(x), "b t (part h d) -> part b h t d", part=3, h=self.num_heads)
        q, k = rotate(q, rotary), rotate(k, rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(rearrange(mixed, "b h t d -> b t (h d)")))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # Both factors in one matrix product: rows of the gate, then of what it scales.
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.dropout(self.down(F.silu(gate) * up))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; ``drop_path``: probability of skipping a branch."""

    def __init__(self, config: GPTConfig, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self._kept(self.attention(self.attention_norm(x), rotary))
        return x + self._kept(self.ffn(self.ffn_norm(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        """Skip a branch [B, T, C] for some samples in training, and scale it up for the others."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)

    def step_weights(self) -> BlockWeights:
        """The weights that `ops.decode_step` reads."""
        attention, ffn = self.attention, self.ffn
        check_plain(self, Block)
        check_plain(attention, Attention)
        check_plain(ffn, FeedForward)
        for dropout in (attention.dropout, ffn.dropout):
            check_plain(dropout, nn.Dropout, nn.Identity)
        layers = (
            self.attention_norm, attention.qkv, attention.out, self.ffn_norm, ffn.gate_up, ffn.down
        )  # fmt: skip
        return BlockWeights(*map(_weight, layers))


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a layer that decoding steps compute without calling it."""
    check_plain(layer, nn.Linear, nn.Embedding, RMSNorm)
    return layer.weight


class GPT(Generator, library_name="vfmtok_fast", tags=["vfmtok"]):
    """Class-conditional autoregressive model of VFMTok codes.

    Args:
        config: a `GPTConfig`, its fields as a mapping, or the name of a preset such as ``"GPT-L"``.

    Source: LlamaGen (arXiv 2406.06525); VFMTok (arXiv 2507.08441) section 3.3.
    """

    shipped_as = "generator"

    def __init__(self, config: GPTConfig | Mapping | str = "GPT-B"):
        super().__init__()
        if isinstance(config, str):
            config = GPTConfig.preset(config)
        elif isinstance(config, Mapping):
            config = config_from_mapping(GPTConfig, config)
        if not isinstance(config, GPTConfig):
            raise TypeError(
                "GPT: config must be a GPTConfig, its fields or a preset's name, "
                f"got {type(config).__name__}"
            )
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.token_dropout)
        rates = torch.linspace(0, config.drop_path, config.num_layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # .to(bfloat16) must not round the angles: the release keeps them in float32.
        register_constant(self, "rotary", rotary_table(config), exact=True)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # As the release starts: all codes are equally likely.
        nn.init.zeros_(self.head.weight)
        self.grad_checkpointing = False
        self.kept = Kept()

    @property
    def anchor(self) -> Tensor:
        return self.norm.weight

    def forward(self, codes: Tensor, class_ids: Tensor) -> Tensor:
        """Return the logits of every code, given the class and the codes before it.

        This is teacher forcing. In training mode each class is replaced with "no class" with
        probability ``class_dropout``.

        Args:
            codes: [B, block_size] integers in [0, vocab_size).
            class_ids: [B] integers in [0, num_classes).

        Returns:
            float32 [B, block_size, vocab_size] (float64 for a float64 model); position i predicts
            code i.

        Raises:
            TypeError, ValueError: wrong shape, dtype or range.
        """
        return self.predict(self._teach(codes, class_ids))

    def loss(self, codes: Tensor, class_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the codes under `forward`'s logits, which need not all be stored.

        Args:
            codes, class_ids: as for `forward`; at least one image, or the loss would be NaN.

        Returns:
            Scalar, float32 (float64 for a float64 model).
        """
        x, targets = self._teach(codes, class_ids), codes.flatten()
        if not is_plain(self.head, nn.Linear) or type(self).predict is not GPT.predict:
            return F.cross_entropy(self.predict(x).flatten(0, 1), targets.long())
        hidden = self.hidden(x).flatten(0, 1)
        return ops.linear_cross_entropy(hidden, self.head.weight, targets)

    def _teach(self, codes: Tensor, class_ids: Tensor) -> Tensor:
        """Return the transformer's input; in training mode some classes are dropped."""
        config = self.config
        device = self.device
        check_codes("GPT", codes, config.block_size, config.vocab_size, device)
        check_class_ids("GPT", class_ids, config.num_classes)
        check_device("GPT", "class_ids", class_ids, device)
        if codes.shape[0] != class_ids.shape[0]:
            raise ValueError(
                f"GPT: codes and class_ids must have one batch size, "
                f"got {codes.shape[0]} and {class_ids.shape[0]}"
            )
        if self.training and config.class_dropout > 0:
            dropped = torch.rand(class_ids.shape, device=class_ids.device) < config.class_dropout
            class_ids = class_ids.long().masked_fill(dropped, config.num_classes)
        return self.embed(class_ids, codes[:, :-1])

    def embed(self, class_ids: Tensor, codes: Tensor) -> Tensor:
        """Embed [B] classes and [B, T] codes: the transformer's input [B, 1 + T, C]."""
        first = self.class_embedding(class_ids.long())[:, None]
        return self.dropout(torch.cat([first, self.token_embedding(codes.long())], dim=1))

    def predict(self, x: Tensor) -> Tensor:
        """From embedded positions [B, T, C] to logits [B, T, K]."""
        logits = self.head(self.hidden(x))
        return logits if logits.dtype == torch.float64 else logits.float()

    def hidden(self, x: Tensor) -> Tensor:
        """From embedded positions [B, T, C] to the input of the head, [B, T, C]."""
        rotary = self.rotary[: x.shape[1]]
        return self.norm(through(self.blocks, x, rotary, recompute=self.grad_checkpointing))

    def step_weights(self, condition: None = None) -> StepWeights:
        """See `Generator.step_weights`."""
        own = (type(self).embed, type(self).hidden, type(self).predict)
        if own != (GPT.embed, GPT.hidden, GPT.predict):
            raise TypeError(
                f"generate: computes what GPT does, and {type(self).__name__} overrides embed, "
                "hidden or predict"
            )
        check_plain(self, type(self))
        check_plain(self.dropout, nn.Dropout, nn.Identity)
        blocks = tuple(block.step_weights() for block in self.blocks)
        norms = (self.norm, *(n for b in self.blocks for n in (b.attention_norm, b.ffn_norm)))
        check_eps(norms, self.config.norm_eps)
        return StepWeights(
            blocks, _weight(self.norm), _weight(self.head), self.rotary, self.config.norm_eps
        )

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return _weight(self.class_embedding), _weight(self.token_embedding)

    @classmethod
    def from_official(
        cls, checkpoint: str | Path | Mapping, config: GPTConfig | Mapping | str | None = None
    ) -> GPT:
        """Load a generator of the authors' release; see `vfmtok_fast.checkpoint.load_gpt`.

        Args:
            checkpoint: the authors' file, the mapping in it, or the name of a preset such as
                ``"GPT-L"``, whose file is then downloaded.
            config: the name of a preset, a `GPTConfig` or its fields; None is the preset that
                ``checkpoint`` names.
        """
        if isinstance(checkpoint, str) and checkpoint in PRESETS:
            config = config or checkpoint
            checkpoint = fetch_official(checkpoint, "checkpoint=")
        if config is None:
            raise ValueError(
                "GPT.from_official: config must be a preset's name, a GPTConfig or its fields, "
                f"as in GPT.from_official({str(checkpoint)[:80]!r}, 'GPT-L'); presets are "
                f"{sorted(PRESETS)}"
            )
        check_there(checkpoint, "GPT checkpoint")
        return load_gpt(unfilled(cls, config), checkpoint)
