"""RAR on the command line: the authors' file, sampling with a scale that grows, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from vfmtok_fast import RAR, cli


@pytest.fixture(scope="module")
def folder(official_weights, tmp_path_factory) -> Path:
    """A folder made of the authors' file: 64 codes of 512, like the emoji model's 64 of 1,024."""
    root = tmp_path_factory.mktemp("rar")
    save_file(official_weights("rar_small"), root / "rar.safetensors")
    file = str(root / "rar.safetensors")
    assert cli.main(["convert", "RAR", str(root / "rar"), "--file", file]) == 0
    assert RAR.from_pretrained(root / "rar").config.num_layers == 3
    return root / "rar"


def sample(out: Path, folder: Path, *options: str) -> int:
    common = ["--model", "emoji", "--num", "3", "--size", "64", "--device", "cpu"]
    return cli.main(["sample", str(out), "--gpt", str(folder), *common, *options])


def test_convert_and_sample(folder, tmp_path, capsys):
    growing = ("--cfg-scale", "4", "--cfg-power", "2.75")
    assert sample(tmp_path / "a", folder, *growing) == 0
    assert sample(tmp_path / "b", folder, "--cfg-scale", "4") == 0
    pictures = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab"]
    assert pictures[0].shape == (3, 64, 64, 3)
    assert not np.array_equal(*pictures)
    settings = [json.loads((tmp_path / name / "samples.json").read_text()) for name in "ab"]
    assert settings[0]["cfg_power"] == 2.75 and "cfg_power" not in settings[1]
    capsys.readouterr()
    # A folder made with another power is not continued.
    assert sample(tmp_path / "b", folder, *growing) == 2
    assert "cfg_power" in capsys.readouterr().err


def test_errors_are_one_line(folder, tmp_path, capsys):
    assert cli.main(["convert", "RAR", str(tmp_path / "x")]) == 2
    assert "--file must name the .safetensors file" in capsys.readouterr().err
    assert sample(tmp_path / "y", folder, "--cfg-power", "0") == 2
    line = capsys.readouterr().err.strip()
    assert "cfg_power must be in (0, 1e9), got 0.0" in line and "\n" not in line
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
