"""What a cache of keys and values in 8 bits costs in quality: `python benchmarks/int8_quality.py`.

With teacher forcing over held-out codes, it compares the distribution at each position under the
model as it is, rounded to bfloat16, and with an int8 KV cache. It reports the cross-entropy per
code, the Kullback-Leibler divergence from the full model, and how often the most likely code is
the same. With a generator and a token cache of images that it was trained on (or, better, was not):

    python benchmarks/int8_quality.py --gpt gpt-l/ --tokens tokens/ --limit 1000

Without them, a small model is trained first, on synthetic codes.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast import GPT, GPTConfig, ops

SMALL = GPTConfig(
    num_layers=4, num_heads=4, dim=128, vocab_size=256, block_size=64, num_classes=8,
    class_dropout=0.0, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
)  # fmt: skip


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw 8 x 8 grids of codes: 45 % the left code plus a stride, 45 % the upper one, else any."""
    side, K = math.isqrt(SMALL.block_size), SMALL.vocab_size
    classes = torch.randint(0, SMALL.num_classes, (count,), generator=generator)
    codes = torch.randint(0, K, (count, side, side), generator=generator)
    choice = torch.rand(count, side, side, generator=generator)
    for row in range(side):
        for column in range(side):
            here = codes[:, row, column]
            left = (codes[:, row, column - 1] + 7 * classes + 3) % K if column else here
            above = codes[:, row - 1, column] if row else here
            pick = choice[:, row, column]
            codes[:, row, column] = torch.where(
                pick < 0.45, left, torch.where(pick < 0.9, above, here)
            )
    return codes.flatten(1), classes


def trained(steps: int) -> tuple[GPT, Tensor, Tensor]:
    """Return a small trained model, and codes that it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        codes, classes = draw(64, generator)
        loss = F.cross_entropy(model(codes, classes).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.4f} nats", flush=True)
    return model.eval(), *draw(512, generator)


def from_folders(options: argparse.Namespace) -> tuple[GPT, Tensor, Tensor]:
    from vfmtok_fast.cache import read_tokens

    tokens, labels = read_tokens(options.tokens, options.view)
    # Evenly spaced, because the index is ordered by class.
    rows = np.linspace(0, len(tokens) - 1, min(options.limit, len(tokens))).astype(int)
    codes, classes = (torch.from_numpy(part[rows].astype("int64")) for part in (tokens, labels))
    return GPT.from_pretrained(options.gpt), codes, classes


def logits(model: GPT, codes: Tensor, classes: Tensor, kv_dtype: torch.dtype | None) -> Tensor:
    """Return all positions' logits in float64; with ``kv_dtype`` step by step, as in generation."""
    if kv_dtype is None:
        return model(codes, classes).double()
    cache, weights = model.decoder(len(codes), kv_dtype=kv_dtype).cache, model.step_weights()
    made = [ops.decode_step(classes, model.class_embedding.weight, weights, cache, 0)]
    for at in range(1, codes.shape[1]):
        code = codes[:, at - 1].contiguous()
        made.append(ops.decode_step(code, model.token_embedding.weight, weights, cache, at))
    return torch.stack(made, dim=1).double()


@torch.no_grad()
def compare(model: GPT, codes: Tensor, classes: Tensor, device: torch.device) -> None:
    rounded = copy.deepcopy(model).bfloat16()
    versions = {
        "float32": (model, None),
        "bfloat16": (rounded, None),
        "int8 cache": (model, torch.int8),
        "int8 cache, bfloat16": (rounded, torch.int8),
    }
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in versions}
    for version, _ in versions.values():
        version.to(device)
    for part, labels in zip(codes.split(16), classes.split(16), strict=True):
        part, labels = part.to(device), labels.to(device)
        full = logits(model, part, labels, None).log_softmax(-1)
        for name, version in versions.items():
            law = logits(version[0], part, labels, version[1]).log_softmax(-1)
            loss = -law.gather(-1, part[..., None]).sum()
            divergence = (full.exp() * (full - law)).sum()
            same = (law.argmax(-1) == full.argmax(-1)).sum()
            totals[name] += torch.stack([loss, divergence, same]).cpu()
    print(f"\n{len(codes)} images of {codes.shape[1]} codes\n")
    print("| model | nats per code | KL from float32 | same likeliest code |\n|---|---|---|---|")
    for name, total in totals.items():
        loss, divergence, same = (total / codes.numel()).tolist()
        print(f"| {name} | {loss:.5f} | {divergence:.2e} | {100 * same:.2f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpt", type=Path, help="folder made by `vfmtok-fast convert`")
    parser.add_argument("--tokens", type=Path, help="folder made by `vfmtok-fast cache`")
    parser.add_argument("--view", default="center", help="view of the cache (%(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="images (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training, without --gpt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if (options.gpt is None) != (options.tokens is None):
        parser.error("--gpt and --tokens go together")
    try:
        found = from_folders(options) if options.gpt else trained(options.steps)
        compare(*found, torch.device(options.device))
    except (OSError, ValueError) as error:
        raise SystemExit(f"int8_quality: {error}") from error


if __name__ == "__main__":
    main()
