"""Many images: 200,000 rows are exact despite kills; a million are indexed in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripts import START

import vfmtok_fast
from vfmtok_fast import cache

SCALE = (
    START
    + """
import numpy as np
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.make import encode, parts
from vfmtok_fast.cache.sources import Entry
from vfmtok_fast.cache.store import place
out = place(sys.argv[2])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""
)

# Images are made up from their row number, so that all the time goes to the code under test.
ROWS = (
    SCALE
    + """
def bases(source, entry, plan, manifest):
    if entry.offset % 1009 == 7:
        return encode.BadImage(1, "made up")
    base = np.empty((fake.SIDE, fake.SIDE, 3), np.uint8)
    base[:] = entry.offset & 255, entry.offset >> 8 & 255, entry.offset >> 16
    return [base]

encode.decode = bases

def build(name, folder, **place):
    images = out.with_name(name + ".parquet")
    settings = {"batch_size": 64, "shard_size": 4096, "workers": 1, **place}
    return cache.build(images, folder, fake.FakeTokenizer(), **settings)

def start(rank, world):
    pid = os.fork()
    if pid == 0:
        build("many", out, rank=rank, world_size=world)
        os._exit(0)
    return pid

build("few", out.with_name("few"))
before, rng, killed = peak(), random.Random(0), 0
def finished():
    return len(list(out.glob("shards/*.safetensors")))

for world in (3, 2):
    done = finished()
    pids = [start(rank, world) for rank in range(world)]
    while finished() == done:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
summary = build("many", out)
print(killed, summary.encoded, peak() - before)
"""
)

INDEX = (
    SCALE
    + """
def entries(after):
    for number in range(0 if after is None else after.size + 1, 1_000_000):
        if number == stop:
            os._exit(9)
        group = number // 1000
        yield Entry(f"n{group:08d}/n{group:08d}_{number:08d}.JPEG", number, group)

def write(path):
    return parts.write_in_parts(path, entries, 8192, index.Origin(), "somewhere")

out.mkdir()
before = peak()
pid = os.fork()
if pid == 0:
    stop = 700_000
    write(out / "index.parquet")
os.waitpid(pid, 0)
kept, stop = len(list((out / parts.FOLDER).iterdir())), -1
count, checksum, highest = write(out / "index.parquet")
assert index.index_checksum(out / "index.parquet") == (count, checksum)
print(kept * parts.PART, count, peak() - before)
"""
)


def run(script, fake, out):
    environment = {**os.environ, "PYTHONPATH": str(Path(vfmtok_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, fake.__file__, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_two_hundred_thousand_rows(tmp_path, out, fake):
    for name, count in (("many", 200_000), ("few", 20_000)):
        # The first image can be read; with none, the run would not begin.
        images = [b"P6 1 1 255\n---"] + [b"x"] * (count - 1)
        table = pa.table({"image": images, "label": np.arange(count) % 1000})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=1000)
    killed, encoded, grown = run(ROWS, fake, out)
    assert int(killed) == 5 and 0 < int(encoded) < 200_000
    assert float(grown) < 40, "MB more for ten times as many pictures"
    rows = np.arange(200_000)
    good = rows % 1009 != 7
    tokens, labels = cache.read_tokens(out)
    # The fake tokenizer's sum over pixels, taken per colour channel.
    pixels = fake.SIDE * fake.SIDE
    places = np.arange(3 * pixels * fake.TOKENS).reshape(3, pixels, fake.TOKENS)
    weights = (places * 7919 % 65521).sum(1)
    colours = np.stack([rows & 255, rows >> 8 & 255, rows >> 16], -1)[good]
    np.testing.assert_array_equal(tokens, colours @ weights % fake.CODEBOOK)
    np.testing.assert_array_equal(labels, rows[good] % 1000)
    report = cache.verify(out)
    assert report.ok and report.bad == (~good).sum() and report.shards == 49
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name]


@pytest.mark.slow
def test_a_million_pictures_are_indexed_in_little_memory_and_from_where_it_stopped(
    tmp_path, out, fake
):
    kept, count, grown = run(INDEX, fake, out)
    assert int(kept) == 655_360 and int(count) == 1_000_000
    assert float(grown) < 300, "MB on top of what the import takes"
    left = sorted(path.name.partition(".tmp-")[0] for path in out.iterdir())
    assert left == ["index.parquet", "index.parquet"], "the index, and what the killed one left"
