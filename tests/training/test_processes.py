"""Two processes that share each batch train like one process with the whole batch."""

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

from vfmtok_fast import VFMTok, VFMTokConfig

# Runs the command and saves its trainer's state afterwards.
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


@pytest.fixture(scope="module")
def command(photos: Path, tiny: VFMTokConfig, tmp_path_factory: pytest.TempPathFactory):
    """``command(name)``: the command for the run `name`, and the folder of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tiny.json"
    config.write_text(json.dumps(dataclasses.asdict(tiny)))
    common = [
        "--config", str(config), "--random-backbone", "--no-lpips", "--discriminator", "none",
        "--batch-size", "4", "--steps", "3", "--warmup-steps", "0", "--log-every", "1",
        "--show-every", "1", "--device", "cpu", "--no-fast", "--revive-after", "12",
    ]  # fmt: skip
    return lambda name: (["train-tokenizer", str(photos), str(folder / name), *common], folder)


@pytest.fixture(scope="module")
def alone(command) -> dict:
    """The state after the run of a single process."""
    line, folder = command("one")
    finish(start(folder / "one.pt", line))
    return torch.load(folder / "one.pt")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sharded"]], ids=["whole", "sharded"])
def test_two_processes_are_one_with_twice_the_batch(command, alone: dict, more: list[str]):
    line, folder = command(name := f"two{len(more)}")
    with socket.socket() as taken:
        # Keep the socket, so that no other process gets this port; torch can listen on it anyway.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        pair = [
            start(
                folder / f"{name}-{rank}.pt",
                [*line, *more],
                RANK=rank,
                WORLD_SIZE=2,
                LOCAL_RANK=rank,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=taken.getsockname()[1],
            )  # fmt: skip
            for rank in (0, 1)
        ]
        for process in pair:
            finish(process)

    # A state is whole, also that of a sharded model.
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    ours, theirs = leaves(first), leaves(second)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "processes differ"

    logs = [(folder / name / "log.jsonl").read_text().splitlines() for name in (name, "one")]
    assert len(logs[0]) == len(logs[1]) == 3
    for line, other in zip(*logs, strict=True):
        line, other = json.loads(line), json.loads(other)
        for term in ("images", "usage", "epoch", "lr"):
            assert line[term] == other[term], term
        for term in ("rec", "semantic", "codebook", "commit", "total", "grad_norm"):
            assert line[term] == pytest.approx(other[term], rel=1e-3), term
    # The first step differs by rounding, which Adam magnifies where a gradient is tiny.
    weights = (state["model"]["pixel_decoder.conv_in.weight"] for state in (first, alone))
    moved = 3 * 1e-4
    assert float(torch.sub(*weights).abs().mean()) < 0.01 * moved
    # After the last step, unused codes took the first process's queries, the same on both.
    assert line["revived"] > 0
    names = sorted(path.name for path in (folder / name).iterdir())
    assert names == [*("checkpoints", "log.jsonl", "model", "pictures"), "vfmtok-tokenizer.pt"]
    model = VFMTok.from_pretrained(folder / name / "model")
    assert torch.equal(model.quantizer.codebook, first["ema"]["quantizer.codebook"])
