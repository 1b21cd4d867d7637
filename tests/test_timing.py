"""The timer: in turns, as often as requested, with the caches overwritten before each call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vfmtok_fast import timing


@pytest.fixture(autouse=True)
def small_flush(monkeypatch):
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 4096)


class Clock:
    """A clock that only the test's calls advance."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, seconds: float, notes: list[str], name: str):
        def run() -> None:
            notes.append(name)
            self.now += seconds

        return run


def test_turns_go_round_and_each_time_is_its_own(monkeypatch):
    clock, notes = Clock(monkeypatch), []
    calls = [clock.call(2.0, notes, "a"), clock.call(0.5, notes, "b")]
    times, how = timing.time_in_turns(calls, torch.device("cpu"), 3)
    assert how == "wall" and notes == ["a", "b"] * 3
    assert times == [[2.0] * 3, [0.5] * 3]


def test_the_cache_is_overwritten_before_each_call_and_that_does_not_count(monkeypatch):
    clock, notes = Clock(monkeypatch), []

    class Flush:
        def zero_(self) -> None:
            notes.append("flush")
            clock.now += 100.0

    monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: Flush())
    times, _ = timing.time_rounds(clock.call(1.0, notes, "call"), "cpu", 2)
    assert times == [1.0, 1.0] and notes == ["flush", "call"] * 2


@pytest.mark.parametrize(("seconds", "count"), [(None, 9), (5.0, 5), (0.1, 3), (100.0, 9)])
def test_it_stops_in_time_but_not_before_a_few_rounds(monkeypatch, seconds, count):
    clock = Clock(monkeypatch)
    times, how = timing.time_rounds(clock.call(1.0, [], ""), "cpu", 9, seconds)
    assert len(times) == count and how == "wall"


def test_no_rounds_is_an_error():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.time_rounds(lambda: None, "cpu", 0)


def test_triton_is_not_imported():
    code = "import sys, vfmtok_fast.timing; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.gpu
def test_a_gpu_replays_graphs_and_says_what_it_could_not_capture():
    x = torch.ones(2**20, device="cuda")
    times, how = timing.time_rounds(lambda: x.mul_(1), "cuda", 6)
    assert how == "graph replay" and len(times) == 6 and min(times) > 0
    times, how = timing.time_in_turns([lambda: x.mul_(1), lambda: x.sum().item()], "cuda", 6)
    assert how == "graph replay and events" and [len(t) for t in times] == [6, 6]
    assert timing.time_rounds(lambda: x.mul_(1), "cuda", 6, replay=False)[1] == "events"
