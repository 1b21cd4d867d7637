"""`make gpu-report`: all parts keep to their time, whatever one of them does."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_report():
    name = "gpu_report_under_test"
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Its dataclasses look themselves up there.
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


class Machine:
    """A clock and a runner: each part takes a given time, or stops at its limit."""

    def __init__(self, takes: dict[str, float]):
        self.takes, self.now, self.limits = takes, 0.0, {}

    def clock(self) -> float:
        return self.now

    def run(self, command, limit: float) -> str:
        name, *rest = command
        self.limits[name] = (round(limit, 3), *rest)
        self.now += min(self.takes[name], limit)
        return "done" if self.takes[name] <= limit else f"cut off after {limit:.0f} s"


def play(gpu_report, takes: dict[str, float], shares: dict[str, float], seconds: float):
    machine = Machine(takes)
    todo = [
        gpu_report.Part(name, (name,), share, always=name == "report")
        for name, share in shares.items()
    ]
    noted = []
    ended = gpu_report.run(
        todo, seconds, clock=machine.clock, runner=machine.run, note=lambda e: noted.append(len(e))
    )
    assert noted == list(range(1, len(todo) + 1))
    return machine, {part.name: part.how for part in ended}


def test_a_part_that_hangs_takes_its_share_and_no_more(gpu_report):
    takes = {"compile": 1e9, "tests": 30, "bench": 100, "report": 5}
    shares = {"compile": 0.25, "tests": 0.3, "bench": 1, "report": 1}
    machine, how = play(gpu_report, takes, shares, 400)
    assert how == {
        "compile": "cut off after 100 s", "tests": "done", "bench": "done", "report": "done",
    }  # fmt: skip
    # Time that the tests leave over goes to the benchmarks; the report keeps its own.
    assert machine.limits["bench"] == (400 - 130 - gpu_report.REPORT,)


def test_what_does_not_fit_is_named_and_the_report_comes_still(gpu_report):
    takes = {"first": 1e9, "second": 10, "report": 5}
    machine, how = play(gpu_report, takes, {"first": 1, "second": 1, "report": 1}, 100)
    assert how == {"first": "cut off after 80 s", "second": "did not fit", "report": "done"}
    assert machine.now == 85


def test_a_command_is_told_its_seconds(gpu_report):
    machine = Machine({"tune": 1})
    todo = [gpu_report.Part("tune", ("tune", "--seconds", "{seconds}"), 0.2)]
    gpu_report.run(todo, 300, clock=machine.clock, runner=machine.run)
    assert machine.limits["tune"] == (60, "--seconds", "50")


def test_the_parts_and_their_order(gpu_report):
    parts = gpu_report.parts()
    names = [part.name for part in parts]
    assert names[:3] == ["compile", "tests", "tune"] and names[-1] == "report"
    assert names[3:5] == ["nearest_code", "deformable_sample"]
    # All benchmarks, except the one that has no GPU part.
    on_disk = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert set(names[3:-1]) == on_disk - {"cache"}


def test_every_test_that_needs_a_gpu_is_among_the_parts(gpu_report):
    root = BENCHMARKS.parent
    mark = "pytest.mark." + "gpu"
    marked = [path for path in (root / "tests").rglob("test_*.py") if mark in path.read_text()]
    places = [root / place for place in gpu_report.TESTS]
    assert all(place.exists() for place in places) and len(marked) > 10
    missing = [path for path in marked if not any(path.is_relative_to(p) for p in places)]
    assert not missing


def test_benchmarks_share_what_is_left_by_their_weights(gpu_report):
    """A long file does not shorten later ones, and they get the time that a short one leaves."""
    machine = Machine({"tests": 20, "long": 1e9, "short": 10, "last": 1e9, "report": 5})
    todo = [
        gpu_report.Part("tests", ("tests",), 0.5),
        gpu_report.Part("long", ("long",), weight=3),
        gpu_report.Part("short", ("short",), weight=1),
        gpu_report.Part("last", ("last",), weight=2),
        gpu_report.Part("report", ("report",), always=True),
    ]
    ended = gpu_report.run(todo, 160, clock=machine.clock, runner=machine.run)
    kept = gpu_report.REPORT
    assert machine.limits == {
        "tests": (80,),
        "long": ((140 - kept) * 3 / 6,),
        "short": ((80 - kept) * 1 / 3,),
        "last": (70 - kept,),
        "report": (kept,),
    }
    assert [part.how.partition(" ")[0] for part in ended] == ["done", "cut", "done", "cut", "done"]


STOPPED = """
import sys
import gpu_report, harness

part = (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(300)")
gpu_report.parts = lambda: [gpu_report.Part("long", part)]
harness.GPU = True
sys.argv = ["gpu_report.py"]
gpu_report.main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py")]
    environment = {**os.environ, "RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_who_stops_it_stops_the_part_that_is_running(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "RESULTS": str(tmp_path)}
    command = [sys.executable, "-P", "-c", STOPPED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        number = next(int(line) for line in lines if line.strip().isdigit())
        process.terminate()
        assert process.wait(60) == 128 + 15
    wait_for_its_end(number)


COMPILE = """
import sys
import torch, aot_calls, gpu_report
from vfmtok_fast.tuner.calls import Call

torch.cuda.get_device_capability = lambda: (9, 0)
draw = {"B": 1, "V": 64, "greedy": True}
attention = {"B": 1, "H": 1, "G": 1, "T": 16, "D": 16, "length": 5}
aot_calls.CALLS[:] = [
    Call("sample_token", "small", "bfloat16", draw),
    Call("decode_attention", "small", "bfloat16", attention),
]
sys.exit(gpu_report.compile_all())
"""


def test_kernels_are_compiled_in_other_processes_into_tritons_cache(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": compiled") == 2
    made = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert made == {"_sample_token", "_decode"}


def test_a_failure_is_told_from_success(gpu_report):
    assert gpu_report.run_process([sys.executable, "-c", "pass"], 60) == "done"
    assert gpu_report.run_process([sys.executable, "-c", "raise SystemExit(3)"], 60) == "exit 3"


def test_nothing_of_a_part_is_left_behind(gpu_report, tmp_path, monkeypatch):
    """A child is ended too, even if its parent ignores signals."""
    monkeypatch.setattr(gpu_report, "GRACE", 0.2)
    noted = tmp_path / "pid"
    child = "import time; time.sleep(300)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(noted)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    assert gpu_report.run_process([sys.executable, "-c", code], 15) == "cut off after 15 s"
    wait_for_its_end(int(noted.read_text()))


def wait_for_its_end(pid: int) -> None:
    for _ in range(600):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        # The process that inherited it may not have reaped it yet.
        if "State:\tZ" in status:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("a child went on")


def test_a_killed_run_keeps_its_records(gpu_report, tmp_path):
    """Each record is written to disk at once, so a benchmark that hangs loses only its own."""
    pytest.importorskip("pytest_benchmark")
    for name in ("conftest.py", "harness.py", "bounds.py"):
        (tmp_path / name).write_text((BENCHMARKS / name).read_text())
    with (tmp_path / "harness.py").open("a") as file:
        file.write('timing.FLUSH_BYTES["cpu"] = 1024\n')
        file.write('ceilings = lambda: {"copy_gb_s": 1, "matmul_tflop_s": 1}\n')
    (tmp_path / "bench_x.py").write_text(
        "import harness, pytest, signal, time\n"
        '@pytest.mark.parametrize("provider", ["good", "hangs"])\n'
        "def bench_x(benchmark, provider):\n"
        '    if provider == "hangs":\n'
        "        signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        '        open("hangs", "w").close()\n'
        "        time.sleep(300)\n"
        "    harness.measure(benchmark, op='x', shape='s', provider=provider, fn=lambda: 1,\n"
        "        check=lambda x: {}, work=harness.Work(1, 1))\n"
    )
    command = [*gpu_report.BENCH, "bench_x.py"]
    environment = {**os.environ, "RESULTS": str(tmp_path / "results")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, "it has ended before it could hang"
        time.sleep(0.1)
    gpu_report.end_group(process, 9)
    process.wait()
    (path,) = (tmp_path / "results").glob("*/x.json")
    content = path.read_text()
    assert '"provider": "good"' in content and '"complete": false' in content
