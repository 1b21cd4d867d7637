"""The benchmarks' harness: what is written, and that a failure costs its own record only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FILES = {
    "bench_first.py": """
import harness, pytest

@pytest.mark.parametrize("provider", ["good", "wrong", "late"])
def bench_first(benchmark, provider):
    def check(value):
        assert provider != "wrong"
        return {"checked": value}

    work = harness.Work(bytes=1, flops=1)
    harness.measure(
        benchmark, op="first", shape="s", provider=provider, fn=lambda: 7, check=check, work=work
    )
    assert provider != "late"
""",
    "bench_second.py": """
import harness, os

def bench_second(benchmark):
    work = harness.Work(bytes=1, flops=1)
    harness.measure(
        benchmark, op="second", shape="s", provider="p", fn=lambda: 7, check=lambda x: {}, work=work
    )

def bench_that_never_ends(benchmark):
    os._exit(9)
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The harness with two files of its own; a copy's ceilings are small ones."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("conftest.py", "harness.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    with (tmp_path / "benchmarks" / "harness.py").open("a") as file:
        file.write('FLUSH_BYTES = 1024\nceilings = lambda: {"copy_gb_s": 1, "matmul_tflop_s": 1}\n')
    for name, text in FILES.items():
        (tmp_path / "benchmarks" / name).write_text(text)
    return tmp_path / "benchmarks"


def run(folder: Path, *arguments: str) -> tuple[int, str, dict[str, dict]]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("results/*/*.json")}
    return done.returncode, done.stdout, found


def test_a_failure_costs_its_own_record_and_what_follows_nothing(folder: Path):
    """Not even where the whole run dies: results of a file are written when it is through."""
    code, _, found = run(folder)
    assert code == 9
    (first,) = found.values()
    assert [record["provider"] for record in first["records"]] == ["good"]
    assert first["records"][0] | {"checked": 7, "op": "first"} == first["records"][0]
    assert first["failed"] == ["bench_first[wrong]", "bench_first[late]"]


def test_a_part_of_a_file_is_not_written(folder: Path):
    code, text, found = run(folder, "-k", "good")
    assert code == 0 and not found
    assert "No results of bench_first.py written" in text


def test_a_clean_run_names_no_failure_and_needs_no_git(folder: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    (folder / "bench_first.py").unlink()
    text = FILES["bench_second.py"].partition("def bench_that")[0]
    (folder / "bench_second.py").write_text(text)
    code, text, found = run(folder)
    assert code == 0 and "wrote " in text
    second = found["second"]
    assert "failed" not in second and len(second["records"]) == 1
    assert second["environment"]["versions"]["torch"] and second["environment"]["commit"] is None
