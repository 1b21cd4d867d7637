"""Any number of processes, coming and going, make the same cache bytes as a single one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scripts import START
from tqdm import tqdm

import vfmtok_fast
from vfmtok_fast import cache
from vfmtok_fast.cache.format import shards
from vfmtok_fast.cache.make import build, parts, prepare, progress
from vfmtok_fast.cache.make.progress import State, reporting
from vfmtok_fast.cache.store import LocalPlace

SMALL = {"batch_size": 3, "shard_size": 2, "workers": 1}

# Imports once, then forks the processes of each world and kills them at random moments.
HARNESS = (
    START
    + """
from vfmtok_fast.cache.make import prepare, progress

images, out = sys.argv[2], Path(sys.argv[3])
# Who has encoded nothing waits for so long for the one that was killed: a minute, but here.
progress.SLOW_SHARD = 1
# Where it was killed before it had indexed, too.
prepare.INDEX_PATIENCE = 1

class Slow(fake.FakeTokenizer):
    def encode(self, images):
        time.sleep(0.04)
        return super().encode(images)

def start(rank, world):
    pid = os.fork()
    if pid == 0:
        cache.build(
            images, out, Slow(), views=("center", "random-0"), batch_size=3, shard_size=2,
            workers=1, rank=rank, world_size=world,
        )
        os._exit(0)
    return pid

rng = random.Random(0)
killed = 0
for world in (3, 2, 5, 1, 4):
    pids = [start(rank, world) for rank in range(world)]
    time.sleep(rng.uniform(0.05, 0.25))
    if world != 4:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pids[0], signal.SIGKILL)  # the one that others might wait for
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
print(killed)
"""
)


@pytest.mark.slow
def test_killed_worlds_of_changing_size(tmp_path, fake):
    images = fake.make_tree(tmp_path / "p", count=60, bad=(3, 4, 31))
    views = ("center", "random-0")
    cache.build(images, tmp_path / "whole", fake.FakeTokenizer(), views=views, **SMALL)
    environment = {**os.environ, "PYTHONPATH": str(Path(vfmtok_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, fake.__file__, str(images), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6
    # The next run sweeps what killed processes left.
    cache.build(images, tmp_path / "out", fake.FakeTokenizer(), views=views, **SMALL)
    assert fake.read_tree(tmp_path / "out") == fake.read_tree(tmp_path / "whole")


def test_what_others_did_meanwhile_is_not_done_again(tree, tmp_path, out, tokenizer, fake):
    """Rank 1 of 2 runs from start to finish while rank 0 is in its first shard."""
    cache.build(tree, tmp_path / "whole", fake.FakeTokenizer(), **SMALL)
    other = []

    def help_out(state):
        if not other:
            other.append(None)
            settings = {"rank": 1, "world_size": 2, **SMALL}
            other[0] = cache.build(tree, out, fake.FakeTokenizer(), **settings)

    first = cache.build(tree, out, tokenizer, rank=0, world_size=2, progress=help_out, **SMALL)
    # Rank 0 made the shard that it was in and the one whose images it had begun to decode.
    assert 2 <= first.encoded <= 4 and 7 <= other[0].encoded <= 11
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def test_a_rank_waits_for_what_another_is_at_work_on(tree, out, tokenizer, monkeypatch, fake):
    job = cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
    state = progress.State
    waited = []

    def wait_for(self, numbers):
        waited.append(list(numbers))
        for number in waited[0]:
            cache.encode_shard(job, number)

    monkeypatch.setattr(state, "wait_for", wait_for)
    summary = cache.build(tree, out, tokenizer, rank=1, world_size=2, **SMALL)
    assert summary.encoded == 5 and sorted(waited[0]) == [0, 1, 2]


def test_a_rank_alone_does_the_shards_of_the_others(tree, tmp_path, out, tokenizer, fake):
    written = []
    write = shards.write_shard

    def noted(out, fingerprint, shard):
        written.append(shard.number)
        write(out, fingerprint, shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", noted)
        patch.setattr(prepare, "INDEX_PATIENCE", 0.3)
        patch.setattr(progress, "LEAST_PATIENCE", 0.1)
        summary = cache.build(tree, out, tokenizer, rank=1, world_size=3, **SMALL)
    assert summary.encoded == 11 and written == [2, 3, 4, 1, 0, 5]
    assert cache.verify(out, tokenizer, tree).ok


def test_a_rank_takes_neighbours_of_what_is_left(tree, out, tokenizer, monkeypatch):
    """They lie together in the input: a row group of a Parquet file is not read from its start."""
    cache.build(tree, out, tokenizer, shard_range=(1, 3), **SMALL)
    made = []
    monkeypatch.setattr(build, "encode_shards", lambda job, numbers, *_: made.extend(numbers))
    monkeypatch.setattr(progress.State, "wait_for", lambda *_: made.append("the others"))
    for rank in range(2):
        with pytest.raises(ValueError, match="4 of 6 shards are missing"):
            cache.build(tree, out, tokenizer, rank=rank, world_size=2, **SMALL)
    assert made == [0, 3, "the others", 5, 4] + [4, 5, "the others", 0, 3]


def test_shard_ranges_together_make_the_cache(tree, tmp_path, out, tokenizer, fake):
    cache.build(tree, tmp_path / "whole", tokenizer, **SMALL)
    middle = cache.build(tree, out, tokenizer, shard_range=(2, 4), **SMALL)
    assert (middle.encoded, middle.missing, middle.exit_code) == (4, 4, 0)
    assert cache.status(out).state == "incomplete"
    assert cache.build(tree, out, tokenizer, shard_range=(4, 99), **SMALL).missing == 2
    last = cache.build(tree, out, tokenizer, shard_range=(0, None), **SMALL)
    assert (last.encoded, last.missing) == (4, 0)
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"rank": 2, "world_size": 2}, "rank must be below world_size, got 2 of 2"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"shard_range": (6, 7)}, "A below 6, the number of shards, got 6:7"),
        ({"shard_range": (3, 3)}, "0 <= A < B"),
        ({"shard_range": (-1, 3)}, "0 <= A < B"),
    ],
)
def test_shares_that_will_not_do(tree, out, tokenizer, arguments, text):
    with pytest.raises(ValueError, match=text) as caught:
        cache.build(tree, out, tokenizer, **SMALL, **arguments)
    assert "\n" not in str(caught.value)


def test_other_ranks_leave_the_index_to_the_first(tree, out, tokenizer, monkeypatch, fake):
    indexed = []
    write = parts.write_in_parts

    def counted(*arguments):
        indexed.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr("vfmtok_fast.cache.make.parts.write_in_parts", counted)
    # Nor do they list the images to compare them with what rank 0 has just listed.
    compared, made = [], []
    monkeypatch.setattr(
        "vfmtok_fast.cache.make.changes.check_unchanged", lambda *given: compared.append(given)
    )
    late = threading.Thread(
        target=lambda: made.append(cache.prepare(tree, out, tokenizer, rank=1, **SMALL)),
        name="late",
    )
    late.start()
    cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
    late.join()
    assert len(indexed) == 1 and indexed[0] != "late"
    assert len(made) == 1 and not compared


@pytest.mark.parametrize("view", ["center", "center-flip"])
def test_another_manifest_at_the_same_time(tree, out, tokenizer, monkeypatch, view):
    """Another process indexes during ours, which is harmless if its settings are the same."""
    write = parts.write_in_parts

    def meanwhile(*arguments):
        monkeypatch.undo()
        cache.prepare(tree, out, tokenizer, views=(view,), **SMALL)
        return write(*arguments)

    monkeypatch.setattr("vfmtok_fast.cache.make.parts.write_in_parts", meanwhile)
    if view == "center":
        cache.prepare(tree, out, tokenizer, **SMALL)
        return
    with pytest.raises(cache.ImagesChanged, match="another process started a cache"):
        cache.prepare(tree, out, tokenizer, **SMALL)


def test_bad_pictures_of_other_processes_count(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(0, 3, 6, 10))
    states = []
    first = cache.build(tree, out, tokenizer, shard_range=(0, 2), **SMALL)
    assert first.bad == 3 and first.exit_code == 3
    job = cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
    helped = []

    def help_out(state):
        if not helped:
            helped.append(cache.encode_shard(job, 5))
        states.append(state)

    cache.build(tree, out, tokenizer, progress=help_out, **SMALL)
    assert (states[-1].done, states[-1].bad) == (11, 4)
    assert states[-1].rate > 0 and states[-1].eta == 0
    with pytest.raises(cache.TooManyBadImages):
        cache.build(tree, out, tokenizer, max_bad=3, **SMALL)


def test_a_shard_that_comes_while_it_is_counted_counts_once(tmp_path, out, tokenizer, fake):
    """The shard comes from another process, or an actor that died between commit and report."""
    tree = fake.make_tree(tmp_path / "p", bad=(3,))
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    state = State(job, None)
    state.advance(0, 1, 0)
    cache.encode_shard(job, 0)
    state.refresh()
    state.advance(0, 1, 1)
    progress = state.progress()
    assert (progress.done, progress.bad, state.encoded) == (2, 1, 2)


def test_another_takes_the_completion_away_as_it_is_read(tree, out, tokenizer, monkeypatch):
    """finish copes if a process that still has a shard to encode removes COMPLETE.json."""
    cache.build(tree, out, tokenizer, **SMALL)
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    read = LocalPlace.read_bytes

    def gone(path):
        if path.name == "COMPLETE.json":
            path.unlink()
        return read(path)

    monkeypatch.setattr(LocalPlace, "read_bytes", gone)
    cache.finish(job)
    monkeypatch.undo()
    assert cache.verify(out).ok


def test_a_shard_that_goes_while_it_is_counted(tree, out, tokenizer, monkeypatch):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    state = State(job, None)
    cache.encode_shard(job, 0)
    read = shards.read_header

    def once(path):
        header = read(path)
        path.unlink()
        return header

    monkeypatch.setattr(shards, "read_header", once)
    state.refresh()
    assert state.progress().done == 2


def test_a_run_without_a_bar_waits_for_no_lock():
    """Forked processes share tqdm's lock; one killed while it holds the lock never frees it."""

    def report() -> None:
        with reporting(False, total=2, done=0) as tell:
            tell(cache.Progress(done=1, bad=0, total=2))

    with tqdm.get_lock():
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
