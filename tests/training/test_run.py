"""Runs: the files they leave, and that nothing which stops a run loses its progress."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.training import (
    NotFinite,
    Pictures,
    Run,
    Stopped,
    TokenizerTrainer,
    checkpoints,
    processes,
    reconstructions,
    signals,
)

Begin = Callable[..., Run]


@pytest.fixture(scope="module")
def begin(make: Callable[..., TokenizerTrainer], photos: Path) -> Begin:
    """``begin(folder, **settings)``: a run of 4 steps over 10 images, 4 at a time."""

    def begin(out: Path, steps: int = 4, **settings) -> Run:
        trainer = make(**{"dropout": 0.2, "discriminator_start": 2, "lr": 1e-3, **settings})
        pictures = Pictures(open_source(photos), 4, size=64, workers=2)
        return Run(
            trainer, pictures, out, steps, save_every=2, keep=2, log_every=1, show_every=0,
            show=reconstructions(pictures), flops=1e9, peak=1e12, arguments={"batch_size": 4},
        )  # fmt: skip

    return begin


def lines(run: Run) -> list[dict]:
    text = (run.out / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def terms(line: dict) -> dict:
    return {
        k: v
        for k, v in line.items()
        if k != "images_per_second" and k != "mfu" and "_share" not in k
    }


def check_equal(run: Run, other: Run) -> None:
    one, two = (r.trainer.model.state_dict() | r.trainer.ema.state_dict() for r in (run, other))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    judges = (r.trainer.discriminator.state_dict() for r in (run, other))
    assert all(torch.equal(a, b) for a, b in zip(*(j.values() for j in judges), strict=True))


def check_goes_on(run: Run, whole: Run) -> None:
    """Check that `run` resumes from its third step and ends like a run that never stopped."""
    assert run.resume() == run.out / "checkpoints" / "step-00000003.pt"
    run.train()
    check_equal(whole, run)


@pytest.fixture(scope="module")
def whole(begin: Begin, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = begin(tmp_path_factory.mktemp("runs") / "whole")
    assert run.resume() is None
    run.train()
    return run


def test_what_a_run_leaves(whole: Run):
    log = lines(whole)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["epoch"] for line in log] == [0.5, 1.0, 1.5, 2.0]
    assert log[-1]["images"] == 16 and log[-1]["bad_pictures"] == 0
    rate = log[-1]["images_per_second"]
    assert rate > 0 and log[-1]["mfu"] == pytest.approx(rate * 1e9 / 1e12)
    shares = {name: value for name, value in log[-1].items() if name.endswith("_share")}
    stages = ("data", "codes", "encode", "decode", "backward", "discriminator", "update")
    assert set(shares) == {f"{name}_share" for name in stages}
    assert 0.5 < sum(shares.values()) < 1
    assert 1 <= log[-1]["perplexity"] <= 256 - log[-1]["dead_codes"] < 256
    names = sorted(path.name for path in (whole.out / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.pt" for step in (2, 4)]


def test_a_run_that_was_killed_goes_on_bit_for_bit(begin: Begin, whole: Run, tmp_path: Path):
    """The kill, like SIGKILL, comes between two checkpoints and saves nothing."""

    class Killed(BaseException):
        pass

    def kill(line: dict) -> None:
        if line["step"] == 3:
            raise Killed

    first = begin(tmp_path / "killed")
    first.reports.append(kill)
    with pytest.raises(Killed):
        first.train()
    second = begin(tmp_path / "killed")
    assert second.resume() == tmp_path / "killed" / "checkpoints" / "step-00000002.pt"
    second.train()
    check_equal(whole, second)
    assert [terms(line) for line in lines(second)[-2:]] == [terms(x) for x in lines(whole)[-2:]]


def test_a_signal_saves_first(begin: Begin, whole: Run, tmp_path: Path):
    number = signal.SIGTERM
    handler = signal.getsignal(number)
    first = begin(tmp_path / "stopped")
    first.reports.append(lambda line: line["step"] == 1 and os.kill(os.getpid(), number))
    # Making images takes time that a stopped run may not have.
    first.show_every, first.show = 1000, lambda model: pytest.fail("shown before the end")
    with pytest.raises(Stopped, match=r"SIGTERM: saved .*step-0000000[12]\.pt") as stopped:
        first.train()
    assert stopped.value.number == number and signal.getsignal(number) == handler
    second = begin(tmp_path / "stopped")
    assert second.resume() is not None and second.trainer.steps == first.trainer.steps
    second.train()
    check_equal(whole, second)


def test_an_input_that_goes_away_saves_first(begin: Begin, whole: Run, tmp_path: Path):
    first = begin(tmp_path / "gone")
    batches = first.data.batches

    def some(done: int):
        yield from itertools.islice(batches(done), 3)
        raise OSError(5, "Input/output error")

    first.data.batches = some
    with pytest.raises(OSError, match="Input/output error"):
        first.train()
    check_goes_on(begin(tmp_path / "gone"), whole)


def test_pictures_that_cannot_be_shown_lose_no_steps(begin: Begin, whole: Run, tmp_path: Path):
    first = begin(tmp_path / "blind")
    first.show_every = 3

    def show(model: torch.nn.Module):
        raise RuntimeError("out of memory")

    first.show = show
    with pytest.raises(RuntimeError, match="out of memory"):
        first.train()
    check_goes_on(begin(tmp_path / "blind"), whole)


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch):
    """A scheduler signals all processes, and torchrun signals its own once more."""
    # The tests themselves may run under nohup.
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        monkeypatch.setattr(signals, "SAME", 60)
        with signals.collected() as came:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
            assert came == [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP]
            monkeypatch.setattr(signals, "SAME", -1)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with signals.collected() as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, outside)


def test_a_log_has_each_step_once(begin: Begin, whole: Run, tmp_path: Path):
    run = begin(tmp_path / "run", steps=1)
    run.train()
    with open(run.out / "log.jsonl", "a") as file:
        file.write('{"step": 2, "not_finite": []}\n{"step": 2, "total": 1}\n{"step": 3, "to')
    again = begin(run.out, steps=2)
    assert again.resume() and again.train() is None
    assert [line["step"] for line in lines(again)] == [1, 2, 2]
    assert "not_finite" in lines(again)[1] and terms(lines(again)[2]) == terms(lines(whole)[1])


def test_checkpoints_that_are_none_or_not_the_same(begin: Begin, tmp_path: Path, monkeypatch):
    run = begin(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", 7, {"weights": 1})
    with pytest.raises(ValueError, match=r"00000007\.pt: not a checkpoint of a run; remove it"):
        run.resume()
    monkeypatch.setattr(processes, "gather", lambda values: [*values, None])
    with pytest.raises(ValueError, match=r"disk that all processes share; .*-00000007\.pt, None"):
        run.resume()


def test_nan_stops_with_the_pictures_and_the_state_before(begin: Begin, tmp_path: Path):
    run = begin(tmp_path / "nan")
    lpips = run.trainer.lpips
    run.trainer.lpips = lambda x, y: lpips(x, y) * (1 if run.trainer.steps < 2 else math.nan)
    message = r"step 3: not finite: .*perceptual \(nan\).* 4 pictures are listed in .*log"
    with pytest.raises(NotFinite, match=f"{message}.*the state before it is"):
        run.train()
    line = lines(run)[-1]
    assert line["step"] == 3 and len(set(line["not_finite"])) == 4
    path = checkpoints.latest(tmp_path / "nan" / "checkpoints")
    assert path.name == "step-00000002.pt"
    state = checkpoints.load(path)["trainer"]["model"]
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_changed_arguments_and_settings_are_named(begin: Begin, whole: Run):
    other = begin(whole.out)
    other.arguments = {"batch_size": 8}
    with pytest.raises(ValueError, match=r"step-00000004\.pt: batch_size \(there 4, here 8\)"):
        other.resume()
    with pytest.raises(ValueError, match=r"settings have changed: lr \(there 0\.001, here 0\.1\)"):
        begin(whole.out, lr=0.1).resume()
    changed = begin(whole.out, lr=0.1, steps=5)
    assert changed.resume(changed=True)
    changed.train()
    assert lines(changed)[-1]["lr"] == 0.1


def test_pictures_of_the_way(begin: Begin, tmp_path: Path):
    run = begin(tmp_path / "shown", steps=2)
    run.show_every = 1
    run.train()
    names = sorted(path.name for path in (run.out / "pictures").iterdir())
    assert names == ["step-00000001.png", "step-00000002.png"]
    with Image.open(run.out / "pictures" / names[0]) as image:
        # Four rows, each of original, reconstruction and regions.
        assert image.size == (3 * 64, 4 * 64)
