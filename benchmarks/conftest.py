"""Let the benchmarks import `harness`, and write each record when it is made.

Providers under torch.compile run last in each file and have their own time limit. If one takes
longer or does not compile, it is recorded as not measured and does not fail the run.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Add only this folder: with the repository root on the path, kernels/ would hide another package.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from bounds import bound, duration

said: list[str] = []
table: list[dict] = []


def is_compiled(item: pytest.Item) -> bool:
    """Whether a benchmark measures code from torch.compile, judging by its provider's name."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "compiled" in str(callspec.params.get("provider", ""))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (files.index(item.path), is_compiled(item)))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.clock))


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in code that runs longer; without timer signals, let it run."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(signum: int, frame: object) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    start = time.monotonic()
    # Repeat the signal: an `except` somewhere may swallow the first one.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if time.monotonic() - start > seconds + 1:
        raise TimeoutError(f"it took longer than {seconds:g} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if not is_compiled(item):
        return (yield)
    try:
        with limit(harness.COMPILED_SECONDS):
            return (yield)
    except AssertionError:
        raise  # A wrong value is a failure, whatever provider it comes from.
    except Exception as error:  # noqa: BLE001 Whatever a compiler raises costs only this record.
        lines = str(error).strip().splitlines() or [""]
        pytest.skip(f"{type(error).__name__}: {lines[0]:.200}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    if report.failed:
        harness.session.failed.append(name)
    elif report.skipped:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        harness.session.not_measured[name] = reason


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    session = harness.session
    before = len(session.records), len(session.failed) + len(session.not_measured)
    done = yield
    if len(session.failed) + len(session.not_measured) > before[1]:
        del session.records[before[0] :]
    table.extend(session.records[before[0] :])
    last = nextitem is None or nextitem.path != item.path
    option = item.config.option
    part = bool(option.keyword or option.markexpr or "::" in "".join(item.config.args))
    if part and harness.RESULTS == harness.COMMITTED:
        # The committed results cover the whole file, so a part must not replace them.
        if last and session.records:
            said.append(f"No results of {item.path.name} written: a part of it was selected.")
    else:
        paths = session.write(complete=last and not part)
        if last:
            said.extend(f"wrote {path}" for path in paths)
    if last:
        said.extend(f"failed, so not in the results: {name}" for name in session.failed)
        session.clear()
    return done


def pytest_benchmark_group_stats() -> list:
    """Replace pytest-benchmark's table, which uses one unit from microseconds to minutes."""
    return []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [("op", "shape", "provider", "median", "range", "rounds", "x reference", "bound")]
    found = {(r["op"], r["shape"], r["provider"]): r["median_us"] for r in table}
    for r in table:
        times = duration(r["median_us"]), f"{duration(r['min_us'])} to {duration(r['max_us'])}"
        base = found.get((r["op"], r["shape"], "reference"))
        ratio = f"{base / r['median_us']:.2f}" if base else ""
        name = r["op"], r["shape"], r["provider"]
        bounded = bound(r["percent_of_copy"], r["percent_of_matmul"])
        rows.append((*name, *times, str(r["rounds"]), ratio, bounded))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if table else ():
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
    for line in said:
        terminalreporter.write_line(line)
