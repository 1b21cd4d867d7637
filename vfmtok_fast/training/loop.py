"""A training run: steps over an input, with a log, sample images and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import switch
from ..cache.format.differences import differences
from ..cache.store import CacheWriteError, LocalPlace
from ..generator.decoder import Kept
from ..images import image_grid, to_float
from ..tokenizer import VFMTok
from ..visualize import reconstruction_grid
from . import checkpoints, processes
from .data import Batch, Order, Pictures
from .signals import collected
from .trainer import ACCEPT, NotFinite, Trainer

CHECKPOINTS, LOG, PICTURES = "checkpoints", "log.jsonl", "pictures"
# Images and regions in a tokenizer's grids, and columns (and rows) in a generator's.
SHOWN, REGIONS, COLUMNS = 4, 5, 4

# Called with each line of the log.
Report = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """A signal arrived and the run was saved. ``number`` is the signal's number."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved {path}")
        self.number = number


class Data(Protocol):
    """Training data of a run: `Pictures`, `OnlineCodes` or `Codes`."""

    order: Order

    def batches(self, done: int) -> Iterator[Batch]: ...

    def arguments(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]: ...

    def progress(self, images: int) -> dict[str, float]: ...


@dataclass
class Run:
    """A trainer, its data and the folder of the run.

    The run writes ``checkpoints/step-*.pt``, ``log.jsonl`` and ``pictures/step-*.png`` there.

    Args:
        trainer, data: those of this process.
        out: folder of the run.
        steps: step at which the run ends.
        save_every, log_every, show_every: intervals in steps; ``show_every=0`` shows nothing.
        keep: how many checkpoints to keep.
        show: makes an image, uint8 [H, W, 3], from the averaged model; None shows nothing.
        flops: FLOPs of a step per image, for ``mfu`` in the log.
        peak: FLOP/s of all processes' devices together; ``mfu`` is the share of it that is reached.
        arguments: stored with each checkpoint and compared when a run is resumed.
        reports: functions that are called with each line of the log.
    """

    trainer: Trainer
    data: Data
    out: Path
    steps: int
    save_every: int = 5000
    log_every: int = 50
    show_every: int = 1000
    keep: int = 3
    show: Callable[[nn.Module], np.ndarray] | None = None
    flops: float | None = None
    peak: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    # Number of steps in the newest checkpoint, or at the start of training.
    _saved: int = field(default=0, init=False, repr=False)

    def resume(self, *, changed: bool = False) -> Path | None:
        """Resume from the folder's newest checkpoint and return its path; None if there is none.

        Raises:
            ValueError: the model differs, or a setting or an argument does and ``changed`` is
                false; the file is not a checkpoint of a run, or is not the same for all processes.
        """
        path = checkpoints.latest(self.out / CHECKPOINTS)
        newest = processes.gather([path and path.name])
        if len(set(newest)) > 1:
            raise ValueError(
                f"{self.out}: must be on a disk that all processes share; their newest "
                f"checkpoints there are {', '.join(map(str, newest))}"
            )
        if path is None:
            return None
        state = checkpoints.load(path)
        if not isinstance(state, dict) or not {"trainer", "arguments"} <= state.keys():
            raise ValueError(
                f"{path}: not a checkpoint of a run; remove it to resume from the previous one"
            )
        # Arguments that the checkpoint does not have are not changes.
        before = {name: state["arguments"].get(name, own) for name, own in self.arguments.items()}
        if (problems := differences(before, self.arguments)) and not changed:
            raise ValueError(f"resuming {path}: {problems}; {ACCEPT}")
        self.trainer.load_state_dict(state["trainer"], changed=changed)
        return path

    def save(self) -> Path:
        """Write a checkpoint of the current state; of several processes, only the first writes."""
        state = {"trainer": self.trainer.state_dict(), "arguments": self.arguments}
        path = self.out / CHECKPOINTS
        if processes.rank() == 0:
            path = checkpoints.save(path, self.trainer.steps, state, self.keep)
        self._saved = self.trainer.steps
        return path

    def train(self) -> None:
        """Train until the last step, and save the final state.

        Raises:
            NotFinite: a loss or gradient was not finite. The batch's images are logged, and the
                state before it is saved.
            Stopped: a signal arrived. The step at hand was finished, and its state is saved.

        With one process, any other error while reading or showing is raised after saving the
        state.
        """
        trainer = self.trainer
        LocalPlace(self.out).make_folder()
        self._begin_log()
        batches = self.data.batches(trainer.steps)
        sums: dict[str, list[float]] = {}
        self._saved = trainer.steps
        trainer.clock.read()
        with contextlib.closing(batches), collected() as came:
            while trainer.steps < self.steps:
                with self._saving(), trainer.clock.stage("data"):
                    batch = next(batches)
                for name, value in self._step(batch).items():
                    sums.setdefault(name, []).append(value)
                # A signal may reach only one process, but all must stop at the same step.
                flag = torch.tensor(came[0] if came else 0, device=trainer.device)
                number, stop = trainer.steps, int(processes.largest(flag))
                last = number == self.steps or stop > 0
                if number % self.log_every == 0 or last:
                    self._log(sums)
                    sums = {}
                # Save before showing anything: showing takes time, which a signal may not leave.
                if number % self.save_every == 0 or last:
                    path = self.save()
                if stop:
                    raise Stopped(stop, path)
                if self.show and self.show_every and (number % self.show_every == 0 or last):
                    with self._saving():
                        self._show()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Wrap what happens between steps: if it fails, the steps done so far are saved."""
        try:
            yield
        except Exception:
            # With several processes, the others cannot know of the error.
            if processes.world_size() == 1 and self.trainer.steps > self._saved:
                self.save()
            raise

    def _step(self, batch: Batch) -> dict[str, float]:
        try:
            with self.trainer.clock.stage("codes"):
                arguments = self.data.arguments(batch, self.trainer.device)
            return self.trainer.step(*arguments)
        except NotFinite as error:
            path, paths = self.save(), processes.gather(batch.paths)
            self._write({"step": self.trainer.steps + 1, "not_finite": paths})
            raise NotFinite(
                f"{error}; the batch's {len(paths)} pictures are listed in {self.out / LOG}; "
                f"the state before it is {path}"
            ) from error

    def _log(self, sums: dict[str, list[float]]) -> None:
        """Log a line with the mean of each term since the last line."""
        trainer, order = self.trainer, self.data.order
        count = max(map(len, sums.values()))
        seconds, shares = trainer.clock.read()
        rate = count * order.batch_size / seconds
        line: dict[str, Any] = {
            "step": trainer.steps,
            "epoch": round(trainer.steps / order.steps_per_epoch, 4),
            "images": trainer.images,
            **{name: _mean(values) for name, values in sums.items()},
            **{name: sums[name][-1] for name in ("lr", "usage") if name in sums},
            **trainer.left_out(sums),
            **trainer.report(),
            **self.data.progress(trainer.images),
            **trainer.rates(rate),
            **{f"{name}_share": share for name, share in shares.items()},
        }
        if self.flops is not None and self.peak is not None:
            line["mfu"] = rate * self.flops / self.peak
        if trainer.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
        self._write(line)
        for report in self.reports:
            report(line)

    def _begin_log(self) -> None:
        """Keep the lines of steps that are done; drop those that come again or were cut off."""
        if processes.rank():
            return
        path, kept = LocalPlace(self.out / LOG), []
        if path.exists():
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if line["step"] <= self.trainer.steps or "not_finite" in line:
                        kept.append(f"{text}\n")
        path.put("".join(kept).encode())

    def _write(self, line: dict[str, Any]) -> None:
        if processes.rank():
            return
        try:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CacheWriteError(self.out / LOG, error) from error

    def _show(self) -> None:
        # All processes must call `averaged` on a sharded model.
        if processes.rank() and not self.trainer.sharded:
            return
        model = self.trainer.averaged()
        if processes.rank():
            return
        picture = Image.fromarray(self.show(model))
        folder = LocalPlace(self.out / PICTURES)
        folder.make_folder()
        with (folder / f"step-{self.trainer.steps:08d}.png").writing() as file:
            picture.save(file, format="PNG")


def _mean(values: list[float]) -> float | None:
    """Mean of the finite values: with float16 some steps have no norm."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def reconstructions(pictures: Pictures) -> Callable[[nn.Module], np.ndarray]:
    """Return a function that shows reconstructions of a few fixed images and where regions look."""
    places = [number * len(pictures.entries) // SHOWN for number in range(SHOWN)]
    images = to_float(np.stack([pictures.centre(place) for place in places]))

    def show(model: nn.Module) -> np.ndarray:
        with switch.enable(()):  # No CUDA graphs: the weights change at the next step.
            return reconstruction_grid(model, images, min(REGIONS, model.config.num_regions))

    return show


def generated(tokenizer: VFMTok, cfg_scale: float = 1.5) -> Callable[[nn.Module], np.ndarray]:
    """Return a function that shows images generated for the first classes with fixed noise."""

    def show(model: nn.Module) -> np.ndarray:
        classes = torch.arange(COLUMNS**2) % min(model.config.num_classes, COLUMNS**2)
        codes = model.generate(classes, cfg_scale)
        # The copy to the host waits for all work that needs the keys, values and graphs.
        pictures = tokenizer.decode_to_uint8(codes, tokenizer.config.image_size).cpu()
        model.kept = Kept()  # Otherwise they would stay for the rest of the run.
        return image_grid(pictures, columns=COLUMNS)

    return show
