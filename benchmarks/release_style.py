"""Generation as in the authors' release: a baseline for the benchmarks, not for use.

LlamaGen's loop as published: both halves of the guided batch up to the last step, attention over
the whole padded cache under a boolean mask, and a multinomial draw. It was written from the
description of the release; the weights are those of our model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmtok_fast import GPT
from vfmtok_fast.functional import rms_norm, rotate


class Cache(nn.Module):
    """KV cache as module buffers, as in the release, so that torch.compile can use CUDA graphs."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)


class ReleaseStyle(nn.Module):
    """Generates with the weights of ``model``; the caches serve one batch size."""

    def __init__(self, model: GPT, rows: int, compiled: bool = False):
        super().__init__()
        config, weight = model.config, model.head.weight
        self.model = model
        # Padded to a multiple of 8, as the release does.
        capacity = -(-(config.block_size + 1) // 8) * 8
        shape = (rows, config.num_heads, capacity, config.head_dim)
        self.caches = nn.ModuleList(
            Cache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.blocks
        )
        square = torch.ones(capacity, capacity, device=weight.device, dtype=torch.bool)
        self.register_buffer("mask", square.tril())
        self.next = self.step
        if compiled:  # As in the release's sampling script; only useful on a GPU.
            self.next = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)

    def step(self, x: Tensor, at: Tensor) -> Tensor:
        """Map x [rows, 1, C] at position ``at`` [1] to logits [rows, K]."""
        model = self.model
        rotary, mask = model.rotary[at], self.mask[None, None, at]
        for block, cache in zip(model.blocks, self.caches, strict=True):
            attention, ffn = block.attention, block.ffn
            qkv = attention.qkv(block.attention_norm(x))
            q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
            q, k = (rotate(t, rotary[:, None]).transpose(1, 2) for t in (q, k))
            cache.keys[:, :, at], cache.values[:, :, at] = k, v.transpose(1, 2)
            # With a mask and one query, torch uses its plain ("math") attention on GPUs.
            scores = q @ cache.keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
            x = x + attention.out((weights @ cache.values).transpose(1, 2).flatten(2))
            n = block.ffn_norm(x)
            gate, up = ffn.gate_up.weight.chunk(2)
            x = x + ffn.down(F.silu(F.linear(n, gate)) * F.linear(n, up))
        return F.linear(rms_norm(x, model.norm.weight, model.norm.eps), model.head.weight)[:, -1]

    @torch.no_grad()
    def generate(self, class_ids: Tensor, cfg_scale: float, count: int) -> Tensor:
        """Generate the first ``count`` codes [B, count] of each image."""
        model, B = self.model, len(class_ids)
        none = torch.full_like(class_ids, model.config.num_classes)
        x = model.class_embedding(torch.cat([class_ids, none]))[:, None]
        codes = []
        for step in range(count):
            logits = self.next(x, torch.tensor([step], device=x.device)).float()
            logits = logits[B:] + cfg_scale * (logits[:B] - logits[B:])
            codes.append(torch.multinomial(logits.softmax(dim=-1), 1))
            x = model.token_embedding(torch.cat([codes[-1], codes[-1]]))
        return torch.cat(codes, dim=1)
