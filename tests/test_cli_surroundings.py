"""The command line and its environment: streams, terminals, schedulers, folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import cli, untrained
from vfmtok_fast.cache.format.views import known_views
from vfmtok_fast.cache.read.export import FORMATS
from vfmtok_fast.cache.sources import KINDS
from vfmtok_fast.checkpoint import OFFICIAL_FILES, OFFICIAL_REPO
from vfmtok_fast.cli import choices, output, processes
from vfmtok_fast.generator.config import PRESETS
from vfmtok_fast.tokenizer.precision import PRECISIONS


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vfmtok_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300, **options)


def test_status_imports_no_torch(tmp_path):
    code = (
        "import sys; from vfmtok_fast.cli import main; assert main(['status', sys.argv[1]]) == 2; "
        "assert 'torch' not in sys.modules; from vfmtok_fast import cache; "
        "assert all(hasattr(cache, name) for name in cache.__all__) and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_help_imports_no_torch():
    code = (
        "import sys; from vfmtok_fast.cli import build_parser, main; build_parser().format_help()\n"
        "try: main(['cache', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--max-bad" in result.stdout, result.stderr


def test_the_old_name_of_precision_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cache", "photos", "tokens", "--dtype", "bfloat16"])
    assert "renamed to --precision: use --precision bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sample", "out", "--precision", "mixed"])
    assert "invalid choice: 'mixed'" in capsys.readouterr().err


def test_choices_are_those_of_the_package():
    assert set(choices.OFFICIAL_FILES) == set(OFFICIAL_FILES)
    assert set(choices.CONVERTED) == {*OFFICIAL_FILES, "RAR"}
    assert choices.OFFICIAL_REPO == OFFICIAL_REPO
    assert set(choices.PRESETS) == set(PRESETS)
    assert set(choices.UNTRAINED) == set(untrained.TOKENIZERS) == set(untrained.GPTS)
    assert choices.PRECISIONS == PRECISIONS
    assert list(choices.VIEWS) == known_views()
    assert set(choices.INPUTS) == set(KINDS)
    assert set(choices.FORMATS) == set(FORMATS)


def test_every_name_of_the_package_is_there():
    for name in vf.__all__:
        assert getattr(vf, name) is not None and name in dir(vf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vf.nothing  # noqa: B018


def test_version():
    result = run("--version", text=True)
    assert result.stdout == f"vfmtok-fast {vf.__version__}\n" and result.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "utf-8:strict", "latin-1"])
def test_names_that_a_stream_cannot_show(encoding, tmp_path):
    """An error about such a name is reported without causing a second error."""
    missing = tmp_path / "snow\N{SNOWMAN}man\udcff"
    result = run("status", missing, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert result.returncode == 2 and b"no token cache here" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_streams(closed, tmp_path):
    command = f'"{sys.executable}" -m vfmtok_fast status "{tmp_path}/none" {closed}>&-'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path / "a\x1b[31mred\x07\x9b")]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[31mred\\x07\\x9b" in told and "\x1b" not in told and told.count("\n") == 1
    assert output.harmless("a\tb\n") == "a\tb\\x0a"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, (2, 4)),
        # The batch script itself is one process, although its job has four tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        # torchrun inside a step.
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
    ],
)  # fmt: skip
def test_processes_share_the_work(environment, expected, monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.among_processes("cpu") == (*expected, "cpu")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK must be a number, got 'x'"):
        processes.among_processes("cpu")


def test_torchrun_is_not_told_of_a_crash(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [processes.exit_code(code) for code in (0, 2, 3, 4)] == [0, 2, 3, 4]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [processes.exit_code(code) for code in (0, 2, 3, 4)] == [0, 2, 0, 4]


@pytest.fixture
def official(tmp_path) -> list[str]:
    """Return the arguments that convert a small generator in the authors' layout."""
    import json

    from vfmtok_fast.checkpoint import official_gpt

    gpt = untrained.untrained_gpt("small")
    torch.save({"model": official_gpt(gpt)}, tmp_path / "gpt.pt")
    (tmp_path / "config.json").write_text(json.dumps(vars(gpt.config)))
    return ["--file", str(tmp_path / "gpt.pt"), "--config", str(tmp_path / "config.json")]


@pytest.mark.parametrize("where", ["new", "empty", "link", ".", "deep/er"])
def test_convert_into_any_folder(where, official, tmp_path, monkeypatch, capsys):
    target = tmp_path / "there"
    if where not in ("new", "deep/er"):
        target.mkdir()
    if where == "link":
        (tmp_path / "link").symlink_to(target)
    if where == ".":
        monkeypatch.chdir(target)
    named = {"new": target, "empty": target, "deep/er": target / "er", ".": Path(".")}
    assert cli.main(["convert", "GPT-B", str(named.get(where, tmp_path / "link")), *official]) == 0
    folder = target / "er" if where == "deep/er" else target
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert vf.GPT.from_pretrained(folder).config.num_layers == 3
    assert sorted(os.listdir(tmp_path)).count("there") == 1
    assert cli.main(["convert", "GPT-B", str(folder), *official]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_convert_into_a_loop_of_links(official, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert cli.main(["convert", "GPT-B", str(tmp_path / "loop"), *official]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and str(tmp_path / "loop") in line
    assert sorted(os.listdir(tmp_path)) == ["config.json", "gpt.pt", "loop"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
            "a smaller --batch-size needs less",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nA long text"), "a smaller --batch-size"),
    ],
)
def test_out_of_memory_is_one_line(error, expected, monkeypatch, capsys):
    def full(options):
        raise error

    monkeypatch.setattr(cli.status, "run", full)
    assert cli.main(["status", "x"]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    def wrong(options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.status, "run", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["status", "x"])
