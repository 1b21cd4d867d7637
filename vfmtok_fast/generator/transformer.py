"""The generator: a LlamaGen-style GPT over the 256 codes of an image, class by class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hub import HubModel, config_from_mapping
from ..ops import unchecked
from ..ops.checks import (
    check_class_ids,
    check_codes,
    check_device,
    check_position,
    check_same,
    check_shape,
    check_tensor,
)
from ..reference.rms_norm import rms_norm
from ..reference.rotary import rotate
from .config import GPTConfig
from .generate import generate, stream
from .kv_cache import KVCache
from .linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_table(config: GPTConfig) -> Tensor:
    """Cosine and sine of every position, [1 + block_size, head_dim / 2, 2] float32.

    The first half of the pairs rotates with the row of the code, the second with its column. The
    class position, the first, holds zeros in both, as the release has it: its q and k vanish.
    """
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_base ** (torch.arange(0, half, 2).float() / half)
    side = math.isqrt(config.block_size)
    angle = torch.arange(side).float()[:, None] * frequency
    by_row = angle[:, None].expand(side, side, -1)
    by_column = angle[None, :].expand(side, side, -1)
    angles = torch.cat([by_row, by_column], dim=-1).reshape(side * side, half)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x [B, T, C], all positions at once; rotary [T, D / 2, 2]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # One table row for all heads.
        q, k = rotate(q, rotary[:, None]), rotate(k, rotary[:, None])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.dropout(self.out(mixed.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.ffn(self.ffn_norm(x))

    def step(
        self, x: Tensor, rotary: Tensor, keys: Tensor, values: Tensor, at: int | Tensor,
        length: int | Tensor,
    ) -> Tensor:  # fmt: skip
        """The same for position ``at`` alone, x [B, C], with a cache [B, H, T, D] of the others.

        ``length`` is ``at + 1``, which on a GPU is a launch of its own and the same for all layers.

        Without dropout. Each line is an op, so that `enable` reaches all of a decoding step; none
        checks its arguments, as `GPT.step` has.
        """
        attention, ffn, eps = self.attention, self.ffn, self.ffn_norm.eps
        qkv, out, gate, up, down = attention.qkv, attention.out, ffn.gate, ffn.up, ffn.down
        norm = self.attention_norm.weight
        q = unchecked.qkv_rotary(
            x, norm, qkv.weight, rotary, keys, values, at, scale=qkv.scale, eps=eps
        )
        mixed = unchecked.decode_attention(q, keys, values, length).flatten(1)
        x = unchecked.linear_residual(mixed, out.weight, x, scale=out.scale)
        norm, scales = self.ffn_norm.weight, {"gate_scale": gate.scale, "up_scale": up.scale}
        hidden = unchecked.gate_up(x, norm, gate.weight, up.weight, **scales, eps=eps)
        return unchecked.linear_residual(hidden, down.weight, x, scale=down.scale)


class GPT(nn.Module, HubModel, library_name="vfmtok_fast", tags=["vfmtok"]):
    """Class-conditional autoregressive model of VFMTok codes.

    Args:
        config: a `GPTConfig`, its fields as a mapping, or the name of a preset such as ``"GPT-L"``.

    Source: LlamaGen (arXiv 2406.06525); VFMTok (arXiv 2507.08441) section 3.3.
    """

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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # As the release starts: all codes equally likely.
        nn.init.zeros_(self.head.weight)

    generate = generate
    stream = stream

    def _apply(self, fn, recurse: bool = True) -> GPT:
        # .to(bfloat16) must not round the angles: the release keeps them in float32.
        super()._apply(fn, recurse)
        self.rotary = rotary_table(self.config).to(self.device)
        return self

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; weights may be of 8 bits, see `quantize_weights`."""
        return self.norm.weight.dtype

    @property
    def quantized(self) -> bool:
        """Whether `quantize_weights` was called."""
        return self.head.scale is not None

    @torch.no_grad()
    def quantize_weights(self) -> GPT:
        """Round the weights of all linear layers to int8, in place, to save memory.

        Every row (output channel) gets a float32 scale, its largest magnitude / 127; embeddings and
        norms stay as they are, and so does the dtype that is computed in. A step then reads about
        half of the bytes of a bfloat16 model; kernels/decode_step.md says where that saves time,
        and how much codes change. It is for inference, cannot be undone, and is not saved: load the
        weights and call it again. Calling it a second time does nothing.

        Returns:
            The model itself.

        Raises:
            ValueError: weights that hold NaN, infinity or what is beyond float32, or that have no
                values (on the meta device); the model is then left as it is.
        """
        layers = {name: m for name, m in self.named_modules() if isinstance(m, Linear)}
        if self.device.type == "meta":
            raise ValueError("quantize_weights: the weights are on meta and have no values yet")
        if wrong := [n for n, m in layers.items() if not bool(m.weight.float().isfinite().all())]:
            raise ValueError(f"quantize_weights: NaN or infinity in the weights of {wrong}")
        for layer in layers.values():
            layer.quantize()
        return self

    def save_pretrained(self, save_directory: str | Path, **options) -> str | None:
        """See `HubModel.save_pretrained`.

        Raises:
            ValueError: after `quantize_weights`, whose result is not saved.
        """
        if self.quantized:
            raise ValueError(
                "save_pretrained: the weights are int8, which is not saved; save the model before "
                "quantize_weights, and call that again after loading"
            )
        return super().save_pretrained(save_directory, **options)

    def forward(self, codes: Tensor, class_ids: Tensor) -> Tensor:
        """Teacher forcing: logits of every code from the class and the codes before it.

        In training mode a class is replaced by "no class" with probability ``class_dropout``.

        Args:
            codes: [B, block_size] integers in [0, vocab_size).
            class_ids: [B] integers in [0, num_classes).

        Returns:
            float32 [B, block_size, vocab_size] (float64 for a float64 model); position i predicts
            code i.

        Raises:
            TypeError, ValueError: wrong shape, dtype or range.
        """
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
            class_ids = class_ids.masked_fill(dropped, config.num_classes)
        return self.predict(self.embed(class_ids, codes[:, :-1]))

    def embed(self, class_ids: Tensor, codes: Tensor) -> Tensor:
        """[B] classes and [B, T] codes to the transformer's input [B, 1 + T, C]."""
        x = torch.cat(
            [self.class_embedding(class_ids.long())[:, None], self.token_embedding(codes.long())],
            dim=1,
        )
        return self.dropout(x)

    def predict(self, x: Tensor) -> Tensor:
        """Embedded positions [B, T, C] to logits [B, T, K]."""
        rotary = self.rotary[: x.shape[1]]
        for block in self.blocks:
            x = block(x, rotary)
        logits = self.head(self.norm(x))
        return logits if logits.dtype == torch.float64 else logits.float()

    def step(
        self, x: Tensor, cache: KVCache, at: int | Tensor, length: int | Tensor | None = None
    ) -> Tensor:
        """Embedded position ``at`` [B, C] to its logits [B, K]; goes into the cache as well.

        Args:
            x: of the model's dtype and device.
            cache: a `KVCache` of this model's config, with B rows.
            at: in 0..block_size - 1, an int or a tensor of one element (whose value is not read).
            length: ``at + 1``, of the same kind, for who has it: on a GPU it is a launch.

        Raises:
            TypeError, ValueError: wrong shape, dtype, device, position or cache; autocast is on.
                Checked here once for all layers, whose ops do not look again.
        """
        if cache.config != self.config:
            raise ValueError("GPT: the cache must be of this model's config, got one of another")
        keys = cache.keys[0]
        check_tensor("GPT", "x", x, "[B, C]", 2)
        if torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                "GPT: generation must not be under autocast, which would change its dtypes op by "
                "op; convert the model instead, as with gpt.bfloat16()"
            )
        check_shape("GPT", "x", x, (keys.shape[0], self.config.dim))
        check_same("GPT", x=x, weight=self.norm.weight, cache=keys)
        check_position("GPT", "at", at, 0, keys.shape[2], (1,), x=x)
        if length is None:
            length = at + 1
        check_position("GPT", "length", length, 1, keys.shape[2] + 1, (1,), x=x)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block.step(x, self.rotary, keys, values, at, length)
        norm, head = self.norm, self.head
        return unchecked.norm_linear(x, norm.weight, head.weight, scale=head.scale, eps=norm.eps)

    @classmethod
    def from_official(
        cls, checkpoint: str | Path | Mapping, config: GPTConfig | Mapping | str
    ) -> GPT:
        """Load a generator of the authors' release; see `vfmtok_fast.checkpoint.load_gpt`."""
        from ..checkpoint import load_gpt

        return load_gpt(cls(config), checkpoint)
