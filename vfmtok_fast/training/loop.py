"""A run: steps over an input, seen while they go, and never lost."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cache.store import LocalPlace
from ..images import to_float
from ..visualize import reconstruction_grid
from . import checkpoints, processes
from .data import Pictures
from .trainer import NotFinite, TokenizerTrainer

CHECKPOINTS, LOG, PICTURES = "checkpoints", "log.jsonl", "pictures"
# Pictures and regions of the grids.
SHOWN, REGIONS = 4, 5
# What a scheduler sends before it takes the machine away, and what a user does.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Called with a line of the log.
Report = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """A signal came; the run was saved. ``number`` is the signal's."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved {path}")
        self.number = number


@dataclass
class Run:
    """A trainer, its pictures and the folder that the run lies in.

    The folder gets ``checkpoints/step-*.pt``, ``log.jsonl`` and ``pictures/step-*.png``: original,
    reconstruction by the averaged weights, and where regions look.

    Args:
        trainer, pictures: of this process.
        out: the folder.
        steps: at which the run ends.
        save_every, log_every, show_every: steps; 0 shows nothing.
        keep: checkpoints that stay.
        arguments: stored with a checkpoint, and compared when a run goes on.
        reports: each is called with each line of the log.
    """

    trainer: TokenizerTrainer
    pictures: Pictures
    out: Path
    steps: int
    save_every: int = 5000
    log_every: int = 50
    show_every: int = 1000
    keep: int = 3
    arguments: dict[str, Any] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)

    def resume(self, *, changed: bool = False) -> Path | None:
        """Go on from the folder's newest checkpoint; None if there is none.

        Raises:
            ValueError: the model, or unless ``changed`` a setting or an argument, is another.
        """
        path = checkpoints.latest(self.out / CHECKPOINTS)
        if path is None:
            return None
        state = checkpoints.load(path)
        before = state["arguments"]
        names = [name for name in self.arguments if before.get(name) != self.arguments[name]]
        if names and not changed:
            differ = (f"{n} was {before.get(n)!r}, is {self.arguments[n]!r}" for n in names)
            raise ValueError(f"resuming {path}: {', '.join(differ)}")
        self.trainer.load_state_dict(state["trainer"], changed=changed)
        return path

    def save(self) -> Path:
        """Write a checkpoint of now; of several processes the first one does."""
        if processes.rank():
            return self.out / CHECKPOINTS
        state = {"trainer": self.trainer.state_dict(), "arguments": self.arguments}
        return checkpoints.save(self.out / CHECKPOINTS, self.trainer.steps, state, self.keep)

    def train(self) -> None:
        """Step by step to the end; the last state is saved.

        Raises:
            NotFinite: told with the pictures of that batch; the state before it is saved.
            Stopped: by a signal, after the step that it met; that state is saved.
        """
        trainer, device = self.trainer, self.trainer.model.device
        LocalPlace(self.out).make_folder()
        shown = self._shown() if self.show_every and processes.rank() == 0 else None
        batches = self.pictures.batches(trainer.steps)
        sums, waited, start = {}, 0.0, time.perf_counter()
        with contextlib.closing(batches), _signals() as came:
            while trainer.steps < self.steps:
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                try:
                    terms = trainer.step(to_float(batch.images.to(device)))
                except NotFinite as error:
                    path, paths = self.save(), processes.gather(batch.paths)
                    self._write({"step": trainer.steps + 1, "not_finite": paths})
                    raise NotFinite(
                        f"{error}; the batch's {len(paths)} pictures stand in {self.out / LOG}; "
                        f"the state before it is {path}"
                    ) from error
                for name, value in terms.items():
                    sums.setdefault(name, []).append(value)
                # A signal may reach one process only, and all must stop at the same step.
                flag = torch.tensor(came[0] if came else 0, device=device)
                number, stop = trainer.steps, int(processes.largest(flag))
                last = number == self.steps or stop > 0
                if number % self.log_every == 0 or last:
                    seconds = time.perf_counter() - start
                    self._log(sums, seconds, waited)
                    sums, waited, start = {}, 0.0, time.perf_counter()
                if shown is not None and (number % self.show_every == 0 or last):
                    self._show(shown)
                if number % self.save_every == 0 or last:
                    path = self.save()
                if stop:
                    raise Stopped(stop, path)

    def _log(self, sums: dict[str, list[float]], seconds: float, waited: float) -> None:
        """A line with the mean of each term since the last one."""
        count = len(sums["total"])
        line: dict[str, Any] = {
            "step": self.trainer.steps,
            "epoch": round(self.trainer.steps / self.pictures.steps_per_epoch, 4),
            "images": self.trainer.images,
            **{name: sum(values) / len(values) for name, values in sums.items()},
            "lr": sums["lr"][-1],
            "usage": sums["usage"][-1],
            "images_per_second": count * self.pictures.batch_size / seconds,
            "data_share": waited / seconds,
            "bad_pictures": len(self.pictures.bad),
        }
        if self.trainer.model.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(line)
        for report in self.reports:
            report(line)

    def _write(self, line: dict[str, Any]) -> None:
        if processes.rank() == 0:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _shown(self) -> Tensor:
        """A few pictures of the input, the same at every time."""
        places = [number * len(self.pictures.entries) // SHOWN for number in range(SHOWN)]
        return to_float(np.stack([self.pictures.centre(place) for place in places]))

    def _show(self, images: Tensor) -> None:
        regions = min(REGIONS, self.trainer.model.config.num_regions)
        grid = reconstruction_grid(self.trainer.ema, images, regions)
        folder = LocalPlace(self.out / PICTURES)
        folder.make_folder()
        with (folder / f"step-{self.trainer.steps:08d}.png").writing() as file:
            Image.fromarray(grid).save(file, format="PNG")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect signals for the time of a block; a second one does what it would have done."""
    came: list[int] = []
    before = {}

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    try:
        for number in SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread, which alone hears signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
