"""One step of the tokenizer's training: its losses, two optimisers, and the average of weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_images
from ..configs import check_numbers, check_positive
from ..tokenizer import VFMTok, VFMTokOutput
from ..tokenizer.precision import computing, precision_of
from . import losses, processes

# Where a warm-up starts.
FIRST_LR = 1e-7
# Codes over which the codebook's usage is told, as the authors count it; at least a batch's.
USAGE_WINDOW = 65_536
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
PRECISIONS = ("float32", "tf32", "bfloat16")
BACKBONE = "backbone."


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite; no weight has moved."""


@dataclass(frozen=True)
class TokenizerTraining:
    """How to train; the defaults are the authors', but for the warm-up, which is in steps here.

    Steps are counted from 1.

    Args:
        lr, betas, weight_decay, optimizer: of the tokenizer; "adam" or "adamw".
        warmup_steps: the rate rises linearly from 1e-7 to ``lr`` over so many (authors: 4 epochs).
        schedule: of the rate from there, "constant" or "cosine", down to ``min_lr`` at
            ``total_steps``.
        clip: largest norm of all gradients of a model; 0 leaves them alone.
        micro_batch: pictures at a time, whose gradients add up to the batch's; None is all. Norms
            of a discriminator see only those.
        precision: "float32", "tf32", or "bfloat16": autocast around all but the region encoder and
            the quantizer, and TF32 there.
        ema: decay of the averaged weights.
        pixel_loss: "l2" or "l1".
        mse_weight: of a second pixel loss, always MSE: with l2 the authors count it twice.
        perceptual_weight, semantic_weight: of LPIPS and of the semantic loss; 0 computes none.
        generator_loss: "softplus" ("non-saturating" is the same), "hinge" or "vanilla".
        discriminator_loss: "hinge", "vanilla" or "non-saturating".
        discriminator_weight: of both.
        adaptive_weight: scale the generator's loss to the pixels' gradient, as VQGAN does.
        discriminator_lr: constant, without warm-up; None is ``lr``.
        discriminator_start: step from which the generator has its loss.
        discriminator_update_start: step from which the discriminator learns, not after the other;
            None is the other.
        idle_discriminator: before it learns it runs all the same, and its Adam counts those steps,
            so that its first real one is shorter, as in the authors' runs. False leaves it out.
        revive_after: pictures without use after which a code starts anew, as one of the batch's
            queries; None never does that, as the authors.
        seed: of dropout and of the discriminator's random crops. They depend on it, on the step's
            number and on the process's rank alone.
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
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        choices = {
            "optimizer": OPTIMIZERS, "schedule": ("constant", "cosine"), "precision": PRECISIONS,
            "pixel_loss": losses.PIXEL, "generator_loss": losses.GENERATOR,
            "discriminator_loss": losses.DISCRIMINATOR,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"TokenizerTraining: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        amounts = ("lr", "weight_decay", "warmup_steps", "min_lr", "clip", "mse_weight")
        weights = ("perceptual_weight", "semantic_weight", "discriminator_weight")
        check_numbers(self, dict.fromkeys((*amounts, *weights), (0, math.inf)) | {"ema": (0, 1)})
        check_numbers(self, {"discriminator_start": (0, math.inf)})
        given = ("micro_batch", "total_steps", "revive_after")
        check_positive(self, [name for name in given if getattr(self, name) is not None])
        if self.discriminator_lr is not None:
            check_numbers(self, {"discriminator_lr": (0, math.inf)})
        if self.schedule == "cosine" and (self.total_steps or 0) <= self.warmup_steps:
            raise ValueError(
                "TokenizerTraining: a cosine needs total_steps beyond warmup_steps, got "
                f"{self.total_steps} and {self.warmup_steps}"
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

    def rate(self, step: int) -> float:
        """The tokenizer's learning rate at a step."""
        if step < self.warmup_steps:
            return FIRST_LR + step * (self.lr - FIRST_LR) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * done))


def rae(steps_per_epoch: int) -> dict[str, Any]:
    """Fields of `TokenizerTraining` for the discriminator's schedule of RAE, arXiv 2510.11690.

    It learns from epoch 6 on and counts from epoch 8 on, its weight adapts, rates fall by a cosine.
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


class TokenizerTrainer:
    """Trains a tokenizer, whose backbone stays as it is.

    >>> trainer = training.TokenizerTrainer(tok, settings, lpips=lpips, discriminator=disc)
    >>> terms = trainer.step(images)

    Args:
        model: on the device to train on, in float32 (`set_precision("mixed")` too).
        settings: how.
        lpips: pictures and reconstructions to distances [B]; needed unless its weight is 0.
        discriminator: pictures to logits; None trains without.

    Attributes:
        model: what is trained.
        ema: a tokenizer with the averaged weights, in eval mode; its backbone is the model's own.
        steps, images: how many of each it was trained on.

    Raises:
        TypeError: weights that were rounded to half precision.
        ValueError: no LPIPS though it has a weight.
    """

    def __init__(
        self,
        model: VFMTok,
        settings: TokenizerTraining | None = None,
        *,
        lpips: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ):
        self.settings = settings = settings or TokenizerTraining()
        precision = precision_of(model)
        if precision not in ("float32", "tf32", "float64", "mixed"):
            raise TypeError(
                f"TokenizerTrainer: weights must be float32 to learn, got {precision}; load the "
                "model again, precision='bfloat16' of the settings computes in half precision"
            )
        if lpips is None and settings.perceptual_weight > 0:
            raise ValueError(
                "TokenizerTrainer: a perceptual_weight needs lpips, as LPIPS.from_files gives it; "
                "perceptual_weight=0 trains without"
            )
        self.model = model
        processes.share_first(_learned(model).values())
        model.tf32 = precision == "mixed" or settings.precision != "float32"
        self.ema = copy.deepcopy(model, {id(model.backbone): model.backbone})
        self.ema.eval().requires_grad_(False)
        self.lpips, self.discriminator = lpips, discriminator
        for module in (lpips, discriminator):
            weights = () if module is None else module.parameters()
            if any((w.device, w.dtype) != (model.device, model.dtype) for w in weights):
                module.to(model.device, model.dtype)
        self.steps = self.images = 0
        # Of each code, how many pictures had been seen when it was last used, and last set anew.
        self.last_used, self.revived_at = torch.zeros(
            2, model.config.codebook_size, dtype=torch.int64, device=model.device
        )

        self._learning = [p for p in model.parameters() if p.requires_grad]
        self._averaged = [
            (own, p)
            for own, p in zip(self.ema.parameters(), model.parameters(), strict=True)
            if p.requires_grad
        ]
        kind, betas = OPTIMIZERS[settings.optimizer], settings.betas
        self.optimizer = kind(
            self._learning, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay
        )
        self.discriminator_optimizer = None
        if discriminator is not None:
            processes.share_first(_thawed(discriminator).values())
            self._judging = [p for p in discriminator.parameters() if p.requires_grad]
            rate = settings.lr if settings.discriminator_lr is None else settings.discriminator_lr
            self.discriminator_optimizer = kind(self._judging, lr=rate, betas=betas, weight_decay=0)

    def step(self, images: Tensor) -> dict[str, float]:
        """Learn from a batch; among several processes each gives its share, as large as others'.

        Args:
            images: [B, 3, S, S] in [-1, 1], on the model's device.

        Returns:
            ``rec`` (pixel loss), ``mse``, ``perceptual``, ``semantic``, ``codebook``, ``commit``,
            ``entropy``, ``total`` (all of them and the adversarial part, weighted), ``grad_norm``
            (before clipping), ``lr`` and ``usage`` (share of the codes that were used lately). With
            a discriminator, unless it is left out so early, ``generator`` and ``discriminator``
            (losses before the weight), ``logits_real``, ``logits_fake`` and ``disc_grad_norm``.

        Raises:
            NotFinite: a term or a gradient is NaN or infinite; nothing has moved then.
            TypeError, ValueError: images as `VFMTok.encode` refuses them, or none.
        """
        settings, number = self.settings, self.steps + 1
        config, device = self.model.config, self.model.device
        check_images("TokenizerTrainer", images, config.image_size, device)
        if len(images) == 0:
            raise ValueError("TokenizerTrainer: images must hold at least one picture, got none")
        # They may have been looked at in between.
        self.model.train()
        if self.discriminator is not None:
            self.discriminator.train()
        pieces = images.to(self.model.dtype).split(settings.micro_batch or len(images))
        sums: dict[str, Tensor] = {}
        found: list[tuple[Tensor, Tensor]] = []  # codes and queries of each piece
        with _seeded(settings.seed, number, device), computing(self.model):
            self.optimizer.zero_grad()
            outputs = [
                self._learn(piece, number, len(piece) / len(images), sums, found)
                for piece in pieces
            ]
            processes.average(p.grad for p in self._learning if p.grad is not None)
            sums["grad_norm"] = _clip(self._learning, settings.clip)
            judged = self.discriminator is not None and (
                settings.idle_discriminator or number >= settings.update_start
            )
            if judged:
                self.discriminator_optimizer.zero_grad()
                for piece, fake in zip(pieces, outputs, strict=True):
                    self._judge(piece, fake, number, len(piece) / len(images), sums)
                processes.average(p.grad for p in self._judging)
                sums["disc_grad_norm"] = _clip(self._judging, settings.clip)
            terms = _finite(sums, number)
            self._update(number, judged)
            together = len(images) * processes.world_size()
            self.images += together
            codes, queries = (torch.cat(parts) for parts in zip(*found, strict=True))
            self.last_used[codes] = self.images
            processes.largest(self.last_used)
            if settings.revive_after is not None:
                terms["revived"] = float(self._revive(queries))
        window = max(together, USAGE_WINDOW // config.num_regions)
        recent = self.last_used > max(0, self.images - window)
        return terms | {"lr": settings.rate(number), "usage": float(recent.float().mean())}

    def _learn(
        self, images: Tensor, number: int, share: float, sums: dict[str, Tensor], found: list
    ) -> Tensor:
        """Gradients of the tokenizer's loss; returns the reconstructions for the discriminator."""
        settings, terms = self.settings, {}
        with self._autocast():
            out, queries = self._reconstruct(images)
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
        (share * total).backward()
        _add(sums, terms, share)
        found.append((out.codes.flatten(), queries.detach().flatten(0, 1)))
        return fake.detach()

    def _adversarial(self, fake: Tensor, number: int, terms: dict[str, Tensor]) -> Tensor | float:
        """The generator's part of the loss, weighted; 0 before its start."""
        settings = self.settings
        counts = number >= settings.discriminator_start and settings.discriminator_weight > 0
        if self.discriminator is None or not (counts or settings.idle_discriminator):
            return 0.0
        # The discriminator's own gradients are not wanted here, before its start none at all.
        with torch.set_grad_enabled(counts), _frozen(self._judging):
            loss = losses.GENERATOR[settings.generator_loss](self.discriminator(fake))
        terms["generator"] = loss
        if not counts:
            return 0.0
        weight: Tensor | float = settings.discriminator_weight
        if settings.adaptive_weight:
            rest = terms["rec"] + settings.perceptual_weight * terms.get("perceptual", 0.0)
            last = self.model.pixel_decoder.conv_out.weight
            weight = weight * losses.adaptive_weight(rest, loss, last)
        return weight * loss

    def _judge(
        self, images: Tensor, fake: Tensor, number: int, share: float, sums: dict[str, Tensor]
    ) -> None:
        """Gradients of the discriminator's loss; zeros before it learns."""
        settings = self.settings
        learns = number >= settings.update_start and settings.discriminator_weight > 0
        with self._autocast(), torch.set_grad_enabled(learns):
            of_fake, of_real = self.discriminator(fake), self.discriminator(images)
            loss = losses.DISCRIMINATOR[settings.discriminator_loss](of_real, of_fake)
        if learns:
            (share * settings.discriminator_weight * loss).backward()
        else:
            for weight in self._judging:
                weight.grad = torch.zeros_like(weight)
        logits = {"logits_real": of_real.mean(), "logits_fake": of_fake.mean()}
        _add(sums, {"discriminator": loss, **logits}, share)

    def _reconstruct(self, images: Tensor) -> tuple[VFMTokOutput, Tensor]:
        """As `VFMTok.forward`, and the queries; encoder and search are out of autocast's reach.

        The authors keep float32 in the encoder's attention, and search codes in half precision.
        """
        model = self.model
        maps = model.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            regions = model.region_encoder([level.to(model.dtype) for level in maps])
            queries = model.quantizer.queries(regions)
            quantized = model.quantizer(queries)
        regions = model.token_decoder.regions(quantized.vectors)
        semantic = self.settings.semantic_weight > 0
        out = VFMTokOutput(
            reconstruction=model.pixel_decoder(model.token_decoder.pixel_map(regions)),
            semantic=model.token_decoder.features(regions) if semantic else None,
            features=maps[-1],
            codes=quantized.codes,
            codebook_loss=quantized.codebook_loss,
            commit_loss=quantized.commit_loss,
            entropy_loss=quantized.entropy_loss,
        )
        return out, queries

    def _autocast(self) -> torch.autocast:
        half = self.settings.precision == "bfloat16"
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=half)

    def _update(self, number: int, judged: bool) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(number)
        self.optimizer.step()
        own, new = zip(*self._averaged, strict=True)
        with torch.no_grad():
            torch._foreach_mul_(own, self.settings.ema)
            torch._foreach_add_(own, new, alpha=1 - self.settings.ema)
        if judged:
            self.discriminator_optimizer.step()
        self.steps = number

    @torch.no_grad()
    def _revive(self, queries: Tensor) -> int:
        """Give codes that were not used for long the directions of queries; returns how many.

        All processes know the same of the use, and take the first one's queries. What Adam
        remembers of the old rows goes.
        """
        known = torch.maximum(self.last_used, self.revived_at)
        unused = (known <= self.images - self.settings.revive_after).nonzero()[:, 0]
        chosen = torch.randperm(len(queries), device=queries.device)[: len(unused)]
        unused, rows = unused[: len(chosen)], queries[chosen].contiguous()
        if len(unused) == 0:
            return 0
        processes.share_first([rows])
        codebook = self.model.quantizer.codebook
        codebook[unused] = rows.to(codebook.dtype)
        self.ema.quantizer.codebook[unused] = codebook[unused]
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[codebook][name][unused] = 0
        self.revived_at[unused] = self.images
        return len(unused)

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on, but for the frozen parts, which come with the models."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "config": dataclasses.asdict(self.model.config),
            "steps": self.steps,
            "images": self.images,
            "last_used": self.last_used.clone(),
            "revived_at": self.revived_at.clone(),
            "model": _learned(self.model),
            "ema": _learned(self.ema),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.discriminator is not None:
            state["discriminator"] = _thawed(self.discriminator)
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, changed: bool = False) -> None:
        """Go on where a state was taken.

        Args:
            state: from `state_dict`.
            changed: settings may be others than those of the state, and count.

        Raises:
            ValueError: another model, with or without a discriminator unlike the state, or changed
                settings; the line names all that differ.
        """
        own = self.state_dict()
        if problems := _differences(state["config"], own["config"]):
            raise ValueError(f"resuming: the model is another one: {problems}")
        if ("discriminator" in state) != (self.discriminator is not None):
            had = "had a" if "discriminator" in state else "had no"
            raise ValueError(f"resuming: the run {had} discriminator")
        problems = _differences(state["settings"], own["settings"])
        if problems and not changed:
            raise ValueError(f"resuming: settings have changed: {problems}")
        _load_learned(self.model, state["model"])
        _load_learned(self.ema, state["ema"])
        _load_optimizer(self.optimizer, state["optimizer"])
        if self.discriminator is not None:
            found = {**self.discriminator.state_dict(), **state["discriminator"]}
            self.discriminator.load_state_dict(found)
            _load_optimizer(self.discriminator_optimizer, state["discriminator_optimizer"])
        self.steps, self.images = state["steps"], state["images"]
        self.last_used.copy_(state["last_used"])
        self.revived_at.copy_(state["revived_at"])


@contextlib.contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a step's own, on each process others; afterwards all is as it was."""
    text = f"vfmtok_fast training {seed} {number} {processes.rank()}"
    digest = hashlib.sha256(text.encode()).digest()
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        yield


@contextlib.contextmanager
def _frozen(weights: list[nn.Parameter]) -> Iterator[None]:
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _add(sums: dict[str, Tensor], terms: dict[str, Tensor], share: float) -> None:
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + share * value.detach()


def _clip(weights: list[nn.Parameter], most: float) -> Tensor:
    """Scale gradients by most / (norm + 1e-6) where that is below 1; returns their norm."""
    return nn.utils.clip_grad_norm_(weights, most or math.inf)


def _finite(sums: dict[str, Tensor], number: int) -> dict[str, float]:
    values = torch.stack([value.double() for value in sums.values()])
    processes.average([values])  # a NaN of one process stops all
    terms = dict(zip(sums, values.tolist(), strict=True))
    if wrong := [f"{name} ({value})" for name, value in terms.items() if not math.isfinite(value)]:
        raise NotFinite(f"step {number}: not finite: {', '.join(wrong)}")
    return terms


def _learned(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith(BACKBONE)}


def _load_learned(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    frozen = {k: v for k, v in model.state_dict().items() if k.startswith(BACKBONE)}
    model.load_state_dict(frozen | dict(tensors))


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Moments and step counts of a state; rates and the like stay as the settings have them."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def _thawed(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {k: v for k, v in module.state_dict().items() if k not in frozen}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Each field that differs, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
