"""Lets the benchmarks import `harness`, and writes the results of each file that ran as a whole."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Only this folder: with the repository's root on the path, kernels/ would hide another package.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

said: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.clock))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        harness.session.failed.append(report.nodeid.partition("::")[2])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    records, failed = harness.session.records, harness.session.failed
    before = len(records), len(failed)
    done = yield
    if len(failed) > before[1]:
        del records[before[0] :]
    if nextitem is None or nextitem.path != item.path:
        finish(item)
    return done


def finish(last: pytest.Item) -> None:
    """Write what the file of this item measured, and forget it."""
    records, failed = harness.session.records, harness.session.failed
    option = last.config.option
    if not (option.keyword or option.markexpr):
        said.extend(f"wrote {path}" for path in harness.session.write())
    elif records:
        said.append(f"No results of {last.path.name} written: a part of it was selected.")
    said.extend(f"failed, so not in the results: {name}" for name in failed)
    records.clear()
    failed.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in said:
        terminalreporter.write_line(line)
