"""On a GPU: the authors' numbers with the kernels, half precision, and the same bits twice."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast.training import LPIPS, DinoDiscriminator, TokenizerTrainer, TokenizerTraining

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
def test_the_same_bits_twice(
    make: Callable[..., TokenizerTrainer], images: Tensor, monkeypatch, precision: str
):
    # cuBLAS has no order of sums without.
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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
