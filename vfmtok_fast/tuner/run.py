"""`tune`: measure the kernel settings on this machine's GPU and keep the best.

A launch that only compiles shows which `Space`s a model's call looks up. Other processes then
compile every setting, which needs no GPU. Each setting's result is checked against the op's oracle.
Settings are timed in turns, as CUDA graph replays after the cache was overwritten. A setting
replaces the default only if it is faster by more than noise. Finally the op is timed against its
reference, so that `enable` can skip kernels that would be slower.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import switch, timing
from ..errors import first_line
from ..generator import GPT, GPTConfig
from ..generator.config import PRESETS
from ..tokenizer import VFMTok, VFMTokConfig
from . import calls, oracles
from .calls import Call
from .compile import Job, asked_spaces, compile_in_processes, spaces

# Smaller gains count as noise, and the default stays.
NOISE = 0.02
# Settings slower than the fastest by this factor in the first turns are not timed again.
CLOSE = 1.15
TURNS, MORE_TURNS = 5, 20

Timer = Callable[[Sequence[Callable[[], object]], int], list[float]]


@dataclass
class Outcome:
    """What a run measured: table rows, failed settings with the reason, and calls not reached."""

    path: Path
    settings: list[dict[str, Any]] = field(default_factory=list)
    ops: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.settings)} settings, {len(self.ops)} ops measured"]
        for row in self.settings:
            gain = row["default_us"] / row["us"]
            took = ", ".join(f"{name}={value}" for name, value in row["take"].items())
            lines.append(
                f"  {row['space']} ({row['kind']}, {row['size']}): {row['us']:.1f} us, "
                f"{gain:.2f} x the default: {took}"
            )
        for row in self.ops:
            gain = row["reference_us"] / row["us"]
            takes = "" if gain >= 1 else "; enable() takes the reference"
            lines.append(
                f"  {row['op']} ({row['kind']}, {row['size']}): {row['us']:.1f} us, "
                f"{gain:.2f} x the reference{takes}"
            )
        lines += [f"  failed: {why}" for why in self.failed]
        lines += [f"  not reached in time: {what}" for what in self.not_reached]
        return "\n".join(lines)


def tune(
    models: str | VFMTok | GPT | Iterable[str | VFMTok | GPT] | None = None,
    ops: str | Iterable[str] | None = None,
    seconds: float = 120,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    path: str | os.PathLike | None = None,
) -> Outcome:
    """Measure this GPU's settings for some models, and save them for every later process.

    The table is written after each call is finished, so an interrupted run keeps its results so
    far. Rows of other models already in the table are kept.

    Args:
        models: a `VFMTok`, a `GPT`, "VFMTok", the name of a generator such as "GPT-L", or several
            of these. "all" means all published models, None the tokenizer and GPT-L.
        ops: measure only these ops; None means all.
        seconds: approximate time limit.
        device: which GPU; the current one by default.
        progress: show a progress bar.
        path: write here instead of to ``$XDG_CACHE_HOME/vfmtok_fast/tuned/<card>.json``.

    Returns:
        The measurements; print them for a summary.

    Raises:
        ValueError: no GPU, an unknown model or op, seconds that are not positive.
    """
    every, names = calls.model_calls(*_models(models)), switch.names_of("tune", ops)
    todo = [call for call in every if call.op in names]
    if not seconds > 0:
        raise ValueError(f"tune: seconds must be positive, got {seconds}")
    if not torch.cuda.is_available():
        raise ValueError("tune: it measures an NVIDIA GPU, and torch finds none here")
    try:
        device = torch.device(device or "cuda")
    except RuntimeError as error:
        raise ValueError(f"tune: device must be a GPU such as cuda:0, got {device!r}") from error
    if device.type != "cuda":
        raise ValueError(f"tune: device must be a GPU such as cuda:0, got {device}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Launches, timers and events use the current device.
    with torch.cuda.device(device):
        table = None if path is None else Path(os.path.expanduser(path))
        return Tuner(device, path=table).run(todo, seconds, progress)


def _models(models: Any) -> tuple[VFMTokConfig | None, list[tuple[str, GPTConfig]]]:
    if models is None:
        models = ("VFMTok", "GPT-L")
    if isinstance(models, str | nn.Module):
        models = (models,)
    if not isinstance(models, Iterable):
        raise TypeError(f"tune: models must be models or their names, got {models!r}")
    models = list(models)
    if models == ["all"]:
        models = ["VFMTok", *PRESETS]
    tokenizer, generators = None, []
    for model in models:
        if isinstance(model, VFMTok) or model == "VFMTok":
            tokenizer = VFMTokConfig() if model == "VFMTok" else model.config
        elif isinstance(model, GPT):
            generators.append((f"GPT {model.config.num_layers}x{model.config.dim}", model.config))
        elif model in PRESETS:
            generators.append((model, GPTConfig.preset(model)))
        else:
            name = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
            raise ValueError(
                f"tune: unknown model {name}; give a model of your own, or a name of "
                f"{['VFMTok', *sorted(PRESETS)]}"
            )
    return tokenizer, generators


class Tuner:
    """One run of `tune`; its parts can be replaced, so that it can be tested without a GPU.

    Args:
        device: the device to measure.
        timer: returns the seconds that each of several functions takes, timed in turns.
        clock: returns seconds since an arbitrary moment.
        compiler: a generator that yields each compiled job with its problem ("" if there was none);
            it starts when the first job is asked for, and closing it ends its processes.
        path: the table; None means the user's table for this card.
    """

    def __init__(
        self,
        device: torch.device,
        timer: Timer | None = None,
        clock: Callable[[], float] = time.monotonic,
        compiler: Callable[[Sequence[Job]], Generator[tuple[Job, str], None, None]] | None = None,
        path: Path | None = None,
    ):
        from triton.errors import TritonError

        from ..kernels import tables, tuning

        self.tables, self.tuning = tables, tuning
        # What a setting may raise if the chip lacks the resources or the compiler rejects it.
        self.failures = (RuntimeError, torch.OutOfMemoryError, TritonError)
        self.device, self.clock = device, clock
        self.timer = timer or self._time
        self.compiler = compiler or self._compile
        self.best: dict[tuple[str, str, int], Any] = {}
        self.card = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} test"
        )
        self.path = path or tables.user_folder() / f"{tables.slug(self.card)}.json"

    def run(self, todo: Sequence[Call], seconds: float, progress: bool = False) -> Outcome:
        """Measure ``todo``, most important first, until ``seconds`` have passed."""
        end = self.clock() + seconds
        outcome = Outcome(self.path)
        chip = self.tuning.capability(self.device)
        asked = {call: asked_spaces(call, chip) for call in todo}
        jobs = [
            (call, name, setting._asdict())
            for call, name in self._news(asked)
            for setting in spaces(call.op)[name].candidates()
        ]
        compiled: dict[tuple[Call, str], list[dict[str, Any]]] = {}
        left = {call: sum(1 for job in jobs if job[0] == call) for call in todo}
        with (
            tqdm(total=len(jobs), unit="setting", disable=not progress, leave=False) as bar,
            contextlib.closing(self.compiler(jobs)) as waiting,
        ):
            for call in todo:
                while left[call] and self.clock() < end:
                    job, problem = next(waiting)
                    bar.update()
                    left[job[0]] -= 1
                    if problem:
                        outcome.failed.append(f"{job[1]} {job[2]}: {problem}")
                    else:
                        compiled.setdefault(job[:2], []).append(job[2])
                if self.clock() >= end:
                    outcome.not_reached.append(str(call))
                    continue
                bar.set_description(str(call))
                try:
                    self._measure(call, asked[call], compiled, outcome)
                except torch.OutOfMemoryError as error:  # A smaller call may still fit.
                    outcome.failed.append(f"{call}: {first_line(error):.200}")
                    torch.cuda.empty_cache()
                self._save(outcome)
        return outcome

    @staticmethod
    def _news(asked: dict[Call, dict[str, tuple[str, int]]]) -> list[tuple[Call, str]]:
        """Return what to measure: the first call to look up each space, kind and size."""
        first: dict[tuple[str, str, int], tuple[Call, str]] = {}
        for call, spaces_of_it in asked.items():
            for name, (kind, size) in spaces_of_it.items():
                first.setdefault((name, kind, size), (call, name))
        return list(first.values())

    def _measure(
        self,
        call: Call,
        asked: dict[str, tuple[str, int]],
        compiled: dict[tuple[Call, str], list[dict[str, Any]]],
        outcome: Outcome,
    ) -> None:
        args, kwargs = call.arguments(self.device)
        oracle = oracles.oracle(call, args, kwargs)
        fast = getattr(switch.kernel(call.op), call.op)

        def run() -> list[Tensor]:
            return call.run(fast, args, kwargs)

        failed = False
        with contextlib.ExitStack() as chosen:
            for name, (kind, size) in asked.items():
                space = spaces(call.op)[name]
                if (name, kind, size) not in self.best:
                    settings = [space.setting(values) for values in compiled.get((call, name), [])]
                    row = self._best(space, settings, run, oracle, outcome)
                    if row is None:
                        failed |= not self._runs(run)
                        continue
                    outcome.settings.append({"space": name, "kind": kind, "size": size, **row})
                    self.best[name, kind, size] = space.setting(row["take"])
                chosen.enter_context(space.using(self.best[name, kind, size]))
            key = getattr(switch.kernel(call.op), "tuning_key", None)
            if key is None or call.backward or failed:
                return
            kind, size = key(*args, **kwargs)
            # If a table cannot distinguish several calls, the first, most important one counts.
            row = {"op": call.op, "kind": kind, "size": size}
            if any(row.items() <= other.items() for other in outcome.ops):
                return
            reference = switch.reference(call.op)
            try:
                us, reference_us = self.timer(
                    [run, lambda: call.run(reference, args, kwargs)], MORE_TURNS
                )
            except torch.OutOfMemoryError:
                return  # The reference does not fit in memory, so there is nothing to compare with.
            outcome.ops.append({**row, "us": _us(us), "reference_us": _us(reference_us)})

    def _runs(self, run: Callable[[], object]) -> bool:
        try:
            run()
        except self.failures:  # The outcome already lists it as a setting that failed.
            return False
        return True

    def _best(
        self,
        space: Any,
        settings: list[Any],
        run: Callable[[], list[Tensor]],
        oracle: Callable[[list[Tensor]], str],
        outcome: Outcome,
    ) -> dict[str, Any] | None:
        """Return the fastest setting and its time, or None if there was no choice."""
        default = space.default(self.device)
        right = []
        for setting in dict.fromkeys([default, *settings]):
            with space.using(setting):
                try:
                    wrong = oracle(run())
                except self.failures as error:
                    wrong = f"{type(error).__name__}: {error}"
            if wrong:
                outcome.failed.append(f"{space.name} {setting._asdict()}: {wrong:.200}")
            else:
                right.append(setting)
        if default not in right or len(right) < 2:
            return None

        def run_with(setting: Any) -> None:
            with space.using(setting):
                run()

        def timed(settings: list[Any], turns: int) -> dict[Any, float]:
            functions = [functools.partial(run_with, setting) for setting in settings]
            return dict(zip(settings, self.timer(functions, turns), strict=True))

        times = timed(right, TURNS)
        close = [s for s in right if s == default or times[s] <= CLOSE * min(times.values())]
        times = timed(close, MORE_TURNS)
        best = min(close, key=times.__getitem__)
        if times[best] > (1 - NOISE) * times[default]:
            best = default
        return {
            "take": best._asdict(),
            "us": _us(times[best]),
            "default_us": _us(times[default]),
        }

    def _save(self, outcome: Outcome) -> None:
        source = "measured by vfmtok_fast.tune"
        content = self.tables.empty(self.card, time.strftime("%Y-%m-%d", time.gmtime()), source)
        content |= {"settings": outcome.settings, "ops": outcome.ops}
        self.tables.save(self.path, content)
        self.tuning.forget_tables()
        switch.new_generation()

    def _time(self, functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
        every, _ = timing.time_in_turns(functions, self.device, rounds)
        return [statistics.median(times) for times in every]

    def _compile(self, jobs: Sequence[Job]) -> Generator[tuple[Job, str], None, None]:
        """Compile in order as far as possible, with one process fewer than there are cores."""
        return compile_in_processes(jobs, self.tuning.capability(self.device))


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
