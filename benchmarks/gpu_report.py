"""Run everything that needs a GPU, within a time limit: `make gpu-report SECONDS=450`.

The parts run one after another, the most important first: kernels are compiled in parallel, the
tests run in twelve processes, settings are tuned, each file of benchmarks runs alone, and the
report comes last. Each part is a process group with its own time limit and is killed when that is
over. A part that fails or hangs costs the others only its time. ``gpu-report.json`` in the folder
of results says how each part ended; the parts that did not fit are named at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# -P keeps the current folder off sys.path, where kernels/ would shadow another package.
MODULE = [sys.executable, "-P", "-m"]
PYTEST = [*MODULE, "pytest", "-q", "-p", "no:cacheprovider"]
BENCH = [*PYTEST, "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
# Files with tests marked `gpu`. Not all of tests/, because twelve processes would collect it all.
TESTS = (
    "tests/ops",
    "tests/models",
    "tests/training/test_gpu.py",
    "tests/cache/test_batch.py",
    "tests/test_cli_gpu.py",
    "tests/test_images.py",
    "tests/test_sample_folder.py",
    "tests/test_timing.py",
)
# Models and contexts of twelve processes fit into the memory of one GPU.
TEST_PROCESSES = 12
# Files of benchmarks and their weights, the most important first: the two ops that lead their
# field; then what they are for, whole images and files to tokens; then the parts of a step. Each
# file may use its weight's share of the time that remains for all of them, so that a long file
# cannot use up the time of those after it; time that it does not use is theirs. `generate` includes
# whole images made the authors' way, 4 s each on an H200. "cache" is missing because nothing in
# that file runs on a machine with a GPU.
BENCHMARKS = {
    "nearest_code": 4.0,
    "deformable_sample": 4.0,
    "tokenizer": 5.0,
    "generate": 5.0,
    "end_to_end": 2.0,
    "train": 2.0,
    "pixel_decoder": 1.0,
    "decode_attention": 1.0,
    "sample_token": 1.0,
    "patch_embed": 1.0,
    "add_norm": 1.0,
    "linear": 1.0,
    "linear_cross_entropy": 1.0,
}
# Seconds reserved for the report, which only reads files.
REPORT = 20.0
# A part with less time than this is not started: starting Python and torch alone takes half of it.
LEAST = 10.0
GRACE = 5.0


@dataclass(frozen=True)
class Part:
    """One process: its name, its command, and its time limit.

    ``{seconds}`` in the command is replaced by the limit, less the time to start and to end.
    """

    name: str
    command: tuple[str, ...]
    # The largest share of the whole time; and a weight, by which the remaining time is divided
    # among the parts that have a weight and have not run.
    share: float = 1.0
    weight: float = 0.0
    # Run it however little time is left.
    always: bool = False


@dataclass(frozen=True)
class Ended:
    name: str
    how: str
    seconds: float

    @property
    def well(self) -> bool:
        return self.how == "done"


def parts() -> list[Part]:
    """Return all parts, in order."""
    found = importlib.util.find_spec("xdist") is not None
    several = ("-n", str(TEST_PROCESSES)) if found else ()
    files = [
        Part(name, (*BENCH, f"benchmarks/bench_{name}.py"), weight=weight)
        for name, weight in BENCHMARKS.items()
    ]
    return [
        # Tests, tuning and benchmarks compile missing kernels on one core each.
        Part("compile", (sys.executable, str(HERE / "gpu_report.py"), "--compile"), 0.25),
        Part("tests", (*PYTEST, "-m", "gpu", *several, *TESTS), 0.3),
        Part("tune", (*MODULE, "vfmtok_fast", "tune", "--seconds", "{seconds}"), 0.2),
        *files,
        Part("report", (sys.executable, str(HERE / "report.py")), always=True),
    ]


def run(
    todo: Sequence[Part],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    runner: Callable[[Sequence[str], float], str] | None = None,
    note: Callable[[list[Ended]], None] = lambda ended: None,
) -> list[Ended]:
    """Run parts in order until ``seconds`` have passed.

    Args:
        todo: the parts.
        seconds: the limit for all parts together.
        clock: returns seconds since a fixed moment.
        runner: runs a command with a time limit, and returns how it ended.
        note: called after each part with how the parts have ended so far.

    Returns:
        How each part ended: "done", "exit 3", "cut off after 90 s", "did not fit".
    """
    runner = runner or run_process
    start = clock()
    ended: list[Ended] = []
    for i, part in enumerate(todo):
        left = seconds - (clock() - start)
        if part.always:
            limit = max(left, REPORT)
        else:
            limit = min(part.share * seconds, left - REPORT)
        if part.weight:
            limit *= part.weight / sum(other.weight for other in todo[i:])
        began = clock()
        if limit < LEAST:
            how = "did not fit"
        else:
            print(f"== {part.name}, at most {limit:.0f} s", flush=True)
            inner = max(1.0, limit - LEAST)
            how = runner([word.format(seconds=f"{inner:.0f}") for word in part.command], limit)
        ended.append(Ended(part.name, how, round(clock() - began, 1)))
        print(f"== {part.name}: {how}, {ended[-1].seconds:.0f} s", flush=True)
        note(ended)
    return ended


def run_process(command: Sequence[str], limit: float) -> str:
    """Run a command in its own process group, and leave no process behind."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        return "done" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        # An interrupt lets pytest print its results so far; it may hang where no signal reaches it.
        end_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"cut off after {limit:.0f} s"
    finally:
        end_group(process, signal.SIGKILL)
        process.wait()


def end_group(process: subprocess.Popen, number: int) -> None:
    # The group's id is its leader's pid, which is not reused while the group has processes.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def compile_all() -> int:
    """Compile the kernels of the calls in `aot_calls`, with this GPU's defaults, on all cores."""
    import torch
    from aot_calls import CALLS

    from vfmtok_fast.kernels import tuning
    from vfmtok_fast.tuner.compile import compile_in_processes, launches, spaces

    major, minor = torch.cuda.get_device_capability()
    chip = 10 * major + minor
    jobs, alone = [], []
    with tuning.pretend(chip):
        for call in CALLS:
            # Any space of the call's kernels will do: its default launches only defaults.
            space = next(iter(spaces(call.op).values()), None)
            if space is None:
                alone.append(call)
            else:
                default = space.default(torch.device("cpu"))
                jobs.append((call, space.name, default._asdict()))
    problems = 0
    waiting = compile_in_processes(jobs, chip)
    try:
        for (call, _, _), problem in waiting:
            print(f"{call}: {problem or 'compiled'}", flush=True)
            problems += bool(problem)
    finally:
        waiting.close()
    for call in alone:
        launches(call, chip)
        print(f"{call}: compiled", flush=True)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="run all that needs a GPU, within a time limit")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all of it")
    parser.add_argument("--compile", action="store_true", help="only compile the kernels")
    args = parser.parse_args()
    if args.compile:
        return 1 if compile_all() else 0
    if args.seconds < REPORT + LEAST:
        parser.error(f"--seconds must be at least {REPORT + LEAST:.0f}")

    import harness

    if not harness.GPU:
        parser.error("there is no CUDA device here; `make bench` and `make test` need none")
    summary = harness.RESULTS / "gpu-report.json"
    # Passed on as an absolute path: a relative one would mean another place in another folder.
    os.environ["RESULTS"] = str(harness.RESULTS)

    def note(ended: list[Ended]) -> None:
        content = {"seconds": args.seconds, "parts": [asdict(part) for part in ended]}
        harness.write_json(summary, content)

    # SIGTERM must also end the running part, which is in a process group of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ended = run(parts(), args.seconds, note=note)
    bad = [part for part in ended if not part.well]
    print(f"== wrote {summary}")
    for part in bad:
        print(f"== not done: {part.name} ({part.how})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
