"""A run may be killed at any moment: every file is whole, and resuming gives the same bytes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import DIE_AT_RENAME, START

import vfmtok_fast
from vfmtok_fast import cache, temporary
from vfmtok_fast.cache.sources.folder import walk

SMALL = {"batch_size": 3, "shard_size": 2, "workers": 2}

# A process that imports once and forks one builder per trial. Its last line is the number of
# builders killed. `at` counts the renames, the only moments at which anything becomes visible.
HARNESS = (
    START
    + DIE_AT_RENAME
    + """
mode, images, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])

def build(out):
    cache.build(images, out, fake.FakeTokenizer(), batch_size=3, shard_size=2, workers=2)


def trial(out, prepare, delay=None):
    pid = os.fork()
    if pid == 0:
        prepare()
        build(out)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

killed = 0
if mode == "random":
    rng = random.Random(0)
    trial(out.with_name("warm"), lambda: None)  # the first one in a process is slower
    start = time.monotonic()
    assert not trial(out.with_name("whole"), lambda: None)
    whole = time.monotonic() - start
    while killed < 2:
        # Once more, with less patience, if the machine has become faster than the whole run was.
        shutil.rmtree(out, ignore_errors=True)
        killed, seen, patience = 0, 0, 1.0
        while trial(out, lambda: None, rng.uniform(0.05, 0.6) * whole * patience):
            killed += 1
            done = len(list(out.glob("shards/*.safetensors")))
            assert done >= seen, "finished shards are gone"
            # On a busy machine a run may take longer to start than the whole one took.
            patience = 1.0 if done > seen else patience * 1.25
            seen = done
        whole /= 2
else:
    at = 1
    while True:
        for after in (False, True):
            folder = out / f"{at}-{after}"
            died = trial(folder, lambda: die_at_rename(at, after))
            killed += died
            assert not died or after or not (folder / "COMPLETE.json").exists()
            trial(folder, lambda: None)
        if not died:
            break
        at += 1
print(killed)
"""
)


def run_harness(fake, mode, images, out):
    environment = {**os.environ, "PYTHONPATH": str(Path(vfmtok_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, fake.__file__, mode, str(images), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, fake):
    images = fake.make_tree(tmp_path / "p", count=40, bad=(3, 4, 31))
    killed = run_harness(fake, "random", images, tmp_path / "out")
    assert killed >= 2
    whole = fake.read_tree(tmp_path / "whole")
    assert fake.read_tree(tmp_path / "out") == whole and len(whole) > 20


@pytest.mark.slow
def test_killed_before_and_after_every_rename(tmp_path, fake):
    """11 images in 6 shards, 2 with a quarantine list: resuming always makes the same files."""
    images = fake.make_tree(tmp_path / "p", bad=(3, 7))
    (tmp_path / "out").mkdir()
    killed = run_harness(fake, "renames", images, tmp_path / "out")
    # index, manifest, 6 shards, 2 quarantine lists, COMPLETE
    assert killed == 2 * 11
    trees = [fake.read_tree(out) for out in sorted((tmp_path / "out").iterdir())]
    assert len(trees) == 24 and all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize(
    "number, error, code",
    [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)],
)
@pytest.mark.parametrize("moment", ["encode", "write"])
def test_polite_signals_leave_nothing_half_written(
    tree, out, tokenizer, fake, monkeypatch, number, error, code, moment
):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        owner, name = (tokenizer, "encode") if moment == "encode" else (os, "fsync")
        original, calls = getattr(owner, name), []

        def interrupted(argument):
            calls.append(argument)
            if len(calls) == 5:  # for fsync: while the file of the manifest or of a shard is open
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            return original(argument)

        patch.setattr(owner, name, interrupted)
        with pytest.raises(error) as caught:
            cache.build(tree, out, tokenizer, **SMALL)
    assert getattr(caught.value, "code", None) == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not [name for name in fake.read_tree(out) if ".tmp" in name]
    cache.build(tree, out, tokenizer, **SMALL)
    assert cache.verify(out, tokenizer, tree).ok


def test_an_own_sigterm_handler_is_respected(tree, out, tokenizer):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        encode = tokenizer.encode

        def signalled(images):
            os.kill(os.getpid(), signal.SIGTERM)
            return encode(images)

        tokenizer.encode = signalled
        assert cache.build(tree, out, tokenizer, **SMALL).exit_code == 0
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen


@pytest.fixture
def gone_pid():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_sweep_takes_what_the_dead_left_and_nothing_else(tmp_path, gone_pid):
    host, day = temporary._machine(), temporary.FOREIGN_TMP_SECONDS
    swept = [
        f"a.tmp-{host}-{gone_pid}",
        f"a.tmp-{host}-{gone_pid}-0123abcd",
        "old.tmp-elsewhere-1",
        f"old.tmp-{host}-{os.getpid()}",
    ]
    kept = [
        f"b.tmp-{host}-{os.getpid()}",
        f"b.tmp-{host}-{os.getpid()}-0123abcd",
        # From an older version, or from another PID namespace of this host.
        f"b.tmp-{socket.gethostname()}-{gone_pid}",
        f"b.tmp-{socket.gethostname()}.1-{gone_pid}-0123abcd",
        "c.tmp-elsewhere-1",
        "tokens-00000.safetensors",
        "old.tmp-nopid",
        f"tmp-{host}-{gone_pid}",
    ]
    for name in swept + kept:
        (tmp_path / name).write_bytes(b"")
        if name.startswith("old"):
            os.utime(tmp_path / name, (time.time() - 2 * day,) * 2)
    # As of a model that was being saved; one without the random part is not ours.
    for name in (ours := f"a.tmp-{host}-{gone_pid}-0123abce", f"folder.tmp-{host}-{gone_pid}"):
        (tmp_path / name / "in").mkdir(parents=True)
    assert temporary.sweep(tmp_path, of="c") == 0
    assert temporary.sweep(tmp_path) == len(swept) + 1 and not (tmp_path / ours).exists()
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == set(kept) and len(list(tmp_path.iterdir())) == len(kept) + 1
    (slow := tmp_path / "d.tmp-elsewhere-1-0123abcd" / "in").mkdir(parents=True)
    for path in (slow, slow.parent):
        os.utime(path, (time.time() - 2 * day,) * 2)
    (slow / "new").write_bytes(b"")
    os.utime(slow, (time.time() - 2 * day,) * 2)
    assert temporary.sweep(tmp_path) == 0
    os.utime(slow / "new", (time.time() - 2 * day,) * 2)
    assert temporary.sweep(tmp_path) == 1
    assert temporary.sweep(tmp_path / "nowhere") == 0


def test_a_run_sweeps_the_cache(tree, out, tokenizer, fake, gone_pid):
    cache.build(tree, out, tokenizer, **SMALL)
    before = fake.read_tree(out)
    for folder in (out, out / "shards", out / "quarantine"):
        (folder / f"x.tmp-{temporary._machine()}-{gone_pid}").write_bytes(b"half")
    assert cache.status(out).writing == 3
    cache.build(tree, out, tokenizer, **SMALL)
    assert fake.read_tree(out) == before


def test_disk_full(tree, out, tokenizer, fake):
    """The operating system itself refuses a write in the middle of a shard."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    encode = tokenizer.encode

    def fill(images):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        return encode(images)

    tokenizer.encode = fill
    try:
        with pytest.raises(cache.CacheWriteError) as caught:
            cache.build(tree, out, tokenizer, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert "tokens-00000.safetensors: File too large; raise the limit" in str(caught.value)
    assert sorted(fake.read_tree(out)) == ["index.parquet", "manifest.json"]
    tokenizer.encode = encode
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 11


def test_disk_full_while_indexing(tree, out, tokenizer, fake, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    walks = []

    def fill(*place):
        walks.append(place)
        if len(walks) == 2:  # the first walk looks for one readable image
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        return walk(*place)

    monkeypatch.setattr("vfmtok_fast.cache.sources.folder.walk", fill)
    try:
        with pytest.raises(cache.CacheWriteError, match=r"index\.parquet: File too large"):
            cache.build(tree, out, tokenizer, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fake.read_tree(out) == {}


def test_a_disk_that_fills_up_and_one_that_turns_read_only(
    tree, tmp_path, tokenizer, fake, small_disk
):
    """The tmpfs, allocated in pages, has room for index, manifest and some of the six shards."""
    cache.build(tree, tmp_path / "whole", fake.FakeTokenizer(), **SMALL)
    out = small_disk("size=20k") / "tokens"
    with pytest.raises(cache.CacheWriteError) as caught:
        cache.build(tree, out, tokenizer, **SMALL)
    assert "No space left on device; free some space and run again" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = cache.status(out)
    assert 0 < kept.shards_done < 6 and kept.state == "incomplete" and kept.writing == 0
    small_disk("remount,ro,size=1m")
    with pytest.raises(cache.CacheWriteError, match="Read-only file system; choose a folder on"):
        cache.build(tree, out, tokenizer, **SMALL)
    small_disk("remount,rw,size=1m")
    done = cache.build(tree, out, tokenizer, **SMALL)
    assert done.encoded == 11 - kept.done
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def test_read_only_folder(as_nobody, tokenizer, fake):
    tree, out = fake.make_tree(as_nobody / "p"), as_nobody / "tokens"
    out.mkdir(mode=0o500)
    with pytest.raises(cache.CacheWriteError, match="Permission denied; choose a folder"):
        cache.build(tree, out, tokenizer, **SMALL)
    out.chmod(0o700)
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 11


def test_a_failed_write_keeps_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.put(b"old")
    with pytest.raises(ZeroDivisionError), path.writing() as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_threads_write_under_names_of_their_own(tmp_path):
    """Threads of one process share its id, yet their temporary files have different names."""
    path = tmp_path / "file"
    with path.writing() as one, path.writing() as other:
        one.write(b"one")
        other.write(b"other")
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"one"  # the writer that closed last
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_living_writer_of_another_pid_namespace_is_left_alone(tmp_path, monkeypatch):
    """Containers with the same host name each number their processes from 1."""
    here = temporary._machine()
    with (tmp_path / "file").writing() as file:
        file.write(b"half")
        monkeypatch.setattr(temporary, "_machine", lambda: here + "1")
        monkeypatch.setattr(temporary, "_alive", lambda pid: False)
        assert tmp_path.sweep() == 0
        monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"half"
