"""Timing, checking and recording for all benchmarks.

A benchmark names a *case* (op and shape) and times its *providers* on the same inputs, each after
its values have been checked. It uses `vfmtok_fast.timing`: device time on a GPU, wall time on a
CPU, after overwriting the caches. pytest-benchmark runs and stores the benchmarks. `Session` keeps
one JSON file per device and op and rewrites it after every record, so that later failures cannot
lose it. The files are in ``build/benchmarks``, or where the environment variable RESULTS says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import vfmtok_fast
from vfmtok_fast import timing

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
RESULTS = Path(os.environ.get("RESULTS") or ROOT / "build" / "benchmarks").resolve()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# A case stops after this many rounds or seconds, whichever comes first.
ROUNDS = 50 if GPU else 7
SECONDS = 1.0 if GPU else 4.0
# Time limit in seconds of a compiled provider, including `torch.compile`.
COMPILED_SECONDS = 60.0


class Clock:
    """pytest-benchmark's timer: the wall clock, or durations that were measured before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: list[float] | None = None
        self.running = False

    def __call__(self) -> float:
        if self.durations is None:
            return time.perf_counter()
        if self.running:
            self.now += self.durations.pop(0)
        self.running = not self.running
        return self.now


clock = Clock()


@dataclass(frozen=True)
class Work:
    """The least that a call must do: bytes in and out, and floating-point operations."""

    bytes: int
    flops: int


@dataclass
class Session:
    """What one benchmark file measured, what failed, and what was not measured and why."""

    records: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)

    def write(self, complete: bool) -> list[Path]:
        """Write one JSON file per op; each names what failed, so that gaps are visible."""
        paths = []
        for op in sorted({record["op"] for record in self.records}):
            content = {
                "environment": environment(),
                "ceilings": ceilings(),
                "records": [record for record in self.records if record["op"] == op],
            }
            if self.failed:
                content["failed"] = self.failed
            if self.not_measured:
                content["not_measured"] = self.not_measured
            if not complete:
                content["complete"] = False
            paths.append(RESULTS / device_name() / f"{op}.json")
            write_json(paths[-1], content)
        return paths

    def clear(self) -> None:
        self.records.clear()
        self.failed.clear()
        self.not_measured.clear()


def write_json(path: Path, content: object) -> None:
    """Write atomically: a reader, or a run after a kill, finds the complete old or new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


session = Session()


@functools.cache
def device_name() -> str:
    """Name of the folder with this device's results."""
    if GPU:
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}-cores"


def processor() -> str:
    """The processor's name, and its widest instructions for products."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*: (.+)$", text, re.M)
    flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
    kinds = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    widest = next((kind for kind in kinds if kind in flags), "")
    return ", ".join(part for part in (name and name[1], widest) if part) or platform.machine()


@functools.cache
def environment() -> dict[str, object]:
    """Device, versions and commit; numbers of different environments are never mixed."""

    def git(*args: str) -> str:
        if not shutil.which("git"):
            return ""
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if GPU:
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return {
        "device": device_name(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": git("rev-parse", "--short", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--", "kernels", "vfmtok_fast")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@functools.cache
def ceilings() -> dict[str, float]:
    """Rates that this device reaches: memory copy (bytes read and written) and matrix product."""
    size, dtype = (8192, torch.bfloat16) if GPU else (1024, torch.float32)
    source = torch.randn(2**28 if GPU else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    # A captured `copy_` becomes a memcpy node of the graph, which is slower than a kernel that
    # copies: 2.71 against 4.3 TB/s on an H200. The ceiling is the faster of the two.
    copies = [lambda: torch.mul(source, 1, out=target), lambda: target.copy_(source)]
    for fn in (*copies, lambda: a @ b):
        fn()  # Run once first, like everything that is timed.
    turns, _ = timing.time_in_turns(copies, DEVICE, 9)
    copy = min(map(min, turns))
    product = min(rounds_of(lambda: a @ b, rounds=9)[0])
    return {
        "copy_gb_s": round(2 * source.nbytes / copy / 1e9, 1),
        "matmul_tflop_s": round(2 * size**3 / product / 1e12, 3),
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def rounds_of(
    fn: Callable[[], object], rounds: int = ROUNDS, replay: bool = True
) -> tuple[list[float], str]:
    """Call `vfmtok_fast.timing.time_rounds` on this device; ``fn`` must have run before."""
    return timing.time_rounds(fn, DEVICE, rounds, SECONDS, replay)


def peak_bytes(fn: Callable[[], object]) -> int | None:
    """Peak memory in use during a call beyond what was in use before it."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return None

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    # Reset the process's high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    fn()
    return high_water() - before


def quartiles_apart(times: list[float]) -> float:
    """The spread of the rounds; a single disturbed round does not change it."""
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return third - first


@functools.cache
def compiled(call: Callable) -> Callable:
    """``call`` under torch.compile, for one shape at a time."""
    return torch.compile(call, dynamic=False)


def providers(call: Callable) -> dict[str, Callable[[], Callable]]:
    """Providers for a call of an op: as it is, compiled, and for use when the op is enabled."""
    return {
        "reference": lambda: call,
        "reference compiled": lambda: compiled(call),
        "fast": lambda: call,
    }


def measure(
    benchmark,
    *,
    op: str,
    shape: str,
    provider: str,
    fn: Callable[[], object],
    check: Callable[[object], dict[str, object]],
    work: Work,
    rounds: int = ROUNDS,
    replay: bool = True,
    slow: bool = False,
    times: list[float] | None = None,
    enabled: str | None = None,
) -> None:
    """Check a provider's values, time it, and record it.

    Args:
        benchmark: pytest-benchmark's fixture.
        op, shape, provider: what is timed; together they identify the record.
        fn: the call, without arguments.
        check: raises if the values of ``fn()`` are wrong; what it returns is recorded.
        work: the least that the call must do.
        rounds: maximum number of rounds.
        replay: as in `rounds_of`.
        slow: a call takes seconds, on a CPU: the first call, which gives values and peak memory,
            also counts as a round.
        times: wall seconds of rounds that the caller has timed, alternating with another provider.
        enabled: the only op that uses its fast implementation in every call of ``fn``. Enabling it
            is not part of the call.
    """

    def enabling() -> contextlib.AbstractContextManager:
        return vfmtok_fast.enable(enabled, strict=True) if enabled else contextlib.nullcontext()

    if slow or times is not None:
        results: list[object] = []
        with enabling():
            start = time.perf_counter()
            peak = peak_bytes(lambda: results.append(fn()))
            first = time.perf_counter() - start
            how = "wall"
            times = times or [first, *rounds_of(fn, rounds - 1, replay)[0]]
        facts = check(results.pop())
    else:
        with enabling():
            result = fn()
        facts = check(result)
        del result
        with enabling():
            peak = peak_bytes(fn)
            times, how = rounds_of(fn, rounds, replay)
    median = statistics.median(times)
    top = ceilings()
    record = {
        "op": op,
        "shape": shape,
        "provider": provider,
        "median_us": round(median * 1e6, 2),
        "min_us": round(min(times) * 1e6, 2),
        "max_us": round(max(times) * 1e6, 2),
        "iqr_us": None if len(times) < 2 else round(quartiles_apart(times) * 1e6, 2),
        "rounds": len(times),
        "timer": how,
        "gb_s": round(work.bytes / median / 1e9, 2),
        "percent_of_copy": round(100 * work.bytes / median / 1e9 / top["copy_gb_s"], 1),
        "tflop_s": round(work.flops / median / 1e12, 3),
        "percent_of_matmul": round(100 * work.flops / median / 1e12 / top["matmul_tflop_s"], 1),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
        **facts,
    }
    benchmark.extra_info.update(record)
    clock.durations = list(times)
    try:
        # Replay the measured times, so that pytest-benchmark shows and stores them.
        benchmark.pedantic(lambda: None, rounds=len(times), iterations=1)
    finally:
        clock.durations = None
    session.records.append(record)
