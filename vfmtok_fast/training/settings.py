"""Training settings of both trainers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..configs import check_numbers, check_positive
from . import losses

# Learning rate at the start of a warm-up.
FIRST_LR = 1e-7
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Training:
    """Settings that both trainers share. Steps are counted from 1.

    Args:
        lr, betas, weight_decay: parameters of the optimiser.
        optimizer: "adam" or "adamw".
        warmup_steps: steps in which the learning rate rises linearly from 1e-7 to ``lr``.
        schedule: learning rate after the warm-up: "constant", or "cosine" down to ``min_lr`` at
            ``total_steps``.
        clip: maximum norm of a model's gradients taken together; 0 disables clipping.
        micro_batch: items per forward and backward pass; their gradients add up to those of the
            batch. None: the whole batch.
        precision: "float32", "tf32", "bfloat16" or "float16". The last two use autocast, and TF32
            where autocast does not apply; float16 also scales the loss and skips steps whose
            gradients are not finite.
        ema: decay of the averaged weights.
        grad_checkpointing: keep only the inputs of each layer and recompute the rest in the
            backward pass: less memory, a third more work.
        compile: compile the layers with torch.compile.
        seed: seed of all random numbers, which depend only on it, the step number and the rank of
            the process.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    optimizer: str = "adam"
    warmup_steps: int = 0
    schedule: str = "constant"
    min_lr: float = 0.0
    total_steps: int | None = None
    clip: float = 1.0
    micro_batch: int | None = None
    precision: str = "float32"
    ema: float = 0.9999
    grad_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    # Allowed values of the fields, in this class and its subclasses.
    choices: ClassVar[Mapping[str, Any]] = {
        "optimizer": OPTIMIZERS,
        "schedule": ("constant", "cosine"),
        "precision": PRECISIONS,
    }
    amounts: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "warmup_steps", "min_lr", "clip")
    counts: ClassVar[tuple[str, ...]] = ("micro_batch", "total_steps")

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        name = type(self).__name__
        for field, known in self.choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{name}: {field} must be one of {', '.join(known)}, "
                    f"got {getattr(self, field)!r}"
                )
        check_numbers(self, dict.fromkeys(self.amounts, (0, math.inf)) | {"ema": (0, 1)})
        check_positive(self, [field for field in self.counts if getattr(self, field) is not None])
        if self.schedule == "cosine" and (self.total_steps or 0) <= self.warmup_steps:
            raise ValueError(
                f"{name}: a cosine schedule needs total_steps above warmup_steps, got "
                f"{self.total_steps} and {self.warmup_steps}"
            )

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast, or None."""
        half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        return half.get(self.precision)

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup_steps:
            return FIRST_LR + step * (self.lr - FIRST_LR) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        return self._cosine(self.lr, step, self.warmup_steps)

    def _cosine(self, lr: float, step: int, start: int) -> float:
        """Half a cosine from ``lr`` at ``start`` down to ``min_lr`` at ``total_steps``."""
        done = min(1.0, max(0, step - start) / max(1, self.total_steps - start))
        return self.min_lr + 0.5 * (lr - self.min_lr) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class TokenizerTraining(Training):
    """Settings to train a tokenizer; the defaults are the authors', except their 4 warm-up epochs.

    `Training` documents the other fields. Norm layers of a discriminator see only one micro-batch
    at a time. Autocast does not apply to the region encoder and the quantizer.

    Args:
        pixel_loss: "l2" or "l1".
        mse_weight: weight of a second pixel loss, always MSE. With "l2" the MSE counts twice, as in
            the authors' code.
        perceptual_weight, semantic_weight: weights of LPIPS and of the semantic loss; a loss of
            weight 0 is not computed.
        generator_loss: "softplus" ("non-saturating" is the same), "hinge" or "vanilla".
        discriminator_loss: "hinge", "vanilla" or "non-saturating".
        discriminator_weight: weight of both.
        adaptive_weight: scale the generator's loss to the gradient of the pixel and perceptual
            loss, as VQGAN does.
        discriminator_lr: learning rate, without warm-up; None is ``lr``. With a cosine schedule it
            follows one of its own, from its first step on.
        discriminator_start: first step in which the generator's loss counts.
        discriminator_update_start: first step in which the discriminator learns, not after
            ``discriminator_start``; None is ``discriminator_start``.
        idle_discriminator: run the discriminator even before it learns. Its Adam counts those
            steps, so that its first real step is shorter, as in the authors' runs. False does not
            run it until then.
        revive_after: number of images without use after which a code is reset to one of the batch's
            queries; None never does that, like the authors.
    """

    pixel_loss: str = "l2"
    mse_weight: float = 1.0
    perceptual_weight: float = 1.0
    semantic_weight: float = 1.0
    generator_loss: str = "softplus"
    discriminator_loss: str = "hinge"
    discriminator_weight: float = 0.5
    adaptive_weight: bool = False
    discriminator_lr: float | None = None
    discriminator_start: int = 20_000
    discriminator_update_start: int | None = None
    idle_discriminator: bool = True
    revive_after: int | None = None

    choices: ClassVar = Training.choices | {
        "pixel_loss": losses.PIXEL,
        "generator_loss": losses.GENERATOR,
        "discriminator_loss": losses.DISCRIMINATOR,
    }
    amounts: ClassVar = (
        *(*Training.amounts, "mse_weight", "perceptual_weight", "semantic_weight"),
        *("discriminator_weight", "discriminator_start"),
    )
    counts: ClassVar = (*Training.counts, "revive_after")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.discriminator_lr is not None:
            check_numbers(self, {"discriminator_lr": (0, math.inf)})
            if self.schedule == "cosine" and self.discriminator_lr < self.min_lr:
                raise ValueError(
                    "TokenizerTraining: discriminator_lr must be at least min_lr, where its cosine "
                    f"ends too, got {self.discriminator_lr} and {self.min_lr}"
                )
        if self.update_start > self.discriminator_start:
            raise ValueError(
                "TokenizerTraining: discriminator_update_start must not be after "
                f"discriminator_start, got {self.update_start} and {self.discriminator_start}"
            )

    @property
    def update_start(self) -> int:
        given = self.discriminator_update_start
        return self.discriminator_start if given is None else given

    def discriminator_rate(self, step: int) -> float:
        """The discriminator's learning rate at a step."""
        lr = self.lr if self.discriminator_lr is None else self.discriminator_lr
        return lr if self.schedule == "constant" else self._cosine(lr, step, self.update_start)


@dataclass(frozen=True)
class GPTTraining(Training):
    """Settings to train a generator; the defaults are the authors': AdamW, constant, no warm-up.

    `Training` documents all fields. Weight decay applies only to weights of two or more dimensions,
    including embeddings and head.
    """

    weight_decay: float = 0.05
    optimizer: str = "adamw"


def rae(steps_per_epoch: int) -> dict[str, Any]:
    """Fields of `TokenizerTraining` for the discriminator schedule of RAE, arXiv 2510.11690.

    The discriminator learns from epoch 6 on, and its loss counts for the tokenizer from epoch 8 on,
    with an adaptive weight. Both learning rates follow a cosine.
    """
    return {
        "discriminator_update_start": 6 * steps_per_epoch + 1,
        "discriminator_start": 8 * steps_per_epoch + 1,
        "discriminator_weight": 0.75,
        "adaptive_weight": True,
        "idle_discriminator": False,
        "schedule": "cosine",
        "ema": 0.9978,
    }
