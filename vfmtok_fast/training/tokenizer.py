"""The training step of the tokenizer: its losses, two learners, and upkeep of the codebook."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tokenizer import VFMTok
from ..tokenizer.precision import precision_of
from . import losses, processes
from .learner import Learner
from .settings import TokenizerTraining
from .trainer import NotFinite, Sums, Trainer, add

# Number of codes over which codebook usage is reported, as the authors count it; at least a batch.
USAGE_WINDOW = 65_536


class TokenizerTrainer(Trainer):
    """Trains a tokenizer, except for its backbone.

    >>> trainer = training.TokenizerTrainer(tok, settings, lpips=lpips, discriminator=disc)
    >>> terms = trainer.step(images)

    Args:
        model: on the device to train on, in float32 (`set_precision("mixed")` works too).
        settings: how to train.
        lpips: maps images and reconstructions to distances [B]; needed unless its weight is 0.
        discriminator: maps images to logits; None trains without.
        sharded: see `Trainer`; applies to the tokenizer only.

    Raises:
        TypeError: the weights were rounded to half precision.
        ValueError: LPIPS has a weight but is not given, or ``sharded`` meets ``adaptive_weight``.
    """

    settings: TokenizerTraining

    def __init__(
        self,
        model: VFMTok,
        settings: TokenizerTraining | None = None,
        *,
        lpips: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        sharded: bool = False,
    ) -> None:
        settings = settings or TokenizerTraining()
        precision = precision_of(model)
        if precision not in ("float32", "tf32", "float64", "mixed"):
            raise TypeError(
                f"TokenizerTrainer: weights must be float32 to learn, got {precision}; load the "
                "model again, and set precision='bfloat16' in the settings to compute in half "
                "precision"
            )
        if lpips is None and settings.perceptual_weight > 0:
            raise ValueError(
                "TokenizerTrainer: a perceptual_weight needs lpips, such as LPIPS.from_files "
                "returns; perceptual_weight=0 trains without it"
            )
        if sharded and settings.adaptive_weight:
            raise ValueError(
                "TokenizerTrainer: adaptive_weight needs a separate gradient, which sharded "
                "weights do not provide; choose one of the two"
            )
        if settings.revive_after is not None and not model.quantizer.codebook.requires_grad:
            raise ValueError(
                "TokenizerTrainer: revive_after resets rows of the codebook, which is frozen; "
                "choose one of the two"
            )
        for part in (model.region_encoder, model.token_decoder, model.pixel_decoder):
            part.grad_checkpointing = settings.grad_checkpointing
        model.tf32 = precision == "mixed" or settings.precision != "float32"
        super().__init__(model, settings, frozen="backbone", sharded=sharded)
        self.tf32 = model.tf32
        self.lpips, self.discriminator = lpips, discriminator
        for module in (lpips, discriminator):
            weights = () if module is None else module.parameters()
            if any((w.device, w.dtype) != (model.device, model.dtype) for w in weights):
                module.to(model.device, model.dtype)
        self.judge: Learner | None = None
        if discriminator is not None:
            processes.share_first(_thawed(discriminator).values())
            self.judge = Learner(
                discriminator, settings, lr=settings.discriminator_lr, decays=lambda weight: False
            )
        # For each code, the number of images seen when it was last used and when it was last reset.
        self.last_used, self.revived_at = torch.zeros(
            2, model.config.codebook_size, dtype=torch.int64, device=model.device
        )
        # How often each code was used since the last report.
        self._counts = torch.zeros_like(self.last_used)

    @property
    def learners(self) -> dict[str, Learner]:
        found = super().learners
        return found if self.judge is None else found | {"disc_grad_norm": self.judge}

    def layers(self, model: VFMTok) -> list[nn.Module]:
        pixels = model.pixel_decoder
        both = (*model.region_encoder.layers, *model.token_decoder.layers)
        return [*both, *pixels.middle, *pixels.levels]

    def step(self, images: Tensor) -> dict[str, float]:
        """Train on a batch; with several processes, each passes its share, all of equal size.

        Args:
            images: [B, 3, S, S] in [-1, 1], on the model's device.

        Returns:
            ``rec`` (pixel loss), ``mse``, ``perceptual``, ``semantic``, ``codebook``, ``commit``,
            ``entropy``, ``total`` (weighted sum of these and the adversarial loss), ``grad_norm``
            (before clipping), ``lr`` and ``usage`` (share of the codes that were used recently).
            With a discriminator, unless it is not run yet, also ``generator`` and ``discriminator``
            (losses before the weight), ``logits_real``, ``logits_fake`` and ``disc_grad_norm``.

        Raises:
            NotFinite: a term or a gradient is NaN or infinite; nothing has been updated.
            TypeError, ValueError: as for `VFMTok.encode`, or the batch is empty.
        """
        settings, number = self.settings, self.steps + 1
        if len(images) == 0:
            raise ValueError("TokenizerTrainer: images must hold at least one picture, got none")
        # The models may have been put in eval mode between steps.
        self.model.train()
        if self.discriminator is not None:
            self.discriminator.train()
        pieces = images.to(self.model.dtype).split(settings.micro_batch or len(images))
        sums: Sums = {}
        found: list[tuple[Tensor, Tensor]] = []  # codes and queries of each piece
        judged = self.judge is not None and (
            settings.idle_discriminator or number >= settings.update_start
        )
        with self._step(number), self._buffers_kept():
            self.learner.zero_grad()
            outputs = [
                self._learn(piece, number, len(piece) / len(images), sums, found)
                for piece in pieces
            ]
            sums["grad_norm"] = self.learner.gather()
            if judged:
                with self.clock.stage("discriminator"):
                    self.judge.zero_grad()
                    for piece, fake in zip(pieces, outputs, strict=True):
                        self._judge(piece, fake, number, len(piece) / len(images), sums)
                    sums["disc_grad_norm"] = self.judge.gather()
            terms = self._finite(sums, number)
            with self.clock.stage("update"):
                self.learner.step(settings.rate(number))
                self.average.follow()
                if judged:
                    self.judge.step(settings.discriminator_rate(number))
            self.steps = number
            return terms | {"lr": settings.rate(number)} | self._use_codes(found, len(images))

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Restore the discriminator's buffers, vectors of spectral norms, if a step is refused."""
        buffers = [] if self.discriminator is None else list(self.discriminator.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        except NotFinite:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise

    def _learn(self, images: Tensor, number: int, share: float, sums: Sums, found: list) -> Tensor:
        """Add gradients of the tokenizer's loss; return reconstructions for the discriminator."""
        settings, terms = self.settings, {}
        with self._autocast():
            with self._timed_forward():
                out = self.model(images, semantic=settings.semantic_weight > 0)
            fake = out.reconstruction.to(images.dtype)
            terms["rec"] = losses.PIXEL[settings.pixel_loss](fake, images)
            terms["mse"] = losses.PIXEL["l2"](fake, images)
            total = terms["rec"] + settings.mse_weight * terms["mse"]
            if settings.perceptual_weight > 0:
                terms["perceptual"] = self.lpips(images, fake).mean()
                total = total + settings.perceptual_weight * terms["perceptual"]
            if settings.semantic_weight > 0:
                terms["semantic"] = losses.semantic_loss(out.semantic, out.features)
                total = total + settings.semantic_weight * terms["semantic"]
            for name in ("codebook", "commit", "entropy"):
                terms[name] = getattr(out, f"{name}_loss")
                total = total + terms[name]
            total = total + self._adversarial(fake, number, terms)
        terms["total"] = total
        with self.clock.stage("backward"):
            self.learner.backward(share * total)
        add(sums, terms, share)
        found.append((out.codes.flatten(), out.queries.detach().flatten(0, 1)))
        return fake.detach()

    def _adversarial(self, fake: Tensor, number: int, terms: dict[str, Tensor]) -> Tensor | float:
        """The generator's weighted loss; 0 before its start."""
        settings = self.settings
        counts = number >= settings.discriminator_start and settings.discriminator_weight > 0
        if self.judge is None or not (counts or settings.idle_discriminator):
            return 0.0
        # The discriminator needs no gradients here; before the start nothing does.
        with torch.set_grad_enabled(counts), self.judge.frozen():
            loss = losses.GENERATOR[settings.generator_loss](self.discriminator(fake))
        terms["generator"] = loss
        if not counts:
            return 0.0
        weight: Tensor | float = settings.discriminator_weight
        if settings.adaptive_weight:
            rest = terms["rec"] + settings.mse_weight * terms["mse"]
            rest = rest + settings.perceptual_weight * terms.get("perceptual", 0.0)
            last = self.model.pixel_decoder.conv_out.weight
            scale = self.learner.scaler.get_scale()
            weight = weight * losses.adaptive_weight(rest, loss, last, scale)
        return weight * loss

    def _judge(self, images: Tensor, fake: Tensor, number: int, share: float, sums: Sums) -> None:
        """Add gradients of the discriminator's loss; they are zero before it learns."""
        settings = self.settings
        learns = number >= settings.update_start and settings.discriminator_weight > 0
        with self._autocast(), torch.set_grad_enabled(learns):
            of_fake, of_real = self.discriminator(fake), self.discriminator(images)
            loss = losses.DISCRIMINATOR[settings.discriminator_loss](of_real, of_fake)
        if learns:
            self.judge.backward(share * settings.discriminator_weight * loss)
        else:
            self.judge.no_gradient()
        logits = {"logits_real": of_real.mean(), "logits_fake": of_fake.mean()}
        add(sums, {"discriminator": loss, **logits}, share)

    def _use_codes(self, found: list[tuple[Tensor, Tensor]], images: int) -> dict[str, float]:
        """Count the codes of a step, reset codes unused for long, and return terms to report."""
        together = images * processes.world_size()
        self.images += together
        codes, queries = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.last_used[codes] = self.images
        processes.largest(self.last_used)
        self._counts += codes.bincount(minlength=len(self._counts))
        told = {}
        if self.settings.revive_after is not None:
            told["revived"] = float(self._revive(queries))
        # Whole steps, at least this one.
        window = max(together, USAGE_WINDOW // self.model.config.num_regions)
        recent = self.last_used >= max(1, self.images - window + together)
        return told | {"usage": float(recent.float().mean())}

    @torch.no_grad()
    def _revive(self, queries: Tensor) -> int:
        """Set codes unused for long to the directions of queries, and return how many were set.

        All processes have the same usage counts and take the queries of the first process. Adam's
        moments of the old rows are set to zero.
        """
        known = torch.maximum(self.last_used, self.revived_at)
        unused = (known <= self.images - self.settings.revive_after).nonzero()[:, 0]
        chosen = torch.randperm(len(queries), device=queries.device)[: len(unused)]
        unused, rows = unused[: len(chosen)], queries[chosen].contiguous()
        if len(unused) == 0:
            return 0
        processes.share_first([rows])
        codebook = self.model.quantizer.codebook
        rows = rows.to(codebook.dtype)
        for held in (codebook, self.ema.quantizer.codebook):
            _set_rows(held, unused, rows)
        moments = self.learner.moments(codebook)
        # There are no moments yet if float16 has skipped all steps so far. The order is the same on
        # all processes, because they communicate to set rows of a sharded codebook.
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moments:
                _set_rows(moments[name], unused, torch.zeros_like(rows))
        self.revived_at[unused] = self.images
        return len(unused)

    def report(self) -> dict[str, float]:
        """Codebook statistics since the last report.

        Returns:
            ``perplexity``, the exponential of the entropy of the codes' shares, which is the number
            of equally used codes with the same entropy; ``dead_codes``, the number of codes never
            used.
        """
        counts = self._counts.double()
        processes.average([counts])
        self._counts.zero_()
        shares = counts / counts.sum().clamp(min=1)
        entropy = -torch.special.xlogy(shares, shares).sum()
        return {"perplexity": math.exp(float(entropy)), "dead_codes": float((counts == 0).sum())}

    @contextlib.contextmanager
    def _timed_forward(self) -> Iterator[None]:
        """Time a forward pass as "encode", from the backbone to the codes, and "decode"."""
        begin = [self.clock.mark()]

        def encoded(*_: object) -> None:
            self.clock.add("encode", begin[0])
            begin[0] = self.clock.mark()

        hook = self.model.quantizer.register_forward_hook(encoded)
        try:
            yield
        finally:
            hook.remove()
        self.clock.add("decode", begin[0])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state |= {"last_used": self.last_used.clone(), "revived_at": self.revived_at.clone()}
        if self.judge is not None:
            state["discriminator"] = _thawed(self.discriminator)
            state["discriminator_optimizer"] = self.judge.state_dict()
        return state

    def _check_learned(self, state: Mapping[str, Any]) -> None:
        super()._check_learned(state)
        if self.judge is not None:
            self.judge.check(state["discriminator_optimizer"])

    def load_state_dict(self, state: Mapping[str, Any], *, changed: bool = False) -> None:
        if ("discriminator" in state) != (self.judge is not None):
            had = "had a" if "discriminator" in state else "had no"
            raise ValueError(f"resuming: the run {had} discriminator")
        super().load_state_dict(state, changed=changed)
        if self.judge is not None:
            found = {**self.discriminator.state_dict(), **state["discriminator"]}
            self.discriminator.load_state_dict(found)
            self.judge.load_state_dict(state["discriminator_optimizer"])
        self.last_used.copy_(state["last_used"])
        self.revived_at.copy_(state["revived_at"])


def _set_rows(held: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Set ``held[numbers] = rows``, even if ``held`` is sharded."""
    if not processes.is_sharded(held):
        held[numbers] = rows
        return
    new = processes.whole(held)
    new[numbers] = rows
    held.copy_(processes.as_part_of(held, new))


def _thawed(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {k: v for k, v in module.state_dict().items() if k not in frozen}
