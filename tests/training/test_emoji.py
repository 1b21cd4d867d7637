"""A small tokenizer learns real images end to end through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfmtok_fast import VFMTok, cli

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "data" / "train.parquet"
CONFIG = {
    "image_size": 112,
    "backbone": {"dim": 64, "depth": 4, "num_heads": 2, "levels": [0, 1, 2, 3]},
    "dim": 64,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 2,
    "decoder_mlp_dim": 128,
    "num_regions": 64,
    "num_points": 2,
    "codebook_size": 512,
    "codebook_dim": 8,
    "pixel_channels": 32,
    "pixel_channel_mult": [1, 1, 1, 1, 1],
}
STEPS, EVERY = 32, 4


@pytest.mark.slow
def test_emoji_at_112_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "run"
    line = [
        "train-tokenizer", str(PICTURES), str(out), "--config", str(tmp_path / "config.json"),
        "--random-backbone", "--no-lpips", "--discriminator", "none", "--pixel-loss", "l1",
        "--batch-size", "4", "--steps", str(STEPS), "--lr", "2e-3", "--warmup-steps", "10",
        "--revive-after", "60", "--show-every", str(STEPS), "--log-every", str(EVERY),
        "--workers", "1", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(line) == 0, capsys.readouterr().err
    log = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    first, last = log[0], log[-1]
    assert len(log) == STEPS // EVERY and last["bad_pictures"] == 0
    assert last["total"] < first["total"] / 1.4
    assert last["rec"] < first["rec"] / 1.2 and last["semantic"] < first["semantic"] / 1.4
    assert last["usage"] > first["usage"] + 0.1
    assert VFMTok.from_pretrained(out / "model").config.image_size == 112
    assert [path.name for path in (out / "pictures").iterdir()] == [f"step-{STEPS:08d}.png"]
