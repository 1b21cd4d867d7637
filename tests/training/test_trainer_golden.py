"""Steps of the trainer against the authors' own, from the same weights (golden README).

The variant `switch` has a discriminator from its second step on. So its first step is that of a run
without one, and by then the discriminator's Adam has counted one step. Weights are compared by how
far they moved, because three steps hardly change a weight. Limits are the golden README's, which
come from float32 against float64. Limits for gradients are three times as large, because the fast
implementations round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import vfmtok_fast
from vfmtok_fast.checkpoint import TOKENIZER_NAMES, official_name
from vfmtok_fast.training import LPIPS, DinoDiscriminator, TokenizerTrainer, TokenizerTraining

# Our name of each term, and the authors', which has a value per variant and step.
TERMS = {
    **{name: f"loss/{name}" for name in ("rec", "mse", "perceptual", "semantic", "codebook")},
    "commit": "loss/commit",
    "entropy": "loss/entropy",
    "total": "loss/total",
    "generator": "loss/generator_adversarial",
    "discriminator": "loss/discriminator_unweighted",
    "grad_norm": "grad_total",
    "disc_grad_norm": "disc_grad_total",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
}
# Relative limits; that of losses is 1.4e-5.
LIMITS = {"disc_grad_norm": 1.1e-3, "grad_norm": 8e-5, "logits_real": 1e-4, "logits_fake": 1e-4}
FAST = "cpu"  # The trainer is there on every machine.


class Remembering(nn.Module):
    """LPIPS that reads the golden images once, since every step has them: a third of its time."""

    def __init__(self, lpips: LPIPS):
        super().__init__()
        self.lpips, self.features, self.read = lpips, None, lpips._read
        lpips._read = self._read

    def _read(self, x: Tensor) -> list[Tensor]:
        if x.requires_grad:
            return self.read(x)
        if self.features is None:
            self.features = self.read(x)
        return self.features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lpips(x, y)


@pytest.fixture(scope="module")
def lpips(lpips_weights) -> Remembering:
    return Remembering(LPIPS.from_files(lpips_weights, lpips_weights))


@dataclass
class Run:
    """A trainer, its weights before the first step, and the terms of each step.

    Weights have the authors' names; those of the discriminator are prefixed with "disc/".
    """

    trainer: TokenizerTrainer
    before: dict[str, Tensor]
    terms: list[dict[str, float]]


def weights(trainer: TokenizerTrainer) -> dict[str, Tensor]:
    model, heads = trainer.model.named_parameters(), trainer.discriminator.heads
    found = {official_name(k, TOKENIZER_NAMES): p for k, p in model if p.requires_grad}
    judge = [*heads.named_parameters(), *heads.named_buffers()]
    return found | {f"disc/heads.{name}": value for name, value in judge}


@pytest.fixture(scope="module")
def train(golden_tokenizer, golden_images, dino_weights, lpips) -> Callable[..., Run]:
    def run(start: int, steps: int) -> Run:
        trainer = TokenizerTrainer(
            golden_tokenizer(), TokenizerTraining(discriminator_start=start), lpips=lpips,
            discriminator=DinoDiscriminator.from_files(*dino_weights, crop=0),
        )  # fmt: skip
        before = {key: value.detach().clone() for key, value in weights(trainer).items()}
        return Run(trainer, before, [trainer.step(golden_images) for _ in range(steps)])

    return run


def thin(x: Tensor) -> Tensor:
    return x.detach().flatten()[:: max(1, x.numel() // 64)][:64]


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.double().norm())


def check_terms(run: Run, case: dict[str, Tensor], variant: str) -> None:
    for number, terms in enumerate(run.terms):
        for ours, theirs in TERMS.items():
            expected = float(case[f"{variant}/{theirs}"][number])
            limit = LIMITS.get(ours, 1.4e-5)
            assert terms[ours] == pytest.approx(expected, rel=limit, abs=1e-9), (number, ours)


@pytest.mark.slow
def test_three_steps_with_a_discriminator_from_the_second_on(golden, train):
    case, run = golden("train_tokenizer_small"), train(start=2, steps=3)
    check_terms(run, case, "switch")
    moved = {key: value.detach() - run.before[key] for key, value in weights(run.trainer).items()}
    for prefix, names in (("", "switch/weight/"), ("disc/", "switch/disc_weight/")):
        spread = names.replace("weight", "spread")
        errors = {}
        for key in (name.removeprefix(names) for name in case if name.startswith(names)):
            theirs = case[f"{names}{key}"] - thin(run.before[prefix + key])
            errors[key] = off(thin(moved[prefix + key]), theirs)
            # Buffers of spectral norms, which are not weights, have no spread.
            allowed = 5 * float(case.get(f"{spread}{key}", 0))
            assert errors[key] <= max(0.15, allowed), key
        assert len(errors) == (70 if prefix else 248)
        assert float(torch.tensor([*errors.values()]).median()) <= 5e-3
    averaged = {official_name(k, TOKENIZER_NAMES): p for k, p in run.trainer.ema.named_parameters()}
    kept = [name for name in case if name.startswith("switch/ema/")]
    assert len(kept) == 10
    for name in kept:
        ours = thin(averaged[name.removeprefix("switch/ema/")])
        torch.testing.assert_close(ours, case[name], rtol=1.2e-7, atol=0)


@pytest.mark.slow
def test_gradients_of_the_first_step_with_everything_enabled(golden, train):
    case = golden("train_tokenizer_small")
    with vfmtok_fast.enable():
        run = train(start=1, steps=1)
    assert vfmtok_fast.status().ops["deformable_sample"].calls.keys() == {FAST}
    check_terms(run, case, "adversarial")
    found, terms = weights(run.trainer), run.terms[0]
    for names, norm in (("gradnorm/", terms["grad_norm"]), ("disc_gradnorm/", None)):
        names, norm = f"adversarial/{names}", norm or terms["disc_grad_norm"]
        clipped = min(1.0, 1 / (norm + 1e-6))
        prefix = "disc/" if "disc" in names else ""
        keys = [name.removeprefix(names) for name in case if name.startswith(names)]
        assert len(keys) == (40 if prefix else 248)
        for key in keys:
            gradient = found[prefix + key].grad / clipped
            assert float(gradient.norm()) == pytest.approx(float(case[names + key]), rel=1e-3), key
            if not prefix:
                assert off(thin(gradient), case[f"adversarial/gradhead/{key}"]) < 3e-3, key
