"""Caches in a store behind fsspec: no renames, torn puts, failing puts, and reading back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from scripts import START
from torch.utils.data import DataLoader

import vfmtok_fast
from vfmtok_fast import cache, cli
from vfmtok_fast.cache.format import shards
from vfmtok_fast.cache.store import StoreError, UrlPlace, place

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}
_count = itertools.count()


class Killed(BaseException):
    """Stands for kill -9; the package must not catch it."""


class Faulty(MemoryFileSystem):
    """A store whose n-th put fails before, halfway or after it, with an error or like a kill."""

    protocol = "faulty"
    at, moment, error, puts = 0, "", Killed, 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def pipe_file(self, path, value, **options):
        Faulty.puts += 1
        if Faulty.puts != Faulty.at:
            return super().pipe_file(path, value, **options)
        if Faulty.moment != "before":
            half = value if Faulty.moment == "after" else value[: len(value) // 2]
            super().pipe_file(path, half, **options)
        raise Faulty.error("the store is out of order")

    def put_file(self, lpath, rpath, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    @classmethod
    def arm(cls, at, moment="before", error=Killed):
        cls.at, cls.moment, cls.error, cls.puts = at, moment, error, 0


fsspec.register_implementation("faulty", Faulty)


@pytest.fixture
def url():
    """The URL of a new place in the faulty in-memory store; a test arms the fault itself."""
    Faulty.arm(0)
    return f"faulty://bucket{next(_count)}/tokens"


def read_store(url):
    """Return every object below a URL with its bytes."""
    root = Faulty._strip_protocol(url)
    files = {path: file.getvalue() for path, file in MemoryFileSystem.store.items()}
    return {k.removeprefix(root + "/"): v for k, v in files.items() if k.startswith(root + "/")}


def test_the_same_files_as_on_a_disk(tmp_path, out, url, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(3, 7))
    cache.build(tree, out, tokenizer, **SMALL)
    summary = cache.build(tree, url + "/", tokenizer, **SMALL)
    assert (summary.encoded, summary.bad, summary.exit_code) == (11, 2, 3)
    assert read_store(url) == fake.read_tree(out)
    assert not Path("faulty:").exists()
    assert cache.build(tree, url, tokenizer, **SMALL).encoded == 0
    assert place(f"file://{out}") == out
    assert cache.status(f"file://{out}").state == "complete"


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("error", [Killed, OSError, RuntimeError])
def test_whenever_a_put_fails_the_next_run_goes_on(tmp_path, url, tokenizer, fake, moment, error):
    """The next run completes the cache, whichever put failed.

    11 images in 3 shards, 2 with a quarantine list, take 8 puts; a ninth never comes.
    """
    tree = fake.make_tree(tmp_path / "p", bad=(3, 7))
    cache.build(tree, url + "-whole", tokenizer, **SMALL)
    for at in range(1, 9):
        Faulty.arm(at, moment, error)
        folder = f"{url}-{at}"
        with pytest.raises(Killed if error is Killed else cache.CacheWriteError) as caught:
            cache.build(tree, folder, tokenizer, **SMALL)
        if error is not Killed:
            text = str(caught.value)
            assert "\n" not in text and f"cannot write {folder}/" in text
            assert "the store is out of order; check the store and run again" in text
        assert Faulty.puts == at and cache.build(tree, folder, tokenizer, **SMALL).bad == 2
        assert read_store(folder) == read_store(url + "-whole"), at
    Faulty.arm(9)
    cache.build(tree, f"{url}-9", tokenizer, **SMALL)


# Forks one builder after another and kills each at a random moment. The file system has neither
# renames nor atomic puts: it writes to the final name piece by piece.
HARNESS = (
    START
    + """
import fsspec
from fsspec.implementations.local import LocalFileSystem

class Plain(LocalFileSystem):
    protocol = "plain"
    def pipe_file(self, path, value, **options):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(value), 400):
                file.write(value[start : start + 400])
                time.sleep(0.001)
    def put_file(self, lpath, rpath, **options):
        self.pipe_file(rpath, open(lpath, "rb").read())

fsspec.register_implementation("plain", Plain)

def start(out):
    pid = os.fork()
    if pid == 0:
        cache.build(sys.argv[2], "plain://" + out, fake.FakeTokenizer(),
                    batch_size=3, shard_size=2, workers=2)
        os._exit(0)
    return pid

def objects():
    folder = sys.argv[3] + "/shards"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0

assert os.waitpid(start(sys.argv[3] + "-whole"), 0)[1] == 0
rng, killed = random.Random(0), 0
for _ in range(12):
    # After so many more objects and a moment, whatever the pace of the machine.
    wanted = objects() + rng.randrange(3)
    pid, ended = start(sys.argv[3]), (0, 0)
    while not ended[0] and objects() < wanted:
        time.sleep(0.001)
        ended = os.waitpid(pid, os.WNOHANG)
    if not ended[0]:
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(ended[1]) or ended[1] == 0
    killed += os.WIFSIGNALED(ended[1])
assert os.waitpid(start(sys.argv[3]), 0)[1] == 0
print(killed)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_an_extension_that_dies_in_any_put_goes_on(tree, url, tokenizer, fake, moment):
    cache.build(tree, url, tokenizer, **SMALL)
    fake.write_picture(tree / "class0" / "zz.png", 77)
    for at in itertools.count(1):
        Faulty.arm(at, moment)
        try:
            cache.prepare(tree, url, tokenizer, extend=True, **SMALL)
        except Killed:
            continue
        finally:
            Faulty.arm(0)
        break
    assert at >= 3
    assert cache.build(tree, url, tokenizer, **SMALL).images == 12 and cache.verify(url).ok


def test_killed_at_random_moments_where_nothing_is_atomic(tmp_path, fake):
    tree = fake.make_tree(tmp_path / "p", count=30, bad=(3, 4, 11))
    cache.build(tree, tmp_path / "whole", fake.FakeTokenizer(), **{**SMALL, "shard_size": 2})
    environment = {**os.environ, "PYTHONPATH": str(Path(vfmtok_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, fake.__file__, str(tree), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    whole = fake.read_tree(tmp_path / "whole")
    assert fake.read_tree(tmp_path / "out-whole") == whole
    assert fake.read_tree(tmp_path / "out") == whole


def test_reading_back(tmp_path, out, url, tokenizer, fake, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    tree = fake.make_tree(tmp_path / "p", count=20, bad=(1, 10))
    views = ("center", "center-flip")
    for target in (out, url):
        cache.build(tree, target, tokenizer, views=views, **SMALL)
    assert cache.status(url) == cache.status(out)
    assert list(cache.failures(url)) == list(cache.failures(out))
    report = cache.verify(url, tokenizer, tree)
    assert report.ok and report.agreement == 1.0 and report.bad == 2
    local, remote = cache.TokenCache(out), cache.TokenCache(url)
    assert not (tmp_path / "home").exists()  # nothing is fetched before it is needed
    assert len(remote) == 18 and (remote.rows == local.rows).all()
    for position in range(18):
        assert torch.equal(remote[position][0], local[position][0])
        assert remote[position][1] == local[position][1]
    for view in views:
        pairs = zip(cache.read_tokens(url, view), cache.read_tokens(out, view), strict=True)
        assert all((ours == theirs).all() for ours, theirs in pairs)
    copies = fake.read_tree(tmp_path / "home")
    assert len(copies) == 5 and set(copies.values()) == {
        data for name, data in read_store(url).items() if name.startswith("shards/")
    }
    data = cache.TokenCacheDataset(url, seed=3, mirror=tmp_path / "mirror")
    loader = DataLoader(data, batch_size=5, num_workers=2)
    wanted = [tokens for tokens, _ in cache.TokenCacheDataset(out, seed=3)]
    assert torch.equal(torch.cat([tokens for tokens, _ in loader]), torch.stack(wanted))
    assert sorted(fake.read_tree(tmp_path / "mirror").values()) == sorted(copies.values())


@pytest.mark.parametrize("mirror", ["~/mirror", "mirror", None])
def test_mirrors_by_short_names(tree, url, tokenizer, tmp_path, monkeypatch, mirror):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "mirror")
    monkeypatch.chdir(tmp_path)
    cache.build(tree, url, tokenizer, **SMALL)
    reader = cache.TokenCache(url, mirror=mirror)
    monkeypatch.chdir(tree)
    assert len(reader[0][0]) and list((tmp_path / "mirror").rglob("*.safetensors"))
    assert not (tree / "mirror").exists() and not (tree / "~").exists()
    with pytest.raises(ValueError, match="a mirror must be a local folder"):
        cache.TokenCache(url, mirror=url)


def test_a_store_that_changes_under_its_reader(tree, url, tokenizer, tmp_path):
    """A shard made again, as by repair: sound, and of the same tokenizer."""
    cache.build(tree, url, tokenizer, **SMALL)
    reader, mirror = cache.TokenCache(url, mirror=tmp_path / "mirror"), tmp_path / "mirror"
    header, shard = shards.read_shard(shards.shard_path(place(url), 0))
    shard.tokens = shard.tokens[::-1]
    shards.write_shard(place(url), header.fingerprint, shard)
    with pytest.raises(ValueError, match="tokens-00000.*: changed since this cache was opened"):
        reader[0]
    assert not mirror.exists()


def test_export_and_repair(tmp_path, out, url, tree, tokenizer, fake):
    for target in (out, url):
        cache.build(tree, target, tokenizer, **SMALL)
    for format in ("rar", "parquet"):
        for source, target in ((out, tmp_path / format), (url, f"{url}-{format}/x")):
            assert cache.export(source, target, format) == 11
        assert read_store(f"{url}-{format}") == {"x": (tmp_path / format).read_bytes()}
    assert cache.export(url, tmp_path / "llamagen", "llamagen") == 11
    with pytest.raises(ValueError, match="llamagen has two files per picture; write to a local"):
        cache.export(url, url + "-llamagen", "llamagen")
    with pytest.raises(FileExistsError, match="already exists"):
        cache.export(url, url + "-rar/x", "rar")
    before, said = read_store(url), []
    path = shards.shard_path(place(url), 1)
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.put(bytes(damaged))
    (path.parent / "tokens-00099.safetensors").put(b"")
    assert [p.partition(": ")[2] for p in cache.verify(url).problems] == [
        "tokens does not match its checksum; run vfmtok-fast repair",
        "does not belong to this cache",
    ]
    with pytest.raises(ValueError, match="tokens-00001.safetensors: tokens does not match its"):
        list(cache.TokenCache(url, mirror=tmp_path / "mirror"))
    assert cache.repair(tree, url, tokenizer, tell=said.append) == 1 and len(said) == 2
    (path.parent / "tokens-00099.safetensors").remove()
    assert read_store(url) == before
    assert len(list(cache.TokenCache(url, mirror=tmp_path / "mirror"))) == 11


def test_shards_that_are_cut_short_are_made_again(tree, url, tokenizer):
    cache.build(tree, url, tokenizer, **SMALL)
    before, path = read_store(url), shards.shard_path(place(url), 2)
    data = path.read_bytes()
    for end in (0, 5, 9, 300, len(data) - 1):
        path.put(data[:end])
        assert cache.status(url).damaged == (2,)
        with pytest.raises(ValueError, match="tokens-00002.safetensors: damaged or not a shard"):
            cache.TokenCache(url)
        assert cache.build(tree, url, tokenizer, **SMALL).encoded == 3
        assert read_store(url) == before


def test_what_is_refused(tree, url, tokenizer):
    cache.build(tree, url, tokenizer, **SMALL)
    with pytest.raises(cache.FingerprintMismatch, match=r"batch_size \(there 3, here 5\)"):
        cache.build(tree, url, tokenizer, **{**SMALL, "batch_size": 5})
    (place(url + "-other") / "note.txt").put(b"x")
    with pytest.raises(FileExistsError, match=r"holds something other than a cache \('note.txt'\)"):
        cache.build(tree, url + "-other", tokenizer, **SMALL)
    with pytest.raises(FileNotFoundError, match="no token cache here"):
        cache.TokenCache(url + "-nowhere")
    with pytest.raises(ValueError, match="nosuch://x: .*[Pp]rotocol"):
        cache.build(tree, "nosuch://x", tokenizer, **SMALL)
    fsspec.register_implementation(
        "lacking", "no_such_package.Files", clobber=True, errtxt="Install no_such_package"
    )
    with pytest.raises(ValueError, match=r"Install no_such_package; pip install 'vfmtok-fast\[cl"):
        cache.status("lacking://bucket/x")
    with pytest.raises(ValueError, match="pictures are read from local files"):
        cache.build("s3://bucket/train", url, tokenizer, **SMALL)


def test_a_store_that_cannot_be_read_ends_in_one_line(tree, url, tokenizer, monkeypatch, capsys):
    cache.build(tree, url, tokenizer, **SMALL)

    def refuse(self, path, **options):
        raise RuntimeError("no credentials\nanywhere")

    monkeypatch.setattr(Faulty, "cat_file", refuse)
    with pytest.raises(StoreError, match="manifest.json: no credentials anywhere") as caught:
        cache.status(url)
    assert "\n" not in str(caught.value)
    assert cli.main(["status", url]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("call, name", [("cat_file", "tokens-00001"), ("_open", "index.parquet")])
def test_a_store_that_fails_for_a_moment_loses_nothing(
    tree, url, tokenizer, monkeypatch, call, name
):
    """An answer that does not come says nothing about the file: it is not damaged."""
    cache.build(tree, url, tokenizer, **SMALL)
    before, answer = read_store(url), getattr(Faulty, call)

    def fail(self, path, *arguments, **options):
        if name in path:
            raise TimeoutError("no answer")
        return answer(self, path, *arguments, **options)

    monkeypatch.setattr(Faulty, call, fail)
    for work in (cache.repair, cache.build):
        settings = SMALL if work is cache.build else {}
        with pytest.raises(StoreError, match=f"{name}.*: no answer"):
            work(tree, url, tokenizer, **settings)
        assert read_store(url) == before
    if call == "cat_file":
        with pytest.raises(StoreError, match=f"{name}.*: no answer"):
            cache.verify(url)


def test_commands(tree, url, capsys, tmp_path):
    small = ["--untrained", "small", "--device", "cpu", "--batch-size", "4"]
    assert cli.main(["cache", str(tree), url, *small]) == 0
    assert json.loads(read_store(url)["manifest.json"])["counts"]["images"] == 11
    assert cli.main(["status", url]) == 0
    sheet = f"{url}.png"
    assert cli.main(["verify", url, "--images", str(tree), "--sheet", sheet, *small[:4]]) == 0
    assert cli.main(["export", url, str(tmp_path / "x.jsonl"), "--format", "rar"]) == 0
    told = capsys.readouterr().out
    assert f"{url}: sound; 11 pictures" in told and f"wrote {sheet}: " in told
    assert cli.main(["verify", url, "--images", str(tree), "--sheet", sheet, *small[:4]]) == 2


def test_paths():
    path = UrlPlace("s3://bucket/a/b")
    assert (path.name, str(path.parent), str(path / "c")) == ("b", "s3://bucket/a", f"{path}/c")
