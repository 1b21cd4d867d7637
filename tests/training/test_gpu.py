"""On a GPU: the authors' numbers with the kernels, half precision, and bitwise repeatability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig
from vfmtok_fast.training import (
    LPIPS,
    DinoDiscriminator,
    GPTTrainer,
    GPTTraining,
    TokenizerTrainer,
    TokenizerTraining,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_first_step_of_the_authors(
    golden, golden_tokenizer, golden_images, dino_weights, lpips_weights, precision, limit
):
    case = golden("train_tokenizer_small")
    settings = TokenizerTraining(discriminator_start=1, precision=precision)
    with vfmtok_fast.enable():
        trainer = TokenizerTrainer(
            golden_tokenizer().cuda(), settings,
            lpips=LPIPS.from_files(lpips_weights, lpips_weights),
            discriminator=DinoDiscriminator.from_files(*dino_weights, crop=0),
        )  # fmt: skip
        terms = trainer.step(golden_images.cuda())
    assert set(vfmtok_fast.status().ops["deformable_sample"].calls) == {"triton"}
    for name in ("rec", "perceptual", "semantic", "codebook", "commit", "total"):
        expected = float(case[f"adversarial/loss/{name}"][0])
        assert terms[name] == pytest.approx(expected, rel=limit), name
    expected = float(case["adversarial/grad_total"][0])
    assert terms["grad_norm"] == pytest.approx(expected, rel=10 * limit)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_bits_twice(make: Callable[..., TokenizerTrainer], images: Tensor, precision: str):
    def run() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        trainer = make(dropout=0.2, precision=precision, device="cuda")
        terms = [trainer.step(images.cuda()) for _ in range(3)]
        return terms, trainer.model.state_dict()

    torch.use_deterministic_algorithms(True)
    try:
        with vfmtok_fast.enable():
            (terms, weights), (again, others) = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert terms == again
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_half_precision_learns_as_with_float32_logits():
    """One bfloat16 op for head and loss: a small generator's loss stays close over 300 steps."""
    config = GPTConfig(
        num_layers=3, num_heads=4, dim=128, block_size=64, vocab_size=512, num_classes=10,
        class_dropout=0, token_dropout=0, residual_dropout=0, ffn_dropout=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(512, (256, 64), generator=generator).cuda()
    classes = torch.arange(16, device="cuda") % 10

    def curve(wide: bool) -> Tensor:
        torch.manual_seed(0)
        model = GPT(config).cuda()
        trainer = GPTTrainer(model, GPTTraining(lr=1e-3, precision="bfloat16"))
        if wide:

            def loss(codes: Tensor, class_ids: Tensor) -> Tensor:
                hidden = model.hidden(model.embed(class_ids, codes[:, :-1]))
                with torch.autocast("cuda", enabled=False):
                    logits = hidden.float() @ model.head.weight.T
                return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

            model.loss = loss
        with vfmtok_fast.enable():
            steps = (rows[number % 16 :: 16] for number in range(300))
            return torch.tensor([trainer.step(codes, classes)["loss"] for codes in steps])

    fused = curve(False)
    assert set(vfmtok_fast.status().ops["linear_cross_entropy"].calls) == {"triton"}
    wide = curve(True)
    assert wide[-20:].mean() < 0.8 * wide[:20].mean()  # It learns, so the curves could diverge.
    smooth = torch.ones(1, 1, 20) / 20
    one, other = (F.conv1d(curve.view(1, 1, -1), smooth) for curve in (fused, wide))
    torch.testing.assert_close(one, other, rtol=0.01, atol=0)
