"""Timing of calls: device time with overwritten caches on a GPU, wall time on a CPU.

On a GPU a call is captured in a CUDA graph. The L2 cache is overwritten before each replay, and
events time the replay. A call that cannot be captured is timed with events alone, and the result
says so. Triton is not needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Larger than any last-level cache that it has to flush. A GPU writes this in about 80 us. The call
# is queued during that time, so launch overhead does not count.
FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 128 * 2**20}
# At least this many rounds are timed, even past the time limit.
FEWEST = {"cuda": 5, "cpu": 3}

Function = Callable[[], object]


def time_rounds(
    fn: Function,
    device: str | torch.device,
    rounds: int,
    seconds: float | None = None,
    replay: bool = True,
) -> tuple[list[float], str]:
    """Time a call repeatedly.

    Args:
        fn: the call, without arguments; on a CPU it must have run before.
        device: where it runs.
        rounds: how often it is timed at most.
        seconds: stop after about this time; None runs all rounds.
        replay: capture the call in a CUDA graph where possible.

    Returns:
        Seconds of each round, and how they were measured: "graph replay", "events" or "wall".
    """
    (times,), how = _turns([fn], torch.device(device), rounds, seconds, replay)
    return times, how


def time_in_turns(
    functions: Sequence[Function], device: str | torch.device, rounds: int
) -> tuple[list[list[float]], str]:
    """Time several calls one after another in each round, so that clock drift affects all of them.

    Args:
        functions: the calls, without arguments; on a CPU each must have run before.
        device: where they run.
        rounds: how often each is timed.

    Returns:
        Seconds of each round for each function, and how they were measured, as in `time_rounds`;
        "graph replay and events" where only some could be captured.
    """
    return _turns(functions, torch.device(device), rounds, None, True)


def _turns(
    functions: Sequence[Function],
    device: torch.device,
    rounds: int,
    seconds: float | None,
    replay: bool,
) -> tuple[list[list[float]], str]:
    if rounds < 1:
        raise ValueError(f"timing: rounds must be at least 1, got {rounds}")
    if device.type != "cuda":
        return _rounds(functions, _wall, device, rounds, seconds), "wall"
    with torch.cuda.device(device):
        calls, how = [], set()
        # One pool for all graphs: they never run at the same time and nobody reads their outputs.
        pool = torch.cuda.graph_pool_handle()
        for fn in functions:
            fn()
            captured = capture(fn, pool) if replay else None
            calls.append(captured or fn)
            how.add("graph replay" if captured else "events")
        times = _rounds(calls, _events, device, rounds, seconds)
    return times, " and ".join(sorted(how, reverse=True))


def _rounds(
    calls: Sequence[Function],
    timer: Callable[[Function], float],
    device: torch.device,
    rounds: int,
    seconds: float | None,
) -> list[list[float]]:
    flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for done in range(rounds):
        late = seconds is not None and time.perf_counter() - begin >= seconds
        if late and done >= FEWEST[device.type]:
            break
        for call, of_it in zip(calls, times, strict=True):
            flush.zero_()
            of_it.append(timer(call))
    return times


def _wall(call: Function) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events(call: Function) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(fn: Function, pool: Any = None) -> Function | None:
    """Return the replay of the call's CUDA graph, or None if the call cannot be captured."""
    torch.cuda.synchronize()
    here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            fn()
    except RuntimeError:
        torch.cuda.set_stream(here)  # torch stays on its own stream if a capture is broken.
        torch.cuda.synchronize()
        return None
    return graph.replay
