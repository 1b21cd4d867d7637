"""Two processes that share each batch are one process with all of it."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vfmtok_fast import VFMTokConfig

# The command, and its trainer's state afterwards.
SCRIPT = """
import sys, torch
from vfmtok_fast import cli, training
train = training.Run.train
def keep(run):
    train(run)
    torch.save(run.trainer.state_dict(), sys.argv[1])
training.Run.train = keep
sys.exit(cli.main(sys.argv[2:]))
"""


def start(state: Path, arguments: list[str], **environment: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT, str(state), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def leaves(value: object) -> list[Tensor]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(
    photos: Path, tiny: VFMTokConfig, tmp_path: Path
):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(dataclasses.asdict(tiny)))
    common = [
        "--config", str(config), "--random-backbone", "--no-lpips", "--discriminator", "none",
        "--batch-size", "4", "--steps", "3", "--warmup-steps", "0", "--log-every", "1",
        "--show-every", "1", "--device", "cpu", "--no-fast", "--revive-after", "12",
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def command(name: str) -> list[str]:
        return ["train-tokenizer", str(photos), str(tmp_path / name), *common]

    pair = [
        start(
            tmp_path / f"{rank}.pt",
            command("two"),
            RANK=rank,
            WORLD_SIZE=2,
            LOCAL_RANK=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip
        for rank in (0, 1)
    ]
    for process in pair:
        finish(process)
    finish(start(tmp_path / "one.pt", command("one")))

    first, second, one = (torch.load(tmp_path / f"{name}.pt") for name in ("0", "1", "one"))
    ours, theirs = leaves(first), leaves(second)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "processes differ"

    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("two", "one")]
    assert len(logs[0]) == len(logs[1]) == 3
    for line, other in zip(*logs, strict=True):
        line, other = json.loads(line), json.loads(other)
        for name in ("images", "usage", "epoch", "lr"):
            assert line[name] == other[name], name
        for name in ("rec", "semantic", "codebook", "commit", "total", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), name
    # The first step's difference is rounding; Adam makes more of it where a gradient is tiny.
    weights = (state["model"]["pixel_decoder.conv_in.weight"] for state in (first, one))
    moved = 3 * 1e-4
    assert float(torch.sub(*weights).abs().mean()) < 0.01 * moved
    # After the last step the codes without use took the first process's queries, on both the same.
    assert line["revived"] > 0
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == [*("checkpoints", "log.jsonl", "model", "pictures"), "vfmtok-tokenizer.pt"]
