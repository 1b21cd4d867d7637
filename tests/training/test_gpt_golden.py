"""Steps of the generator's trainer against the authors' own, from the same weights (golden README).

Weights are compared by how far they moved. Limits are the golden README's: those for float32 come
from float32 against float64, those for float64 from a second implementation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig
from vfmtok_fast.checkpoint import official_gpt
from vfmtok_fast.training import GPTTrainer, GPTTraining

CASES = [(variant, wide) for variant in ("plain", "dropped_class") for wide in (False, True)]


def thin(x: Tensor) -> Tensor:
    return x.detach().flatten()[:: max(1, x.numel() // 64)][:64].double().cpu().clone()


def named(model: GPT) -> dict[str, Tensor]:
    return official_gpt(model)


def gradients(model: GPT) -> dict[str, Tensor]:
    """Return gradients under the authors' names, through a copy that has them as weights."""
    copy = GPT(model.config).to(model.device, model.dtype)
    copy.load_state_dict({name: weight.grad for name, weight in model.named_parameters()})
    return named(copy)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def start(official_weights) -> dict[str, Tensor]:
    return official_weights("train_gpt_small")


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "enabled"])
@pytest.mark.parametrize(("variant", "wide"), CASES)
def test_three_steps(golden, start, variant, wide, fast, monkeypatch):
    case = golden("train_gpt_small")
    # A row that draws a number below the dropout loses its class; nothing else is drawn.
    monkeypatch.setattr(torch, "rand", lambda *_, device: 1 - case["drop_mask"].float().to(device))
    dropout = 0.5 if variant == "dropped_class" else 0.0
    config = GPTConfig(
        num_layers=3, num_heads=4, dim=128, block_size=64, vocab_size=512, num_classes=10,
        class_dropout=dropout, token_dropout=0, residual_dropout=0, ffn_dropout=0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT.from_official(start, config).to(device)
    model = model.double() if wide else model
    before = {name: thin(weight) for name, weight in named(model).items()}
    trainer = GPTTrainer(model, GPTTraining(ema=0.9))
    codes, classes = case["tokens"].long().to(device), case["class"].long().to(device)
    names, limits = f"{variant}/float64/" if wide else f"{variant}/", (1e-7, 7e-7, 6e-4)
    limits = (5e-9, 6e-8, 2e-6) if wide else limits
    if device == "cuda" and not wide:
        limits = (1e-6, *limits[1:])  # cuBLAS adds up in another order than the authors' CPU.
    with vfmtok_fast.enable(None if fast else []):
        for number in range(3):
            terms = trainer.step(codes, classes)
            loss, norm = (float(case[f"{names}{x}"][number]) for x in ("loss", "grad_total"))
            assert terms["loss"] == pytest.approx(loss, rel=limits[0])
            assert terms["grad_norm"] == pytest.approx(norm, rel=limits[1])
            for key, gradient in gradients(model).items() if number == 0 else ():
                gradient /= min(1.0, 1 / (terms["grad_norm"] + 1e-6))
                expected = float(case[f"{names}gradnorm/{key}"])
                assert float(gradient.norm()) == pytest.approx(expected, rel=limits[1]), key
    way = "cpu" if device == "cpu" else "triton"
    calls = vfmtok_fast.status().ops["linear_cross_entropy"].calls
    assert calls == {way if fast and not (wide and way == "triton") else "reference": 3}
    for key, weight in named(model).items():
        moved = case[f"{names}weight/{key}"].double() - before[key]
        assert off(thin(weight) - before[key], moved) <= limits[2], key
    averaged = named(trainer.ema)
    kept = [name for name in case if name.startswith(f"{variant}/ema_0.9/")]
    assert len(kept) > 5
    for name in kept:
        ours = thin(averaged[name.removeprefix(f"{variant}/ema_0.9/")])
        torch.testing.assert_close(ours, case[name].double(), rtol=1e-6, atol=1e-8)
