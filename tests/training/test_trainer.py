"""A training step on a small model: schedules, precision, seeds, and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmtok_fast import VFMTok, VFMTokConfig
from vfmtok_fast.training import NotFinite, TokenizerTrainer, TokenizerTraining
from vfmtok_fast.training import tokenizer as tokenizer_trainer


def state(trainer: TokenizerTrainer) -> dict[str, Tensor]:
    parts = {"model": trainer.model, "ema": trainer.ema}
    if trainer.discriminator is not None:
        parts["judge"] = trainer.discriminator
    return {f"{p}.{k}": v.clone() for p, m in parts.items() for k, v in m.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_rates():
    constant = TokenizerTraining(lr=1e-4, warmup_steps=100)
    assert constant.rate(1) == pytest.approx(1e-7 + (1e-4 - 1e-7) / 100)
    assert constant.rate(50) == pytest.approx(1e-7 + 0.5 * (1e-4 - 1e-7))
    assert constant.rate(100) == constant.rate(10**6) == 1e-4
    cosine = TokenizerTraining(
        lr=1e-4, warmup_steps=100, schedule="cosine", total_steps=300, min_lr=2e-5
    )
    assert cosine.rate(99) == constant.rate(99)
    assert cosine.rate(200) == pytest.approx(6e-5)
    assert cosine.rate(150) == pytest.approx(2e-5 + 4e-5 * (1 + math.cos(math.pi / 4)))
    assert cosine.rate(300) == cosine.rate(400) == pytest.approx(2e-5)


def test_rates_of_the_discriminator(make, images: Tensor):
    """No warm-up; a cosine begins where the discriminator does."""
    start = {"lr": 1e-3, "warmup_steps": 2, "discriminator_start": 3, "idle_discriminator": False}
    assert TokenizerTraining(**start).discriminator_rate(1) == 1e-3
    cosine = {**start, "schedule": "cosine", "total_steps": 7, "min_lr": 1e-5}
    trainer = make(**cosine, discriminator_lr=4e-4, discriminator_weight=0.1)
    rates = []
    for _ in range(7):
        trainer.step(images)
        rates.append(trainer.judge.optimizer.param_groups[0]["lr"])
    half = [1e-5 + 3.9e-4 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert rates[2:] == pytest.approx(half)
    assert TokenizerTraining(**cosine).discriminator_rate(3) == 1e-3
    with pytest.raises(ValueError, match="discriminator_lr must be at least min_lr"):
        TokenizerTraining(**cosine, discriminator_lr=1e-6)


def test_a_step_moves_what_learns_and_nothing_else(make, images: Tensor):
    trainer = make(lr=1e-3)
    before = state(trainer)
    terms = trainer.step(images)
    after = state(trainer)
    assert set(terms) == {
        *("rec", "mse", "perceptual", "semantic", "codebook", "commit", "entropy", "generator"),
        *("discriminator", "logits_real", "logits_fake", "total", "grad_norm", "disc_grad_norm"),
        *("lr", "usage"),
    }
    weights = {"perceptual": 1, "semantic": 1, "codebook": 1, "commit": 1, "entropy": 1}
    weights |= {"rec": 1, "mse": 1, "generator": 0.5}
    assert terms["total"] == pytest.approx(sum(w * terms[k] for k, w in weights.items()))
    for key, value in after.items():
        moved = not torch.equal(value, before[key])
        assert moved == (".backbone." not in key and not key.endswith("registers")), key
    assert trainer.steps == 1 and trainer.images == 4
    # The EMA shares the model's backbone and has moved a ten-thousandth of the way.
    assert trainer.ema.backbone is trainer.model.backbone and not trainer.ema.training
    codebook = "quantizer.codebook"
    expected = before[f"ema.{codebook}"] * 0.9999 + after[f"model.{codebook}"] * (1 - 0.9999)
    torch.testing.assert_close(after[f"ema.{codebook}"], expected, atol=1e-9, rtol=1e-7)


def test_the_rate_of_a_step_is_the_schedules(make, images: Tensor):
    trainer = make(lr=1e-3, warmup_steps=2)
    for number in (1, 2, 3):
        before = trainer.model.quantizer.proj.weight.detach().clone()
        terms = trainer.step(images)
        moved = float((trainer.model.quantizer.proj.weight - before).detach().abs().max())
        assert terms["lr"] == trainer.settings.rate(number)
        # Adam's steps are about as large as the learning rate.
        assert 0.5 * terms["lr"] < moved < 2 * terms["lr"]
    # The discriminator has no warm-up.
    assert trainer.judge.optimizer.param_groups[0]["lr"] == 1e-3


def test_steps_are_the_same_bits_whatever_the_process_drew(make, images: Tensor):
    def run(draws: int) -> tuple[dict[str, Tensor], list]:
        torch.manual_seed(draws)
        torch.rand(draws)
        trainer = make(dropout=0.3)
        terms = []
        for _ in range(2):
            before = torch.get_rng_state()
            trainer.model.train(draws == 1)  # as a caller who used the model may leave it
            terms.append(trainer.step(images))
            assert torch.equal(torch.get_rng_state(), before)
        return state(trainer), terms

    (one, terms), (other, again) = run(1), run(7)
    assert terms == again and same(one, other)
    # Dropout is drawn anew at each step, from the seed.
    assert make(dropout=0.3, seed=1).step(images) != terms[0]


def test_micro_batches_add_up_to_the_batch(make, images: Tensor):
    whole, parts = make(judge=False), make(judge=False, micro_batch=3)
    one, other = whole.step(images), parts.step(images)
    assert other == pytest.approx(one, rel=1e-4)
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    for a, b in pairs:
        if a.grad is not None:
            # Some gradients are zero except for rounding.
            reach = max(1e-7, 1e-4 * float(a.grad.abs().max()))
            torch.testing.assert_close(a.grad, b.grad, atol=reach, rtol=0)


def test_gradients_are_clipped_and_their_norm_is_told(make, images: Tensor):
    trainer = make(clip=0.01)
    terms = trainer.step(images)
    assert terms["grad_norm"] > 0.01 and terms["disc_grad_norm"] > 0.01
    for weights in (trainer.model.parameters(), trainer.discriminator.parameters()):
        norms = torch.stack([p.grad.norm() for p in weights if p.grad is not None])
        assert float(norms.norm()) == pytest.approx(0.01, rel=1e-3)
    free = make(clip=0)
    assert free.step(images)["grad_norm"] == pytest.approx(terms["grad_norm"], rel=1e-5)


def judge_steps(trainer: TokenizerTrainer) -> int:
    states = trainer.judge.optimizer.state.values()
    return int(next(iter(states))["step"]) if states else 0


def test_before_its_start_the_discriminator_counts_steps_and_stays(make, images: Tensor):
    trainer = make(discriminator_start=3)
    alone = make(judge=False)
    before = state(trainer)
    for number in (1, 2):
        terms = trainer.step(images)
        assert {"generator", "discriminator", "logits_real"} <= set(terms)
        assert terms["disc_grad_norm"] == 0 and judge_steps(trainer) == number
        assert terms["total"] == alone.step(images)["total"]
    now = state(trainer)
    assert same({k: v for k, v in before.items() if k.startswith("judge")}, now)
    assert same({k: v for k, v in state(alone).items() if k.startswith("model")}, now)
    terms = trainer.step(images)
    assert terms["disc_grad_norm"] > 0
    moved = trainer.discriminator.layers[0].weight - before["judge.layers.0.weight"]
    # Adam's third step, after two of zero gradient; a first one would equal the learning rate.
    mean, square = (1 - 0.9) / (1 - 0.9**3), (1 - 0.95) / (1 - 0.95**3)
    expected = trainer.settings.lr * mean / math.sqrt(square)
    assert float(moved.detach().abs().max()) == pytest.approx(expected, rel=1e-3)


def test_float16_has_an_idle_discriminator_too(make, images: Tensor):
    # One image, because on some CPUs convolutions have no fast gradient in float16.
    trainer, image = make(discriminator_start=2, precision="float16"), images[:1]
    assert trainer.step(image)["disc_grad_norm"] == 0 and judge_steps(trainer) == 1
    assert trainer.judge.scaler.get_scale() == 65536
    norms = [trainer.step(image)["disc_grad_norm"] for _ in range(4)]
    learned = [norm for norm in norms if math.isfinite(norm)]  # else the scale was too large
    assert learned and min(learned) > 0 and judge_steps(trainer) == 1 + len(learned)


def test_an_idle_discriminator_can_be_left_out(make, images: Tensor):
    trainer = make(discriminator_start=2, idle_discriminator=False)
    terms = trainer.step(images)
    assert not {"generator", "discriminator", "disc_grad_norm"} & set(terms)
    assert judge_steps(trainer) == 0
    before = trainer.discriminator.layers[0].weight.detach().clone()
    assert "generator" in trainer.step(images)
    moved = (trainer.discriminator.layers[0].weight - before).detach().abs().max()
    assert float(moved) == pytest.approx(trainer.settings.lr, rel=1e-3)


def test_a_discriminator_may_learn_before_its_loss_counts(make, images: Tensor):
    trainer = make(discriminator_start=3, discriminator_update_start=2, idle_discriminator=False)
    alone = make(judge=False)
    for number in (1, 2):
        terms = trainer.step(images)
        assert terms["total"] == alone.step(images)["total"]
        assert ("disc_grad_norm" in terms) == (number == 2)
    assert terms["disc_grad_norm"] > 0 and "generator" not in terms
    assert trainer.step(images)["total"] != alone.step(images)["total"]


def test_adaptive_weight(make, images: Tensor):
    """The ratio of the gradients of pixel losses and LPIPS to that of the generator's loss."""
    plain, adaptive = make(), make(adaptive_weight=True)
    last = adaptive.model.pixel_decoder.conv_out.weight
    fake = adaptive.model.train()(images).reconstruction
    pixels = F.mse_loss(fake, images) + F.mse_loss(fake, images) + (fake - images).abs().mean()
    judged = F.softplus(-copy.deepcopy(adaptive.discriminator).train()(fake)).mean()
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (pixels, judged)
    ]
    one, other = plain.step(images), adaptive.step(images)
    rest = one["total"] - 0.5 * one["generator"]
    weight = (other["total"] - rest) / (0.5 * other["generator"])
    # The total is a float32, of which the adversarial part is a share.
    assert weight == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-4)
    assert other["disc_grad_norm"] == pytest.approx(one["disc_grad_norm"], rel=1e-5)


def test_half_precision_leaves_the_encoder_and_the_search_alone(make, images: Tensor):
    trainer = make(precision="bfloat16")
    seen = {}

    def look(name: str) -> Callable:
        return lambda module, inputs, output: seen.update({name: output.dtype})

    model = trainer.model
    model.region_encoder.layers[0].down.register_forward_hook(look("encoder"))
    model.quantizer.proj.register_forward_hook(look("search"))
    model.token_decoder.layers[0].down.register_forward_hook(look("decoder"))
    model.pixel_decoder.conv_out.register_forward_hook(look("pixels"))
    half, exact = trainer.step(images), make().step(images)
    assert seen == {
        "encoder": torch.float32, "search": torch.float32,
        "decoder": torch.bfloat16, "pixels": torch.bfloat16,
    }  # fmt: skip
    assert half["rec"] == pytest.approx(exact["rec"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_losses_can_be_left_out(make, images: Tensor):
    trainer = make(
        judge=False, perceptual_weight=0, semantic_weight=0, mse_weight=0, pixel_loss="l1"
    )
    terms = trainer.step(images)
    assert not {"perceptual", "semantic"} & set(terms)
    parts = terms["rec"] + terms["codebook"] + terms["commit"] + terms["entropy"]
    assert terms["total"] == pytest.approx(parts)


def test_nan_stops_before_any_weight_has_moved(make, images: Tensor):
    trainer = make()
    trainer.step(images)
    before, optimizer = state(trainer), copy.deepcopy(trainer.learner.optimizer.state_dict())
    lpips = trainer.lpips
    trainer.lpips = lambda x, y: math.nan * lpips(x, y)
    with pytest.raises(NotFinite, match=r"step 2: not finite: perceptual \(nan\), total \(nan\)"):
        trainer.step(images)
    assert same(before, state(trainer)) and trainer.steps == 1
    for number, values in trainer.learner.optimizer.state_dict()["state"].items():
        assert same(values, optimizer["state"][number])
    trainer.lpips = lpips
    assert math.isfinite(trainer.step(images)["total"])


def test_a_refused_step_moves_no_spectral_norm(make, images: Tensor):
    """A refused step keeps their vectors, which each forward pass in training mode changes."""
    trainer = make()
    for layer in trainer.discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(layer)
    before = state(trainer)
    trainer.lpips = lambda x, y: x.new_full((len(x),), math.nan)
    with pytest.raises(NotFinite):
        trainer.step(images)
    assert any(key.endswith("._u") for key in before) and same(before, state(trainer))


def test_usage_counts_the_codes_of_late(make, images: Tensor):
    trainer = make(judge=False)
    codes = len(trainer.model.encode(images[:2]).unique())
    assert trainer.step(images[:2])["usage"] == codes / 256
    trainer.last_used[:] = 2
    trainer.images = 10_000
    # The window is 4096 images of 16 codes; older images do not count.
    assert trainer.step(images)["usage"] < 1


@pytest.mark.parametrize(("pictures", "steps"), [(7, 1), (8, 2), (3, 1)])
def test_usage_is_of_whole_steps(make, images: Tensor, pictures: int, steps: int, monkeypatch):
    """A step of four images that is partly outside the window does not count."""
    trainer = make(judge=False)
    monkeypatch.setattr(tokenizer_trainer, "USAGE_WINDOW", 16 * pictures)
    told = [trainer.step(some)["usage"] for some in (images, images.flip(0), images.flip(-1))][-1]
    assert told == float((trainer.last_used > 12 - 4 * steps).float().mean())


def test_codes_without_use_start_anew_at_queries(make, images: Tensor):
    trainer = make(judge=False, revive_after=6)
    first = trainer.step(images)
    assert first["revived"] == 0  # after only four images
    before = trainer.model.quantizer.codebook.detach().clone()
    used = trainer.last_used > 0
    terms = trainer.step(images)
    codebook = trainer.model.quantizer.codebook.detach()
    anew = (codebook - before).norm(dim=-1) > 0.01
    assert terms["revived"] == int(anew.sum()) > 0 and not (anew & used).any()
    torch.testing.assert_close(codebook[anew].norm(dim=-1), torch.ones(int(anew.sum())))
    assert torch.equal(trainer.ema.quantizer.codebook[anew], codebook[anew])
    state = trainer.learner.optimizer.state[trainer.model.quantizer.codebook]
    assert not state["exp_avg"][anew].any() and not state["exp_avg_sq"][anew].any()
    assert terms["usage"] == float((trainer.last_used > 0).float().mean())
    # Revived codes lie at queries, so some get used. The rest have time before they are revived
    # again, and other codes are revived meanwhile.
    trainer.step(images)
    assert trainer.last_used[anew].max() == 12 and (trainer.revived_at[anew] == 8).all()


def test_codes_start_anew_where_float16_has_left_all_steps_out(make, images: Tensor):
    trainer = make(judge=False, revive_after=2, precision="float16")
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    terms = [trainer.step(images[:1]) for _ in range(2)]
    assert not math.isfinite(terms[1]["grad_norm"]) and terms[1]["revived"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_loss": "l3"}, "pixel_loss must be one of l2, l1, got 'l3'"),
        ({"lr": -1}, r"lr must be a number in \[0, inf\), got -1"),
        ({"ema": 1.0}, "ema must be a number in"),
        ({"schedule": "cosine"}, "needs total_steps above warmup_steps, got None and 0"),
        ({"micro_batch": 0}, "micro_batch must be an integer of at least 1, got 0"),
        (
            {"discriminator_start": 5, "discriminator_update_start": 6},
            "must not be after discriminator_start, got 6 and 5",
        ),
    ],
)
def test_settings_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TokenizerTraining(**settings)


def test_models_and_pictures_are_checked(make, tiny: VFMTokConfig, images: Tensor):
    with pytest.raises(TypeError, match="weights must be float32 to learn, got bfloat16"):
        TokenizerTrainer(VFMTok(tiny).bfloat16(), lpips=torch.nn.Identity())
    with pytest.raises(ValueError, match="a perceptual_weight needs lpips"):
        TokenizerTrainer(VFMTok(tiny))
    trainer = make(judge=False)
    with pytest.raises(ValueError, match="at least one picture, got none"):
        trainer.step(images[:0])
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got a magnitude of 255"):
        trainer.step(images.sign() * 255)
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, 64, 64\]"):
        trainer.step(images[:, :, :60])


def test_a_frozen_codebook_is_not_revived(tiny: VFMTokConfig):
    model = VFMTok(tiny)
    model.quantizer.codebook.requires_grad_(False)
    with pytest.raises(ValueError, match="revive_after resets rows of the codebook, which is froz"):
        TokenizerTrainer(model, TokenizerTraining(perceptual_weight=0, revive_after=4))


@pytest.mark.parametrize("frozen_then", [True, False])
def test_a_state_of_other_learned_weights_is_refused_before_anything_is_loaded(
    tiny: VFMTokConfig, images: Tensor, frozen_then: bool
):
    def begin(frozen: bool) -> TokenizerTrainer:
        model = VFMTok(tiny)
        model.region_encoder.requires_grad_(not frozen)
        return TokenizerTrainer(model, TokenizerTraining(perceptual_weight=0))

    first, second = begin(frozen_then), begin(not frozen_then)
    first.step(images)
    before = state(second)
    with pytest.raises(ValueError, match=r"only, such as region_encoder\.") as error:
        second.load_state_dict(first.state_dict())
    assert f"({'now' if frozen_then else 'then'})" in str(error.value)
    assert same(before, state(second)) and second.steps == 0


def test_deterministic_mode_computes_the_same(make, images: Tensor):
    expected = make(judge=False)
    terms = expected.step(images)
    torch.use_deterministic_algorithms(True)
    try:
        trainer = make(judge=False)
        assert trainer.step(images) == pytest.approx(terms, rel=1e-4)
        gradient = trainer.model.token_decoder.position.grad
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(
        gradient, expected.model.token_decoder.position.grad, rtol=1e-4, atol=1e-6
    )
