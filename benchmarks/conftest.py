"""Lets the benchmarks import `harness`, and writes the results of a complete, passing run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Only this folder: with the repository's root on the path, kernels/ would hide another package.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.clock))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not harness.session.records:
        return
    option = session.config.option
    if exitstatus != 0 or option.keyword or option.markexpr:
        print("\nNo results written: not all benchmarks ran, or one of them failed.")
        return
    for path in harness.session.write():
        print(f"\nwrote {path}")
