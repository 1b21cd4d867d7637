"""Checkpoints: written whole or not at all, the last few kept, and resumed bit for bit."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vfmtok_fast.cache import CacheWriteError
from vfmtok_fast.training import TokenizerTrainer, checkpoints


def everything(value: object, name: str = "") -> dict[str, object]:
    """Return each leaf of a state by its path."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, part in parts for k, v in everything(part, f"{name}/{key}").items()}


def check_same(one: dict, other: dict) -> None:
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert equal, key


@pytest.mark.parametrize("kept_after", [1, 3])
def test_a_run_goes_on_bit_for_bit(
    make: Callable[..., TokenizerTrainer], images: Tensor, tmp_path: Path, kept_after: int
):
    """A resumed run matches before and after the discriminator's start, with dropout."""
    settings = {"dropout": 0.2, "discriminator_start": 3, "warmup_steps": 3, "lr": 1e-3}
    batches = [images.roll(shift, dims=3) for shift in range(4)]
    whole = make(**settings)
    expected = [whole.step(batch) for batch in batches]

    first = make(**settings)
    for batch in batches[:kept_after]:
        first.step(batch)
    checkpoints.save(tmp_path, first.steps, first.state_dict())
    torch.manual_seed(99)  # another process has drawn other numbers
    second = make(**settings)
    second.step(batches[0])  # and its trainer is not new
    second.load_state_dict(checkpoints.load(checkpoints.latest(tmp_path)))
    assert (second.steps, second.images) == (kept_after, 4 * kept_after)
    assert [second.step(batch) for batch in batches[kept_after:]] == expected[kept_after:]
    check_same(whole.state_dict(), second.state_dict())


def test_a_state_holds_no_frozen_weights(make, images: Tensor):
    state = make().state_dict()
    assert not [key for key in everything(state) if "backbone." in key]
    assert {"model", "ema", "optimizer", "discriminator", "discriminator_optimizer"} <= set(state)


def test_another_model_or_setting_is_named(make, images: Tensor, tmp_path: Path):
    state = make().state_dict()
    named = r"ema \(there 0\.9999, here 0\.9\), lr \(there 0\.0001, here 0\.01\)"
    with pytest.raises(ValueError, match=f"settings have changed: {named}"):
        make(lr=0.01, ema=0.9).load_state_dict(state)
    changed = make(lr=0.01, ema=0.9, discriminator_lr=0.02, betas=(0.5, 0.9))
    changed.load_state_dict(state, changed=True)
    assert changed.step(images)["lr"] == 0.01
    (group,) = changed.judge.optimizer.param_groups
    assert group["lr"] == 0.02 and group["betas"] == (0.5, 0.9)
    with pytest.raises(ValueError, match=r"changed: decoder_dropout \(there 0\.0, here 0\.1\)"):
        make(dropout=0.1).load_state_dict(state)
    make(dropout=0.1).load_state_dict(state, changed=True)
    older = {**state, "config": {**state["config"], "decoder_depth": 7}}
    with pytest.raises(ValueError, match=r"the model differs: decoder_depth \(there 7, here"):
        make().load_state_dict(older, changed=True)
    names = {f"old.{name}": weight for name, weight in state["model"].items()}
    with pytest.raises(ValueError, match=r"another version, .* other names: .*; start a new run"):
        make().load_state_dict({**state, "model": names})
    with pytest.raises(ValueError, match="the run had a discriminator"):
        make(judge=False).load_state_dict(state)


def test_the_last_few_stay(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints.latest(folder) is None
    (tmp_path / "run").mkdir()
    for step in (1, 2, 30, 1_000_000_000):
        path = checkpoints.save(folder, step, {"step": step}, keep=2)
        assert path == checkpoints.latest(folder) and checkpoints.load(path) == {"step": step}
    assert checkpoints.save(str(folder), 1_000_000_000, {"step": step}, keep=2) == path
    assert checkpoints.latest(str(folder)) == path and checkpoints.load(str(path)) == {"step": step}
    (folder / "notes.txt").write_text("mine")
    checkpoints.save(folder, 1_000_000_001, {}, keep=2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["notes.txt", "step-1000000000.pt", "step-1000000001.pt"]


def test_a_full_disk_keeps_the_old_one(tmp_path: Path):
    kept = checkpoints.save(tmp_path, 1, {"weight": torch.ones(10)}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(
            CacheWriteError, match=r"2\.pt: File too large; raise [a-z ]+ and run again$"
        ):
            checkpoints.save(tmp_path, 2, {"weight": torch.ones(2**20)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert torch.equal(checkpoints.load(kept)["weight"], torch.ones(10))


def test_a_damaged_one_is_named(tmp_path: Path):
    path = checkpoints.save(tmp_path, 5, {"weight": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"step-00000005\.pt: a damaged checkpoint"):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "step-00000006.pt")


@pytest.mark.parametrize(
    "trouble", [PermissionError(13, "Permission denied"), RuntimeError("can't allocate memory")]
)
def test_trouble_of_the_machine_is_no_damage(tmp_path: Path, monkeypatch, trouble: Exception):
    path = checkpoints.save(tmp_path, 5, {"weight": torch.ones(10)})

    def load(*_, **__):
        raise trouble

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(trouble)) as raised:
        checkpoints.load(path)
    assert raised.value is trouble
