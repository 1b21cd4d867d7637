"""The training step of the generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..generator import GPT
from . import processes
from .settings import GPTTraining
from .trainer import Sums, Trainer, add


class GPTTrainer(Trainer):
    """Trains a generator on codes.

    >>> trainer = training.GPTTrainer(gpt, training.GPTTraining(lr=1e-4))
    >>> terms = trainer.step(codes, class_ids)

    Args:
        model: on the device to train on, in float32.
        settings: how to train.
        sharded: see `Trainer`.

    Raises:
        TypeError: another model, or its weights were rounded to half precision.
    """

    settings: GPTTraining

    def __init__(
        self, model: GPT, settings: GPTTraining | None = None, *, sharded: bool = False
    ) -> None:
        if not isinstance(model, GPT):
            raise TypeError(f"GPTTrainer: model must be a GPT, got {type(model).__name__}")
        if model.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"GPTTrainer: weights must be float32 to learn, got {model.dtype}; load the model "
                "again, and set precision='bfloat16' in the settings to compute in half precision"
            )
        settings = settings or GPTTraining()
        model.grad_checkpointing = settings.grad_checkpointing
        super().__init__(model, settings, sharded=sharded)
        if sharded:
            processes.called_whole(model, "loss")

    def layers(self, model: GPT) -> list[nn.Module]:
        return list(model.blocks)

    def decays(self, weight: Tensor) -> bool:
        return weight.ndim >= 2

    def rates(self, images_per_second: float) -> dict[str, float]:
        tokens = self.model.config.block_size * images_per_second
        return super().rates(images_per_second) | {"tokens_per_second": tokens}

    def step(self, codes: Tensor, class_ids: Tensor) -> dict[str, float]:
        """Train on a batch; with several processes, each passes its share, all of equal size.

        Args:
            codes: [B, block_size] integers in [0, vocab_size), on the model's device.
            class_ids: [B] integers in [0, num_classes).

        Returns:
            ``loss``, mean cross-entropy in nats per code; ``grad_norm`` (before clipping); ``lr``.

        Raises:
            NotFinite: the loss or a gradient is NaN or infinite; nothing has been updated.
            TypeError, ValueError: as for `GPT.loss`, or the batch is empty.
        """
        if len(codes) == 0:
            raise ValueError("GPTTrainer: codes must hold at least one image, got none")
        settings, number = self.settings, self.steps + 1
        self.model.train()
        size = settings.micro_batch or len(codes)
        sums: Sums = {}
        with self._step(number):
            self.learner.zero_grad()
            for some, classes in zip(codes.split(size), class_ids.split(size), strict=True):
                share = len(some) / len(codes)
                with self.clock.stage("forward"), self._autocast():
                    loss = self.model.loss(some, classes)
                with self.clock.stage("backward"):
                    self.learner.backward(share * loss)
                add(sums, {"loss": loss}, share)
            sums["grad_norm"] = self.learner.gather()
            terms = self._finite(sums, number)
            with self.clock.stage("update"):
                self.learner.step(settings.rate(number))
                self.average.follow()
            self.steps = number
            self.images += len(codes) * processes.world_size()
        return terms | {"lr": settings.rate(number)}
