"""How well a tokenizer reconstructs images: rFID, rIS, PSNR, SSIM, LPIPS, codebook usage."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.format.fingerprint import weights_checksum
from ..cache.sources import Source
from ..cache.sources.choice import named_split
from ..images import to_float
from ..tf32 import computing
from ..tokenizer import VFMTok
from .features import Activations, Inception
from .metrics import WINDOW, frechet_distance, inception_score, psnr, ssim
from .pictures import Pictures, compared, model_input
from .protocols import Reconstruction

# LPIPS's VGG16 halves an image four times.
HALVED = 16


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: VFMTok,
    source: Source,
    protocol: Reconstruction,
    inception: Inception | None = None,
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 16,
    workers: int = 4,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Reconstruct images and compare the reconstructions with them.

    Args:
        tokenizer: in eval mode.
        source: the images, from `cache.sources.open_source`.
        protocol: how to compare them.
        inception: for rFID and rIS; None leaves both out.
        lpips: distances [B] between images [B, 3, H, W] in [-1, 1], such as `training.LPIPS`.
        batch_size: images at a time.
        workers: number of reader threads.
        advance: called with the number of images done.

    Returns:
        The result as plain JSON values: protocol, what was compared, metrics, warnings.

    Raises:
        ValueError: there are fewer images than the protocol takes, or they are of another kind.
    """
    pictures = Pictures(
        source, tokenizer.config.image_size, num=protocol.num, crop=protocol.crop,
        size=protocol.size, workers=workers,
    )  # fmt: skip
    # Checked before the work.
    if inception is not None and protocol.num < 2:
        raise ValueError(f"--num must be at least 2, which rFID needs, got {protocol.num}")
    who, least = ("SSIM", WINDOW) if lpips is None else ("LPIPS", HALVED)
    if protocol.size < least:
        raise ValueError(f"--size must be at least {least}, which {who} needs, got {protocol.size}")
    sums = _Sums(protocol, tokenizer, inception, lpips)
    for batch in pictures.batches(batch_size):
        images = model_input(batch.squares, tokenizer.device, tokenizer.dtype)
        codes = tokenizer.encode(images)
        made = compared(tokenizer.decode(codes), protocol.size, protocol.resize)
        originals = batch.originals
        if originals is None:
            originals = compared(to_float(batch.squares), protocol.size, protocol.resize)
        sums.add(originals, made, codes)
        advance(len(made))
    if not sums.count:
        raise ValueError(f"{source.shown}: no picture could be read")
    warnings = []
    if sums.equal:
        warnings.append(
            f"{sums.equal} pictures equal their reconstructions; PSNR is the mean of the others"
        )
    if pictures.bad:
        warnings.append(f"{len(pictures.bad)} pictures could not be read and were left out")
    if named_split(str(source.shown)) == "train":
        warnings.append(
            f"{source.shown} is named as a training set; published rFIDs are of validation pictures"
        )
    return {
        "protocol": dataclasses.asdict(protocol),
        "compared": {
            "source": str(source.shown), "chosen": source.chosen, "pictures": sums.count,
            "unreadable": len(pictures.bad),
            "sha256": sums.digests[0].hexdigest(),
            "reconstructions_sha256": sums.digests[1].hexdigest(),
        },
        "tokenizer": {
            "sha256": weights_checksum(tokenizer.state_dict()), "precision": tokenizer.precision,
        },
        "inception": None if inception is None else inception.described,
        "metrics": sums.metrics(),
        "warnings": warnings,
    }  # fmt: skip


class _Sums:
    """What is kept of the images: sums, digests, and features for rFID."""

    def __init__(
        self, protocol: Reconstruction, tokenizer: VFMTok, inception: Inception | None,
        lpips: Callable[[Tensor, Tensor], Tensor] | None,
    ):  # fmt: skip
        self.protocol, self.inception, self.lpips = protocol, inception, lpips
        self.count = self.equal = 0
        self.used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool)
        self.digests = hashlib.sha256(), hashlib.sha256()
        self.sums: dict[str, float] = {}
        self.seen = [] if inception is None else [Activations(inception) for _ in range(2)]
        self.device = tokenizer.device

    def add(self, originals: np.ndarray, made: np.ndarray, codes: Tensor) -> None:
        self.count += len(made)
        self.used[codes.flatten().cpu()] = True
        pair = [torch.from_numpy(one).to(self.device) for one in (originals, made)]
        decibels = psnr(*pair)
        # PSNR of equal images is infinite.
        self.equal += int(decibels.isinf().sum())
        terms = {"PSNR": decibels[decibels.isfinite()]}
        for data_range in self.protocol.ssim_ranges:
            terms[f"SSIM, range {data_range}"] = ssim(*pair, data_range)
        if self.lpips is not None:
            with computing(self.device, tf32=False):
                terms["LPIPS"] = self.lpips(*map(to_float, pair))
        for name, values in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        for number, some in enumerate((originals, made)):
            self.digests[number].update(np.ascontiguousarray(some))
            if self.seen:
                self.seen[number].add(some)

    def metrics(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        if self.seen:
            found["rFID"] = frechet_distance(
                *(one.moments["pool"].statistics() for one in self.seen)
            )
            logits = self.inception.logits(self.seen[1].pool)
            found["rIS"] = inception_score(logits, self.protocol.split)
        for name, total in self.sums.items():
            count = self.count - (self.equal if name == "PSNR" else 0)
            found[name] = total / count if count else None
        return found | {"codebook usage": float(self.used.double().mean())}
