"""Compile the launches of calls for several settings, in processes that need no GPU.

``python -m vfmtok_fast.tuner CHIP`` is such a process. The compiled kernels are left in Triton's
cache, where later launches find them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .. import switch
from .calls import Call

# Prefix of a compiler process's answers.
ANSWER = "vfmtok_fast compiled: "
# A call, the name of a space, and one setting of that space.
Job = tuple[Call, str, dict[str, Any]]


def spaces(op: str) -> dict[str, Any]:
    """Return the spaces of an op's kernels by name."""
    return {space.name: space for space in getattr(switch.kernel(op), "SPACES", ())}


def launches(call: Call, chip: int) -> list[Any]:
    """Compile what a call launches, for a chip that need not be present; return the launches."""
    from ..kernels.compiling import compile_only

    # Under the interpreter there is nothing to compile.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with contextlib.nullcontext([]) if interpreted else compile_only(chip) as found:
        args, kwargs = call.arguments(torch.device("cpu"), empty=True)
        call.run(getattr(switch.kernel(call.op), call.op), args, kwargs)
    return found


def asked_spaces(call: Call, chip: int) -> dict[str, tuple[str, int]]:
    """Return the spaces that a call's launches look up, each with (kind, size), in lookup order."""
    asked: dict[str, tuple[str, int]] = {}
    every = spaces(call.op)
    before = {name: space.at for name, space in every.items()}

    def noting(name: str) -> Callable[..., Any]:
        def at(device: torch.device, kind: str, size: int) -> Any:
            asked[name] = kind, size
            return before[name](device, kind, size)

        return at

    for name, space in every.items():
        space.at = noting(name)
    try:
        launches(call, chip)
    finally:
        for space in every.values():
            del space.at
    return asked


def compile_in_processes(
    jobs: Sequence[Job], chip: int, processes: int | None = None
) -> Generator[tuple[Job, str], None, None]:
    """Fill Triton's cache for ``jobs``; yield each job with its problem, "" if there was none.

    The processes use no GPU, so their default number depends on the CPU cores, not on GPU memory.
    """
    count = max(1, min(processes or (os.cpu_count() or 2) - 1, len(jobs)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "vfmtok_fast.tuner", str(chip)]
    done: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def follow(process: subprocess.Popen, indices: range) -> None:
        for index in indices:
            line = next((line for line in process.stdout if line.startswith(ANSWER)), "")
            answer = line.removeprefix(ANSWER)
            done.put((index, json.loads(answer) if line else "its compiler process ended"))

    workers = []
    for first in range(count):
        indices = range(first, len(jobs), count)
        with tempfile.TemporaryFile("w+") as lines:
            lines.writelines(json.dumps([asdict(jobs[i][0]), *jobs[i][1:]]) + "\n" for i in indices)
            lines.seek(0)
            process = subprocess.Popen(
                command, env=environment, text=True, stdin=lines, stdout=subprocess.PIPE
            )
        workers.append(process)
        threading.Thread(target=follow, args=(process, indices), daemon=True).start()
    try:
        for _ in jobs:
            index, problem = done.get()
            yield jobs[index], problem
    finally:
        for process in workers:
            process.kill()
            process.wait()


def compile_call(call: Call, name: str, values: dict[str, Any], chip: int) -> str:
    """Compile one job in this process; return the problem, "" if there was none."""
    from triton.errors import TritonError

    space = spaces(call.op)[name]
    try:
        with space.using(space.setting(values)):
            launches(call, chip)
    except (RuntimeError, ValueError, TritonError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""
