"""The shipped emoji model is found by name and is as good as documented."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import cli
from vfmtok_fast.evaluation.metrics import psnr
from vfmtok_fast.hub import PRETRAINED

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji"
HELD_OUT = EMOJI / "data" / "heldout"
# How many images are measured here, from all groups.
SOME = 48


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    """Load examples/emoji/evaluate.py, which imports modules beside it."""
    sys.path.insert(0, str(EMOJI))
    try:
        spec = importlib.util.spec_from_file_location("emoji_evaluate", EMOJI / "evaluate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EMOJI))
    return module


@pytest.fixture(scope="module")
def tokenizer() -> vf.VFMTok:
    return vf.VFMTok.from_pretrained("emoji")


@pytest.fixture(scope="module")
def gpt() -> vf.GPT:
    return vf.GPT.from_pretrained("emoji")


def some_held_out() -> list[Path]:
    files = sorted(HELD_OUT.glob("*/*.webp"))
    return [files[number * len(files) // SOME] for number in range(SOME)]


def test_a_name_means_the_shipped_model_unless_there_is_such_a_folder(
    tokenizer, gpt, tmp_path, monkeypatch
):
    assert gpt.config.vocab_size == tokenizer.config.codebook_size
    assert gpt.config.block_size == tokenizer.config.num_regions
    assert next(tokenizer.parameters()).dtype == next(gpt.parameters()).dtype == torch.float32
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    for kind in (vf.VFMTok, vf.GPT):
        with pytest.raises(FileNotFoundError, match="the folder emoji has no config.json"):
            kind.from_pretrained("emoji")


def test_the_shipped_weights_are_small():
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "LICENSE.md"}
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_the_page_says_what_was_measured():
    found = json.loads((EMOJI / "figures.json").read_text())
    page = (EMOJI / "README.md").read_text()
    nearest = "codes of the nearest training picture"
    own = found[f"{nearest}, held out"]
    rows = [
        f"| PSNR | {found['PSNR']:.1f} dB (a white square: {found['PSNR of white']:.1f}) |",
        f"| SSIM | {found['SSIM']:.2f} |",
        f"| codes in use, of 1,024 | {found['codes in use']} |",
        f"| held-out pictures | {found['accuracy, real']:.2f} | {own:.2f} |",
        f"| their reconstructions | {found['accuracy, reconstructed']:.2f} | |",
    ]
    for scale, name in ((1.0, "no guidance"), *((s, f"guidance {s:g}") for s in (1.5, 2.0, 3.0))):
        accuracy = found[f"accuracy, generated, guidance {scale}"]
        known = found[f"{nearest}, guidance {scale}"]
        rows.append(f"| generated, {name} | {accuracy:.2f} | {known:.2f} |")
    assert [row for row in rows if row not in page] == []


def test_pictures_that_it_was_not_trained_on_come_back(tokenizer, evaluate):
    """Measured on all 150: a PSNR of 22.2 dB; a white square has 9.2."""
    images = vf.images.load_images(some_held_out(), tokenizer.config.image_size)
    real, (made, codes) = vf.images.to_uint8(images), evaluate.reconstruct(tokenizer, images)
    assert psnr(real, made).mean() > 20
    # Images have their own codes instead of sharing a few.
    assert len(codes.unique()) > 500
    assert psnr(real, made.roll(1, 0)).mean() < 12


def test_another_network_recognises_what_is_generated(tokenizer, gpt, evaluate):
    """Measured on 40 of each group: 0.66; chance is 0.11; for real held-out images 0.67."""
    judge = evaluate.Classifier.load(EMOJI / "classifier.safetensors")
    drawn, labels, _ = evaluate.generate(gpt, tokenizer, 12, cfg_scale=2.0)
    assert evaluate.accuracy(judge, drawn, labels) > 0.45
    assert evaluate.accuracy(judge, drawn, labels.roll(12)) < 2 / evaluate.GROUPS


def test_the_commands_know_the_name(tmp_path):
    model = ["--model", "emoji", "--device", "cpu"]
    out = tmp_path / "samples"
    line = ["sample", str(out), "--gpt", "emoji", "--num", "9", "--size", "64", *model]
    assert cli.main(line) == 0
    assert np.load(out / "samples.npz")["arr_0"].shape == (9, 64, 64, 3)
    assert cli.main(["cache", str(HELD_OUT / "flags"), str(tmp_path / "tokens"), *model]) == 0
    assert cli.main(["verify", str(tmp_path / "tokens")]) == 0
