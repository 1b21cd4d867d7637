"""Progress of a command, on a terminal and in a log."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vfmtok_fast import bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, hidden: bool = False) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    with bars.bar(6, "img", "cache", done=1, hidden=hidden) as shown:
        for step in range(5):
            shown.set_postfix_str(f"step {step}", refresh=False)
            shown.update(1)
    return stderr.getvalue()


def test_a_terminal_has_a_bar(monkeypatch):
    text = run(monkeypatch, Terminal())
    assert "\r" in text and "cache: 100%" in text and "6/6" in text


def test_a_log_has_whole_lines(monkeypatch):
    monkeypatch.setattr(bars, "INTERVAL", 0)
    lines = run(monkeypatch, io.StringIO()).split("\n")
    assert lines.pop() == "" and len(lines) >= 6 and not any("\r" in line for line in lines)
    assert re.match(r"cache: 6/6 img \[00:\d\d<00:00.*step 4\]", lines[-1])


def test_a_log_has_nothing_of_what_is_done_within_a_minute(monkeypatch):
    assert run(monkeypatch, io.StringIO()) == ""


def test_nothing_is_told_where_nobody_is(monkeypatch):
    assert run(monkeypatch, Terminal(), hidden=True) == ""
    monkeypatch.setattr(sys, "stderr", None)
    with bars.bar(6, "img") as shown:
        shown.update(6)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with bars.bar(6, "img") as shown:
        shown.update(6)
