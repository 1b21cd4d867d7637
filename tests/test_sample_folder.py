"""Generated images have the same bytes whichever process makes them, killed or not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import DIE_AT_RENAME, START

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, sample_folder, temporary

SAMPLING = {"cfg_scale": 1.5, "cfg_interval": 3, "top_k": 20, "top_p": 0.95, "seed": 4}

# A process that imports once and forks one run per trial, killed at its n-th rename.
HARNESS = (
    START
    + DIE_AT_RENAME
    + """
out = Path(sys.argv[2])


def trial(folder, at=0, after=False, world=1):
    killed = 0
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if rank == 0:
                die_at_rename(at, after)
            fake.run(folder, rank=rank, world=world)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        killed += os.WIFSIGNALED(status)
    return killed

total = 0
for world in (1, 2, 3):
    for at in range(1, 7 if world == 1 else 5):
        for after in (False, True):
            folder = out / f"{world}-{at}-{after}"
            killed = trial(folder, at, after, world)
            # Among several, what is left to rename to the one that is to be killed is chance.
            total += killed if world == 1 else 0
            trial(folder)
print(total)
"""
)


@dataclasses.dataclass
class FakeConfig:
    side: int = 2
    levels: tuple[int, ...] = (1, 2)


class FakeTokenizer(torch.nn.Module):
    """Images are a hash of the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = FakeConfig()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
        self.groups: list[int] = []

    def decode_to_uint8(self, codes: torch.Tensor, size: int) -> torch.Tensor:
        self.groups.append(len(codes))
        if codes.is_cuda:
            # Late enough that codes whose memory was freed too early would be overwritten by now.
            torch.cuda._sleep(20_000_000)
        weights = torch.arange(codes.shape[1] * size * size * 3, device=codes.device)
        weights = weights.reshape(codes.shape[1], -1) % 251
        levels = ((codes[:, :, None] * weights).sum(1) * int(self.scale)) % 256
        return levels.to(torch.uint8).reshape(-1, size, size, 3)


def job(out: Path, count: int = 150, **changes) -> sample_folder.Job:
    torch.manual_seed(0)
    config = GPTConfig(
        num_layers=1, num_heads=2, dim=16, vocab_size=37, block_size=4, num_classes=5,
        ffn_multiple_of=8,
    )  # fmt: skip
    gpt = GPT(config).eval()
    torch.nn.init.normal_(gpt.head.weight, std=0.5)
    values = {"size": 2, "sampling": SAMPLING, "class_ids": torch.arange(count) % 5, **changes}
    return sample_folder.Job(gpt=gpt, tokenizer=FakeTokenizer(), out=out, **values)


def run(
    out: Path, batch_size: int | None = 7, rank: int = 0, world: int = 1, extend: bool = False,
    **changes,
) -> bool:  # fmt: skip
    made = job(out, **changes)
    sample_folder.prepare(made, extend=extend)
    numbers = sample_folder.pending(made)[rank::world]
    sample_folder.make_shards(made, numbers, batch_size, lambda count: None)
    return sample_folder.finish(made)


def tree(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_the_file_holds_what_the_models_make(tmp_path):
    assert run(tmp_path / "a")
    made = job(tmp_path / "a")
    with np.load(tmp_path / "a/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        pictures, labels = file["arr_0"], file["arr_1"]
    assert np.array_equal(labels, np.arange(150) % 5) and labels.dtype == np.int64
    # Generate all images in one batch: an image's id is its position.
    codes = made.gpt.generate(made.class_ids, **SAMPLING)
    assert np.array_equal(pictures, made.tokenizer.decode_to_uint8(codes, 2).numpy())
    assert pictures.dtype == np.uint8 and pictures.shape == (150, 2, 2, 3)


@pytest.mark.parametrize("there", [1, 100, 128])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_is_extended_to_the_bytes_of_one_made_at_once(tmp_path, there, finished):
    if finished:
        run(tmp_path / "a", count=there)
    else:
        made = job(tmp_path / "a", count=there)
        sample_folder.prepare(made)
        sample_folder.make_shards(made, [made.shards - 1], None, lambda count: None)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("a/shards/*")}
    whole = tree(tmp_path / "a")
    with pytest.raises(FileExistsError, match=f"a holds {there} of these 150 images; .* --extend"):
        run(tmp_path / "a")
    assert tree(tmp_path / "a") == whole
    assert run(tmp_path / "a", extend=True) and run(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    # Whole shards stay; a last one that was not full is made again.
    stay = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("a/shards/*")}
    assert {name: stay[name] == time for name, time in before.items()} == {
        name: name != f"pictures-{there // 64:05d}.npy" for name in before
    }


def test_an_extension_that_dies_leaves_a_folder_that_both_can_finish(tmp_path, monkeypatch):
    run(tmp_path / "a", count=100)
    whole = tree(tmp_path / "a")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.LocalPlace, "put", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", extend=True)
    assert not (
        tmp_path / "a/samples.npz"
    ).exists()  # never one that samples.json does not describe
    assert run(tmp_path / "a", count=100) and tree(tmp_path / "a") == whole
    assert run(tmp_path / "a", extend=True) and run(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("moment", ["before", "while"])
@pytest.mark.parametrize("count", [100, 128])
def test_a_process_whose_folder_is_extended_meanwhile_says_so(tmp_path, monkeypatch, moment, count):
    slow = job(tmp_path / "a", count=count)
    sample_folder.prepare(slow)
    sample_folder.make_shards(slow, [0, 1], None, lambda count: None)
    if moment == "before":
        assert run(tmp_path / "a", extend=True)
        before = tree(tmp_path / "a")
        # It does not write its shorter last shard over the whole one either.
        with pytest.raises(ValueError, match="has extended it"):
            sample_folder.make_shards(slow, [1], None, lambda count: None)
    else:
        array = sample_folder._array

        def meanwhile(*args):
            monkeypatch.undo()
            sample_folder.prepare(job(tmp_path / "a"), extend=True)
            return array(*args)

        monkeypatch.setattr(sample_folder, "_array", meanwhile)
    with pytest.raises(ValueError, match=f"has extended it from {count} to 150 images"):
        sample_folder.finish(slow)
    if moment == "while":
        assert not (tmp_path / "a/samples.npz").exists() and run(tmp_path / "a")
        run(tmp_path / "b")
        before = tree(tmp_path / "b")
    assert tree(tmp_path / "a") == before


@pytest.mark.parametrize("batch_size", [None, 1, 16, 64, 150, 1000])
def test_the_batch_size_changes_no_byte(tmp_path, batch_size):
    run(tmp_path / "a")
    run(tmp_path / "b", batch_size=batch_size)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_pictures_are_decoded_in_the_same_groups_always(tmp_path):
    seen = []
    for batch_size, name in ((1, "a"), (130, "b")):
        made = job(tmp_path / name)
        sample_folder.prepare(made)
        sample_folder.make_shards(made, sample_folder.pending(made), batch_size, lambda count: None)
        seen.append(made.tokenizer.groups)
    assert seen[0] == seen[1] == [16] * 9 + [6]


def test_generation_is_told_code_by_code(tmp_path):
    made, seen, pictures = job(tmp_path), [], []
    sample_folder.prepare(made)
    sample_folder.make_shards(
        made, sample_folder.pending(made), 128, pictures.append, lambda *state: seen.append(state)
    )
    whole, rest = [(128 * i, 512) for i in (1, 2, 3, 4)], [(22 * i, 88) for i in (1, 2, 3, 4)]
    assert seen == whole + rest and sum(pictures) == 150


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    assert run(out, count=3)  # the state of a run that died before its settings were written
    for name in ("manifest.json", "shards/tokens-00000.safetensors"):
        other = tmp_path / name.replace("/", "-")
        (other / name).parent.mkdir(parents=True)
        (other / name).write_bytes(b"tokens")
        with pytest.raises(FileExistsError, match="is there and not a folder of samples"):
            run(other)
        assert tree(other) == {name: b"tokens"}


def test_a_process_that_comes_while_another_begins(tmp_path, monkeypatch):
    """The settings appear after the folder is checked but before the settings are read."""
    original = sample_folder._holds_something

    def while_another_begins(out):
        with monkeypatch.context() as patch:
            patch.setattr(sample_folder, "_holds_something", original)
            sample_folder.prepare(job(out))
        return original(out)

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(sample_folder, "_holds_something", while_another_begins)
    assert run(tmp_path / "a")


def test_two_jobs_that_begin_at_once_share_no_folder(tmp_path, monkeypatch):
    sweep = temporary.sweep

    def meanwhile(folder):
        monkeypatch.undo()
        sample_folder.prepare(job(tmp_path / "a", sampling={**SAMPLING, "seed": 5}))
        return sweep(folder)

    monkeypatch.setattr(temporary, "sweep", meanwhile)
    with pytest.raises(FileExistsError, match=r"seed \(there 5, here 4\)"):
        sample_folder.prepare(job(tmp_path / "a"))


@pytest.mark.parametrize("links", [True, False])
def test_settings_written_at_the_last_moment_stay(tmp_path, monkeypatch, links):
    link = os.link

    def meanwhile(source, target):
        monkeypatch.undo()
        if not links:
            raise PermissionError(errno.EPERM, "a file system without hard links")
        sample_folder.prepare(job(tmp_path, sampling={**SAMPLING, "seed": 5}))
        return link(source, target)

    monkeypatch.setattr(os, "link", meanwhile)
    if links:
        with pytest.raises(FileExistsError, match=r"seed \(there 5, here 4\)"):
            sample_folder.prepare(job(tmp_path))
    else:
        sample_folder.prepare(job(tmp_path))
    seed = json.loads((tmp_path / "samples.json").read_text())["seed"]
    assert seed == (5 if links else 4) and set(tree(tmp_path)) == {"samples.json"}


def test_many_processes_make_the_bytes_of_one(tmp_path):
    assert run(tmp_path / "a")
    # Each rank looks for missing shards at its start; the second world finds one shard left.
    assert not run(tmp_path / "b", rank=0, world=2)
    assert run(tmp_path / "b", rank=0, world=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = tree(tmp_path / "b")
    assert run(tmp_path / "b") and tree(tmp_path / "b") == before


def on_gpu(out: Path) -> sample_folder.Job:
    made = job(out, count=400)
    made.gpt.cuda(), made.tokenizer.cuda()
    sample_folder.prepare(made)
    return made


@pytest.mark.gpu
def test_decoding_beside_generation_makes_the_same_bytes(tmp_path):
    """The thread with its own stream must match one shard after another on a single stream."""
    with vfmtok_fast.enable():
        beside, inline = on_gpu(tmp_path / "beside"), on_gpu(tmp_path / "inline")
        sample_folder.make_shards(beside, sample_folder.pending(beside), 64, lambda count: None)
        for number in sample_folder.pending(inline):
            ids = inline.rows(number)
            codes = inline.gpt.generate(inline.class_ids[ids], image_ids=ids, **SAMPLING)
            sample_folder._decode_shard(inline, number, codes, lambda count: None)
    assert sample_folder.finish(beside) and sample_folder.finish(inline)
    assert tree(tmp_path / "beside") == tree(tmp_path / "inline")


@pytest.mark.gpu
def test_an_error_while_decoding_beside_generation_ends_the_run(tmp_path):
    made, told = on_gpu(tmp_path / "a"), []

    def stop(count: int) -> None:
        told.append(count)
        if len(told) == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample_folder.make_shards(made, sample_folder.pending(made), 64, stop)
    # The error was in the second shard; the first is complete, and the third exists fully or not at
    # all.
    assert made.path(0).exists() and not made.path(1).exists()
    assert not [name for name in tree(tmp_path / "a") if ".tmp" in name]
    sample_folder.make_shards(made, sample_folder.pending(made), 64, lambda count: None)
    assert sample_folder.finish(made)


@pytest.mark.slow
def test_killed_before_and_after_every_rename(tmp_path):
    """Renames are those of settings, 3 shards and the result, with one to three processes."""
    (tmp_path / "out").mkdir()
    paths = Path(vfmtok_fast.__file__).parents[1], Path(__file__).parent / "helpers"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, __file__, str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * 5
    run(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    folders = sorted((tmp_path / "out").iterdir())
    assert len(whole) == 5 and len(folders) == 28
    for folder in folders:
        assert tree(folder) == whole, folder.name


@pytest.mark.parametrize("moment", ["decode", "write"])
def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch, moment):
    calls = []
    owner, name = (FakeTokenizer, "decode_to_uint8") if moment == "decode" else (os, "fsync")
    original = getattr(owner, name)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    assert len(calls) == 6 and not [name for name in tree(tmp_path / "b") if ".tmp" in name]
    assert run(tmp_path / "b") and run(tmp_path / "a")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 149}, r"num \(there 150, here 149\)"),
        ({"kv_dtype": torch.int8}, r"kv_dtype \(there none, here int8\)"),
        ({"size": 3}, r"size \(there 2, here 3\)"),
        ({"sampling": {**SAMPLING, "seed": 5}}, r"seed \(there 4, here 5\)"),
        ({"class_ids": torch.zeros(150).long()}, "classes_sha256"),
        ({"class_ids": torch.arange(200) % 4}, r"classes_sha256 .*num \(there 150, here 200\)"),
        ({"count": 200, "size": 3}, r"num \(there 150, here 200\), size \(there 2, here 3\)"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    run(tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(FileExistsError, match=message):
        run(tmp_path / "a", **changes)
    assert tree(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("gpt", {"num_heads": 1}, r"gpt.num_heads \(there 2, here 1\)"),
        ("tokenizer", {"side": 3}, r"tokenizer.side \(there 2, here 3\)"),
    ],
)
def test_another_config_with_the_same_weights_is_refused(tmp_path, model, changes, message):
    run(tmp_path)
    other = job(tmp_path)
    part = getattr(other, model)
    part.config = dataclasses.replace(part.config, **changes)
    with pytest.raises(FileExistsError, match=message):
        sample_folder.prepare(other)


def test_in_half_precision_fast_ops_are_not_mixed_with_references(tmp_path):
    exact, half = job(tmp_path / "exact"), job(tmp_path / "half")
    half.gpt.bfloat16()
    with vfmtok_fast.enable():
        for one in (exact, half):
            sample_folder.prepare(one)
    sample_folder.prepare(exact)
    fast = r"fast_ops \(there decode_attention\+decode_step\+sample_token, here none\)"
    with pytest.raises(FileExistsError, match=fast):
        sample_folder.prepare(half)
    tokenizer = job(tmp_path / "tokenizer")
    tokenizer.tokenizer.half()
    with vfmtok_fast.enable("linear"):
        sample_folder.prepare(tokenizer)
    with pytest.raises(FileExistsError, match=r"fast_ops \(there linear, here none\)"):
        sample_folder.prepare(tokenizer)


def test_a_folder_of_an_older_version_is_refused_by_name(tmp_path):
    run(tmp_path)
    path = tmp_path / "samples.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "tokenizer"}))
    with pytest.raises(FileExistsError, match=r"tokenizer.levels \(there none, here 1\+2\)"):
        run(tmp_path)


def test_other_weights_and_damage_are_refused(tmp_path):
    run(tmp_path / "a")
    other = job(tmp_path / "a")
    with torch.no_grad():
        other.gpt.head.weight[0, 0] += 1
    with pytest.raises(FileExistsError, match=r"gpt_sha256 \(there .*\)\); choose another"):
        sample_folder.prepare(other)
    (tmp_path / "a/samples.npz").unlink()
    np.save(job(tmp_path / "a").path(1), np.zeros(3))
    with pytest.raises(ValueError, match="pictures-00001.npy is not a shard of this job"):
        run(tmp_path / "a")
    assert not (tmp_path / "a/samples.npz").exists()
    for text in ("{", "[1]", "null"):
        (tmp_path / "a/samples.json").write_text(text)
        with pytest.raises(ValueError, match="samples.json is damaged"):
            run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a folder of samples"):
        run(tmp_path / "file")


@pytest.mark.parametrize(
    "other", [np.zeros((64, 3, 3, 3), np.uint8), np.zeros((64, 2, 2, 3)), np.zeros(0, np.uint8)],
    ids=["size", "dtype", "empty"],
)  # fmt: skip
def test_a_shard_of_another_shape_is_told_before_the_work(tmp_path, other):
    made = job(tmp_path)
    sample_folder.prepare(made)
    np.save(made.path(2), other[: len(made.rows(2))])
    with pytest.raises(ValueError, match="00002.npy is not a shard of this job: it holds") as error:
        run(tmp_path)
    assert "\n" not in str(error.value) and not made.path(0).exists()
    made.path(2).unlink()
    assert run(tmp_path)


def test_a_file_of_another_kind_is_made_again(tmp_path):
    run(tmp_path / "a")
    before = tree(tmp_path / "a")
    (tmp_path / "a/samples.npz").unlink()
    np.savez(tmp_path / "x.npz", np.zeros(3))
    for number, data in enumerate(((tmp_path / "x.npz").read_bytes(), bytes(5000), b"<html>")):
        job(tmp_path / "a").path(number).write_bytes(data)
    assert sample_folder.pending(job(tmp_path / "a")) == [0, 1, 2]
    assert run(tmp_path / "a") and tree(tmp_path / "a") == before


@pytest.mark.parametrize("left", [0, 50, -1])
def test_what_is_there_in_part_is_made_again(tmp_path, left):
    """Such files come from a full disk or an interrupted copy."""
    run(tmp_path / "a")
    before = tree(tmp_path / "a")
    for name in ("shards/pictures-00001.npy", "samples.npz"):
        path = tmp_path / "a" / name
        path.write_bytes(path.read_bytes()[:left])
    assert sample_folder.pending(job(tmp_path / "a")) == [1]
    assert run(tmp_path / "a") and tree(tmp_path / "a") == before
