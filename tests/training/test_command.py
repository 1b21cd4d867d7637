"""`vfmtok-fast train-tokenizer`."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from pathlib import Path

import pytest
import torch

from vfmtok_fast import VFMTok, VFMTokConfig, cli
from vfmtok_fast.cli import train_tokenizer
from vfmtok_fast.training import LPIPS, DinoDiscriminator, TokenizerTraining
from vfmtok_fast.training.estimate import estimate_tokenizer


@pytest.fixture(scope="module")
def config(tiny: VFMTokConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(dataclasses.asdict(tiny)))
    return path


def arguments(photos: Path, out: Path, config: Path, *more: str) -> list[str]:
    return [
        "train-tokenizer", str(photos), str(out), "--config", str(config), "--random-backbone",
        "--batch-size", "4", "--steps", "3", "--warmup-steps", "2", "--show-every", "0",
        "--log-every", "1", "--device", "cpu", *more,
    ]  # fmt: skip


SMALL = ("--no-lpips", "--discriminator", "patch", "--discriminator-start", "2")


def test_a_run_and_going_on_with_it(photos: Path, config: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert cli.main(arguments(photos, out, config, *SMALL, "--json", "--tensorboard")) in (0, 2)
    if "vfmtok-fast[train]" in capsys.readouterr().err:
        assert cli.main(arguments(photos, out, config, *SMALL, "--json")) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:3]]
        assert [line["step"] for line in told] == [1, 2, 3]
    model = VFMTok.from_pretrained(out / "model")
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 16)
    theirs = torch.load(out / "vfmtok-tokenizer.pt")["ema"]
    assert torch.equal(theirs["slot_quantize.embedding.weight"], model.quantizer.codebook)

    assert cli.main(arguments(photos, out, config, *SMALL, "--lr", "0.01")) == 2
    error = capsys.readouterr().err
    assert "settings have changed: lr (there 0.0001, here 0.01); to resume" in error
    more = (*SMALL, "--lr", "0.01", "--accept-changes", "--steps", "5")
    assert cli.main(arguments(photos, out, config, *more)) == 0
    text = capsys.readouterr()
    assert "resuming from" in text.err and "5 steps, 2.50 epochs" in text.out
    assert len((out / "log.jsonl").read_text().splitlines()) == 5
    again = ("--start-from", str(out / "model"), *SMALL)
    line = arguments(photos, tmp_path / "on", config, *again)
    line.remove("--random-backbone")
    del line[line.index("--config") : line.index("--config") + 2]
    assert cli.main(line) == 0
    assert VFMTok.from_pretrained(tmp_path / "on" / "model").config == model.config


def test_deterministic_training_on_a_gpu_needs_the_kernels(config: Path, tmp_path: Path):
    line = arguments(tmp_path, tmp_path, config, *SMALL, "--deterministic", "--no-fast")
    options = cli.build_parser().parse_args(line)
    for device in ("cpu", "cuda"):
        refused = pytest.raises(ValueError, match="--deterministic needs our kernels on a GPU")
        with refused if device == "cuda" else contextlib.nullcontext():
            train_tokenizer._settings(options, 10, torch.device(device))


def test_two_runs_do_not_share_a_folder(photos: Path, config: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert cli.main(arguments(photos, out, config, *SMALL)) == 2
    assert f"{out}: another process is training there" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    os.close(folder)
    assert cli.main(arguments(photos, out, config, *SMALL, "--lr", "-1")) == 2
    assert "lr must be" in capsys.readouterr().err and out.is_dir()
    new = tmp_path / "new"
    assert cli.main(arguments(photos, new, config, *SMALL, "--lr", "-1")) == 2
    assert not new.exists()


@pytest.mark.slow
def test_files_of_the_losses(photos: Path, config: Path, tmp_path: Path, capsys):
    lpips = LPIPS()
    features = {f"features.{k}": v for k, v in lpips.features.state_dict().items()}
    torch.save(features, tmp_path / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(lpips.weights)}
    torch.save(linear, tmp_path / "vgg.pth")
    torch.save(DinoDiscriminator().vit.state_dict(), tmp_path / "dino.pth")
    files = [
        "--vgg16", str(tmp_path / "vgg16.pth"), "--lpips-linear", str(tmp_path / "vgg.pth"),
        "--dino-vits16", str(tmp_path / "dino.pth"), "--discriminator-start", "1",
    ]  # fmt: skip
    out = tmp_path / "run"
    line = arguments(photos, out, config, *files, "--micro-batch", "1", "--dropout", "0.1")
    line[line.index("--batch-size") + 1] = "2"
    line[line.index("--steps") + 1] = "1"
    assert cli.main(line) == 0, capsys.readouterr().err
    (log,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log["perceptual"] > 0 and log["generator"] > 0 and log["disc_grad_norm"] > 0


def test_recipe_of_rae(photos: Path, config: Path, tmp_path: Path):
    line = arguments(photos, tmp_path / "run", config, "--no-lpips", "--discriminator", "patch")
    assert cli.main([*line, "--recipe", "rae"]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003.pt")
    settings = checkpoint["trainer"]["settings"]
    assert settings["schedule"] == "cosine" and settings["adaptive_weight"]
    # Two steps per epoch: the discriminator learns from epoch 6, its loss counts from epoch 8.
    assert settings["discriminator_update_start"] == 13 and settings["discriminator_start"] == 17


def test_dry_run(photos: Path, config: Path, tmp_path: Path, capsys):
    line = arguments(photos, tmp_path / "run", config, *SMALL, "--dry-run")
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "10 pictures, 2 steps an epoch, 3 steps in all" in text
    assert "million weights learn" in text and "step 2 of a small model: total" in text
    assert re.search(r"TFLOP per picture; .* at least \S+ hours \(predicted\)", text)
    assert not (tmp_path / "run").exists()


def test_estimate_of_the_release():
    """Estimates are near sums by hand: 20 + 20 + 33 million weights plus 304, about 1.9 TFLOP."""
    found = estimate_tokenizer(VFMTokConfig(), TokenizerTraining(), DinoDiscriminator)
    # The tokenizer without its backbone, and the heads of the discriminator.
    assert found.learned == pytest.approx(73.3e6 + 7_386_245, rel=0.05)
    # DINOv2, VGG16's convolutions and DINO.
    assert found.frozen == pytest.approx(304e6 + 14.7e6 + 21.7e6, rel=0.02)
    # encode 404 + 3 x (19 + 2 x 27 + 325) + LPIPS 250 + discriminator 50 GFLOP
    assert found.flops == pytest.approx(1.9e12, rel=0.1)
    assert found.resting_bytes > 4 * (found.frozen + 5 * 73e6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--discriminator dino needs --dino-vits16 FILE"),
        (("--discriminator", "none", "--batch-size", "11"), "10 pictures are fewer than a batch"),
        (("--discriminator", "none", "--workers", "0"), "--workers must be at least 1"),
        (("--discriminator", "none", "--lr", "-1"), "lr must be a number"),
        (("--discriminator", "none", "--vgg16", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--dino-vits16", "DINO", "--no-lpips"), "discriminator: DINO ViT-S/16 does not fit"),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, config: Path, tmp_path: Path, capsys, more: tuple, message: str
):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    more = [str(tmp_path / "other.pth") if word == "DINO" else word for word in more]
    assert cli.main(arguments(photos, tmp_path / "run", config, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfmtok-fast train-tokenizer: ") and error.count("\n") == 1
    assert message in error and not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(photos: Path, config: Path, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert cli.main(arguments(photos, tmp_path, config, *SMALL)) == 2
    assert "neither empty nor a run to resume" in capsys.readouterr().err
