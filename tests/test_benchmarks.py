"""The benchmark harness: a failure loses only its own record."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vfmtok_fast.untrained import untrained_tokenizer

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


SMALL = """
timing.FLUSH_BYTES["cpu"] = 1024
COMPILED_SECONDS = 5
ceilings = lambda: {"copy_gb_s": 1, "matmul_tflop_s": 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with a copy of the harness, small ceilings and two benchmark files."""
    monkeypatch.delenv("RESULTS", raising=False)
    (tmp_path / "benchmarks").mkdir()
    for name in ("conftest.py", "harness.py", "bounds.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    with (tmp_path / "benchmarks" / "harness.py").open("a") as file:
        file.write(SMALL)
    for name, text in FILES.items():
        (tmp_path / "benchmarks" / name).write_text(text)
    return tmp_path / "benchmarks"


def run(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, dict[str, dict]]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", str(folder)]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )
    return done.returncode, done.stdout, results(folder)


def results(folder: Path) -> dict[str, dict]:
    found = (folder.parent / "build" / "benchmarks").glob("*/*.json")
    return {path.stem: json.loads(path.read_text()) for path in found}


def test_a_failure_costs_its_own_record_and_what_follows_nothing(folder: Path):
    """This holds even if the whole run dies, because each record is written at once."""
    code, _, found = run(folder)
    assert code == 9
    first, second = found["first"], found["second"]
    assert "complete" not in first and second["complete"] is False
    assert [record["provider"] for record in second["records"]] == ["p"]
    assert [record["provider"] for record in first["records"]] == ["good"]
    assert first["records"][0] | {"checked": 7, "op": "first"} == first["records"][0]
    assert first["failed"] == ["bench_first[wrong]", "bench_first[late]"]


def test_a_part_of_a_file_is_written_as_a_part_and_never_over_the_committed_whole(folder: Path):
    code, _, found = run(folder, "-k", "good")
    assert code == 0 and found["first"]["complete"] is False
    assert [record["provider"] for record in found["first"]["records"]] == ["good"]
    code, text, _ = run(folder, "-k", "good", RESULTS=str(folder / "results"))
    assert code == 0 and "No results of bench_first.py written" in text
    assert not (folder / "results").exists()


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


COMPILED = """
import harness, pytest, time

@pytest.mark.parametrize("provider", ["slow compiled", "broken compiled", "good compiled", "good"])
def bench_third(benchmark, provider):
    def fn():
        if provider == "slow compiled":
            time.sleep(20)
        if provider == "broken compiled":
            raise RuntimeError("no such backend\\nand more")

    work = harness.Work(bytes=1, flops=1)
    harness.measure(
        benchmark, op="third", shape="s", provider=provider, fn=fn, check=lambda x: {}, work=work
    )
"""


def test_compiled_providers_come_last_and_are_never_fatal(folder: Path):
    for path in folder.glob("bench_*.py"):
        path.unlink()
    (folder / "bench_third.py").write_text(COMPILED)
    code, text, found = run(folder)
    assert code == 0, text
    third = found["third"]
    assert [record["provider"] for record in third["records"]] == ["good", "good compiled"]
    assert third["not_measured"] == {
        "bench_third[slow compiled]": "TimeoutError: it took longer than 5 s",
        "bench_third[broken compiled]": "RuntimeError: no such backend",
    }
    assert "third" in text and " us  " in text  # The table, with a fitting unit for each time.


RATIO = """
import harness, pytest, time

@pytest.mark.parametrize("provider", ["fast", "reference"])
def bench_fourth(benchmark, provider):
    harness.measure(
        benchmark, op="fourth", shape="s", provider=provider, fn=lambda: None,
        check=lambda x: {}, work=harness.Work(1, 1), slow=True,
        times=[0.03 if provider == "reference" else 0.02],
    )
"""


def test_the_table_says_how_much_faster_than_the_reference(folder: Path):
    for path in folder.glob("bench_*.py"):
        path.unlink()
    (folder / "bench_fourth.py").write_text(RATIO)
    code, text, _ = run(folder)
    assert code == 0, text
    fast, reference = (line.split() for line in text.splitlines() if line.startswith("fourth"))
    assert fast[2:5] == ["fast", "20.0", "ms"] and fast[-2] == "1.50"
    assert reference[2] == "reference" and reference[-2] == "1.00"


def test_only_the_file_that_is_named_runs(folder: Path):
    shutil.copy(BENCHMARKS.parent / "Makefile", folder.parent)
    # Without the variables that `make test ARGS=...` would pass down.
    plain = {k: v for k, v in os.environ.items() if not k.startswith("M") and k != "ARGS"}
    options = {"cwd": folder.parent, "env": plain, "capture_output": True, "text": True}
    command = ["make", "-n", "bench", "VENV=", "ARGS=benchmarks/bench_second.py"]
    done = subprocess.run(command, **options, check=True)
    assert done.stdout.strip().endswith("benchmarks/bench_second.py")
    every = subprocess.run(command[:-1], **options)
    assert every.stdout.strip().endswith("benchmarks")


def bounds():
    spec = importlib.util.spec_from_file_location("bounds_under_test", BENCHMARKS / "bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("copy", "matmul", "bound"),
    [
        (58.4, 0.3, "bytes"),
        (30.0, 80.0, "operations"),
        (0.5, 8.5, "latency"),
        (25, 25, "bytes"),
        (57.0, None, "bytes"),
        (30.0, None, ""),
        (None, 1.0, ""),
    ],
)
def test_a_record_says_what_bounds_it(copy, matmul, bound):
    assert bounds().bound(copy, matmul) == bound


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(3.4, "3.40 us"), (372.75, "372.8 us"), (5972.2, "5.97 ms"), (4.4e6, "4.40 s")],
)
def test_durations_are_in_the_unit_that_fits(microseconds, text):
    assert bounds().duration(microseconds) == text


def test_every_file_of_benchmarks_can_be_read(tmp_path: Path):
    """All benchmark files can be collected, so none names something that no longer exists."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--collect-only", str(BENCHMARKS)]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    for path in BENCHMARKS.glob("bench_*.py"):
        assert f"{path.name}::" in done.stdout


def test_the_release_style_tokenizer_computes_what_ours_does(monkeypatch, clean_switch):
    """A baseline that computes something else would be no baseline."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from release_tokenizer import ReleaseTokenizer

    tok = untrained_tokenizer("small")
    images = torch.rand(2, 3, 336, 336, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tok.encode(images)
    released = ReleaseTokenizer(tok)
    # Rounding may decide a near tie the other way.
    assert float((released.encode(images) == codes).float().mean()) >= 0.998
    want = tok.decode(codes)
    torch.testing.assert_close(released.decode(codes), want, rtol=0, atol=1e-4 * float(want.max()))


def test_operations_are_those_of_the_formula(monkeypatch):
    """The count includes attention, which torch does not count on a CPU."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_tokenizer import flops

    C, depth, patches = 1024, 24, 24**2
    tokens = patches + 1 + 4
    layer = 2 * tokens * 12 * C**2 + 4 * tokens**2 * C
    counted = flops()
    assert counted["backbone"] == depth * layer + 2 * patches * 3 * 14**2 * C
    # Two blocks of two convolutions; this is the last level, as wide as the one before.
    assert counted["pixel decoder, 336 x 336"] == 4 * 2 * 336**2 * 9 * 128**2
    parts = ("backbone", "region encoder", "quantiser")
    assert counted["encode"] == sum(counted[part] for part in parts)
