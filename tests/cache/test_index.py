"""The index: order, labels, and every odd thing that a folder can hold."""

from __future__ import annotations

import errno
import os
import tracemalloc

import pytest

from vfmtok_fast.cache import CacheWriteError, ImagesChanged
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.format.index import (
    count_unlabelled,
    index_checksum,
    is_index,
    read_all,
    read_rows,
    write_index,
)
from vfmtok_fast.cache.make.changes import check_unchanged
from vfmtok_fast.cache.sources import Entry
from vfmtok_fast.cache.sources.base import NO_CLASS, NO_SIZE, NOT_UTF8
from vfmtok_fast.cache.sources.folder import FolderSource, walk


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))


def names(root):
    return [name for name, _ in walk(root)]


def make(root, path, shard_size=4):
    source = FolderSource(root)
    count, checksum, highest = write_index(path, source.entries(), shard_size)
    return (count, checksum), source.classes(highest)


def test_order_is_that_of_sorted_paths(tmp_path):
    wanted = [
        "a/x.png",
        "a-b/x.png",
        "a.png",
        "a/b/c.png",
        "a/b.png",
        "ab/x.png",
        "é/x.png",
        "B/q.png",
    ]
    touch(tmp_path, *wanted)
    assert names(tmp_path) == sorted(wanted)


def test_only_pictures_and_nothing_hidden(tmp_path):
    good = ["c/a.JPEG", "c/b.Jpg", "c/c.PNG", "c/d.webp", "c/e.tiff", "c/deep/er/f.gif"]
    touch(
        tmp_path,
        *good,
        ".DS_Store",
        "c/.DS_Store",
        "c/._a.JPEG",
        ".git/x.png",
        "c/note.txt",
        "c/png",
    )
    (tmp_path / "c" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "c" / "pipe.png")
    assert names(tmp_path) == sorted(good)
    assert dict(walk(tmp_path))["c/a.JPEG"] == len("c/a.JPEG")


def test_labels_are_places_of_sorted_class_folders(tmp_path):
    # Empty folders count, and folders are sorted by their names alone ("a" before "a-b").
    touch(tmp_path / "p", "a-b/1.png", "a/same.png", "c/deep/same.png", "loose.png")
    (tmp_path / "p" / "b").mkdir()
    (count, _), classes = make(tmp_path / "p", tmp_path / "index.parquet")
    assert count == 4 and classes == ["a", "a-b", "b", "c"]
    rows = read_rows(tmp_path / "index.parquet", 0)
    assert dict(zip(rows.paths, rows.labels, strict=True)) == {
        "a-b/1.png": 1,
        "a/same.png": 0,
        "c/deep/same.png": 3,
        "loose.png": NO_CLASS,
    }


def test_links(tmp_path):
    touch(tmp_path, "p/a/x.png", "elsewhere/y.png")
    root = tmp_path / "p"
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "a" / "loop.png").symlink_to(root / "a" / "loop.png")
    assert list(walk(root)) == [
        ("a/dangling.png", NO_SIZE),
        ("a/loop.png", NO_SIZE),
        ("a/x.png", 9),
        ("b/y.png", 15),
    ]


def test_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path / "p")
    os.makedirs(root + b"/caf\xe9")
    for name in (b"caf\xe9/x.png", b"b\xff.png", b"ok.png"):
        with open(root + b"/" + name, "wb") as file:
            file.write(b"x")
    make(tmp_path / "p", tmp_path / "index.parquet")
    rows = read_rows(tmp_path / "index.parquet", 0)
    assert rows.paths == ["b\\xff.png", "caf\\xe9/x.png", "ok.png"]
    assert [entry.size for entry in rows.entries] == [NOT_UTF8, NOT_UTF8, 1] and rows.labels == [
        -1,
        0,
        -1,
    ]


def test_very_deep_folders(tmp_path):
    deep = [tmp_path / "p"]
    for _ in range(1200):  # deeper than Python's stack, below the longest path
        deep[-1].mkdir()
        deep.append(deep[-1] / "d")
    touch(deep[-2], "x.png")
    assert names(tmp_path / "p") == ["d/" * 1199 + "x.png"]
    (deep[-2] / "x.png").unlink()
    for folder in reversed(deep[:-1]):  # pytest removes folders recursively and would fail here
        folder.rmdir()


def test_folder_that_cannot_be_listed(as_nobody):
    touch(as_nobody, "a/x.png")
    (as_nobody / "a").chmod(0)
    try:
        with pytest.raises(ValueError, match="a: cannot list this folder: Permission denied"):
            names(as_nobody)
    finally:
        (as_nobody / "a").chmod(0o755)


def test_shards_are_row_groups(tmp_path):
    touch(tmp_path / "p", *(f"c/{number}.png" for number in range(10)))
    path = tmp_path / "index.parquet"
    written, _ = make(tmp_path / "p", path, shard_size=4)
    assert written == index_checksum(path) and written[0] == 10 and is_index(path)
    shards = list(read_all(path))
    assert [(rows.first, len(rows)) for rows in shards] == [(0, 4), (4, 4), (8, 2)]
    last = read_rows(path, 2)
    assert last == shards[2] and last[1:].first == 9 and last[1:].paths == ["c/9.png"]
    with pytest.raises(ValueError, match="has 3 shards, no shard 3"):
        read_rows(path, 3)


def test_checksum_covers_paths_sizes_and_labels(tmp_path):
    path, checksums = tmp_path / "index.parquet", set()
    for name, size, label in (
        ("a/x.png", 1, 0),
        ("a/y.png", 1, 0),
        ("a/x.png", 2, 0),
        ("a/x.png", 1, 1),
    ):
        checksums.add(write_index(path, [Entry(name, size, label)], 4)[1])
    assert len(checksums) == 4


def test_not_an_index(tmp_path):
    path = tmp_path / "index.parquet"
    assert not is_index(path)
    path.write_bytes(b"PAR1 something else")
    assert not is_index(path)
    with pytest.raises(ValueError, match="cannot read the index") as caught:
        read_rows(path, 0)
    assert "\n" not in str(caught.value)


def test_changes_are_noticed_and_vanished_files_tolerated(tmp_path):
    root, path = tmp_path / "p", tmp_path / "index.parquet"
    touch(root, "a/1.png", "a/3.png", "b/1.png", "b/2.png")
    _, classes = make(root, path)
    check_unchanged(FolderSource(root), path, classes)
    (root / "a" / "1.png").unlink()
    (root / "b" / "2.png").unlink()
    check_unchanged(FolderSource(root), path, classes)
    touch(root, "a/2.png", "b/3.png")
    (root / "b" / "1.png").write_bytes(b"longer than before")
    with pytest.raises(
        ImagesChanged, match=r"2 added, 1 with another size, 2 gone; first: 'a/2\.png'"
    ):
        check_unchanged(FolderSource(root), path, classes)
    (root / "0").mkdir()
    with pytest.raises(ImagesChanged, match="class folders changed .* first: '0'"):
        check_unchanged(FolderSource(root), path, classes)


def test_many_additions_cost_no_open_files_and_no_reading_of_the_whole_index(tmp_path, monkeypatch):
    root, path = tmp_path / "p", tmp_path / "index.parquet"
    touch(root, *(f"c/{number:03d}.png" for number in range(120)))
    entries = list(FolderSource(root).entries())
    added = [entry for day in range(40) for entry in entries[day::40]]  # by day, each in order
    write_index(path, added, 7, index.Origin(runs=tuple(range(3, 120, 3))))
    opened, tables = [], []
    source, table = index._source, index.OpenIndex.table
    monkeypatch.setattr(index, "_source", lambda path: opened.append(path) or source(path))
    monkeypatch.setattr(
        index.OpenIndex, "table", lambda *which: tables.append(which) or table(*which)
    )
    check_unchanged(FolderSource(root), path, ["c"])
    # Each of the 40 additions lies in one or two of the 18 shards.
    assert len(opened) == 2 and len(tables) <= 40 + 18
    with index.opened(path) as found:
        for ends in ((0, 120), (0, 0), (6, 7), (7, 14), (5, 16), (119, 120), (120, 120)):
            assert list(found.entries(*ends)) == added[slice(*ends)]
        assert list(found.entries(100, None)) == added[100:]


def test_indexing_needs_little_memory(tmp_path):
    """Memory is that of one shard, however many there are: a million images take what 40,000 do."""
    names = (f"n{i // 1000:04d}/n{i // 1000:04d}_{i:08d}.JPEG" for i in range(40_000))
    entries = (Entry(name, i, i // 1000) for i, name in enumerate(names))
    tracemalloc.start()
    try:
        count, checksum, _ = write_index(tmp_path / "i.parquet", entries, 8192)
        assert (count, checksum) == index_checksum(tmp_path / "i.parquet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000 and peak < 12e6


def test_index_that_cannot_be_written(tmp_path):
    with pytest.raises(CacheWriteError, match="cannot write .*: No such file or directory"):
        write_index(tmp_path / "nowhere" / "i.parquet", [Entry("a.png", 1, -1)], 4)


def test_an_input_that_cannot_be_read_is_not_taken_for_the_index(tmp_path):
    def entries():
        yield Entry("a.png", 3, 0)
        raise OSError(errno.EIO, "Input/output error", "/data/x.tar")

    with pytest.raises(OSError, match="/data/x.tar") as error:
        write_index(tmp_path / "index.parquet", entries(), 1)
    assert type(error.value) is OSError and not list(tmp_path.iterdir())


def test_arrow_holds_nothing_of_pythons(tmp_path, monkeypatch):
    """Arrow gets no Python file: it releases one late, and an earlier exit aborts the process."""
    path = tmp_path / "index.parquet"
    write_index(path, [Entry(f"a/{number:04d}.png", number, 0) for number in range(300)], 100)

    def opened(self):
        raise AssertionError("a Python file for Arrow to read")

    monkeypatch.setattr(type(path), "open_bytes", opened)
    assert sum(len(rows) for rows in read_all(path)) == 300 and is_index(path)
    assert len(read_rows(path, 1)) == 100 and count_unlabelled(path) == 0
