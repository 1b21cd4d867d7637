"""Inputs other than a folder: each gives the same tokens, and no archive is trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index, shards
from vfmtok_fast.cache.sources import BadImage, Entry, open_source
from vfmtok_fast.cache.sources.lmdb import NotPlain, plain_pickle
from vfmtok_fast.cache.sources.tar import members

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


@pytest.mark.parametrize("kind", ["tar", "webdataset", "parquet", "lmdb"])
def test_an_input_is_called_as_it_was_named(tmp_path, fake, kind):
    """A single archive goes by its own name, not its folder's, as others may lie beside it."""
    root = fake.MAKERS[kind](fake.make_tree(tmp_path / "p"), tmp_path / "archive")
    source = open_source(root)
    assert source.shown == (root / "data.mdb" if kind == "lmdb" else root)
    assert open_source(source.shown, kind).shown == source.shown
    if kind in ("webdataset", "parquet"):
        one = sorted(path for path in root.iterdir() if path.suffix in (".tar", ".parquet"))[0]
        assert open_source(one).shown == one
    assert open_source(tmp_path / "p").shown == tmp_path / "p"


@pytest.mark.parametrize("kind", ["tar", "webdataset", "parquet", "lmdb"])
def test_the_same_tokens_as_from_the_folder(tmp_path, tokenizer, fake, kind):
    tree = fake.make_tree(tmp_path / "p", bad=(3,))
    root = fake.MAKERS[kind](tree, tmp_path / "archive")
    assert open_source(root).kind == kind
    outs = tmp_path / "folder", tmp_path / "other"
    views = ("center", "center-flip")
    for images, out in zip((tree, root), outs, strict=True):
        assert cache.build(images, out, tokenizer, views=views, **SMALL).bad == 1
    for number in range(3):
        paths = [shards.shard_path(out, number) for out in outs]
        (_, then), (_, now) = map(shards.read_shard, paths)
        for name in ("tokens", "index", "label", "status"):
            np.testing.assert_array_equal(getattr(then, name), getattr(now, name))
        # The shard holds the checksum of the quarantine list, which names places in the archive.
        assert kind != "tar" or paths[0].read_bytes() == paths[1].read_bytes()
    assert cache.verify(outs[1], tokenizer, root).agreement == 1.0
    # A resumed run makes the same bytes, whichever shard is missing.
    before = fake.read_tree(outs[1])
    shards.shard_path(outs[1], 1).unlink()
    assert cache.build(root, outs[1], tokenizer, views=views, **SMALL).encoded == 4
    assert fake.read_tree(outs[1]) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"p", root.name, "folder", "other"}
    )


def test_a_tar_of_tars_is_indexed_as_its_folder_would_be(tmp_path, tree, fake):
    root = fake.make_tar_of_tars(tree, tmp_path / "train.tar")
    ours, folder = open_source(root), open_source(tree)
    assert [entry[:3] for entry in ours.entries()] == [entry[:3] for entry in folder.entries()]
    assert ours.classes(-1) == folder.classes(-1) == ["class0", "class1", "class2"]


def test_class_names_and_numbers(tmp_path, tree, tokenizer, out, fake):
    assert open_source(fake.make_parquet(tree, tmp_path / "q")).classes(2) == [
        "fish",
        "bird",
        "cat",
    ]
    few = open_source(fake.make_parquet(tree, tmp_path / "few", names=("fish",)))
    assert few.classes(2) == ["0", "1", "2"]
    cache.build(fake.make_webdataset(tree, tmp_path / "w"), out, tokenizer, **SMALL)
    assert cache.read_manifest(out).classes == ["0", "1", "2"]


def test_a_tar_of_class_folders(tmp_path, tokenizer, out, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name in ("./b/1.png", "./a/2.png", "loose.png", "a/.DS_Store", "a/._2.png", "a/n.txt"):
            fake.add_member(archive, name, data)
        fake.add_member(archive, "c/", type=tarfile.DIRTYPE)
    source = open_source(tmp_path / "p.tar")
    assert [(entry.path, entry.label) for entry in source.entries()] == [
        ("b/1.png", 1),
        ("a/2.png", 0),
        ("loose.png", -1),
    ]
    assert source.classes(-1) == ["a", "b"]
    assert cache.build(tmp_path / "p.tar", out, tokenizer, **SMALL).bad == 0


@pytest.mark.parametrize(
    "names, paths, classes",
    [
        (["t/v/a/1.png", "t/v/b/2.png"], ["a/1.png", "b/2.png"], ["a", "b"]),
        (["t/a/1.png", "t/a/deep/2.png"], ["a/1.png", "a/deep/2.png"], ["a"]),
        (["a/1.png", "a-b/2.png"], ["a/1.png", "a-b/2.png"], ["a", "a-b"]),
        (["1.png", "2.png"], ["1.png", "2.png"], []),
        (["t/a/1.png", "2.png"], ["t/a/1.png", "2.png"], ["t"]),
    ],
)
def test_folders_around_the_classes_are_left_out(tmp_path, names, paths, classes, fake):
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name in names:
            fake.add_member(archive, name, b"x")
    source = open_source(tmp_path / "p.tar")
    entries = list(source.entries())
    assert [entry.path for entry in entries] == paths and source.classes(-1) == classes
    numbers = [classes.index(path.split("/")[0]) if "/" in path else -1 for path in paths]
    assert [entry.label for entry in entries] == numbers


def test_members_that_would_escape_are_quarantined(tmp_path, tokenizer, out, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        fake.add_member(archive, "a/good.png", data)
        fake.add_member(archive, "/tmp/absolute.png", data)
        fake.add_member(archive, "a/../../up.png", data)
        fake.add_member(archive, "a/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        fake.add_member(archive, "a/hard.png", type=tarfile.LNKTYPE, linkname="../x.png")
        fake.add_member(archive, "../n01.tar", data)
        fake.add_member(archive, os.fsdecode(b"a/caf\xe9.png"), data)
    before = fake.read_tree(tmp_path)
    summary = cache.build(tmp_path / "p.tar", out, tokenizer, **SMALL)
    lines = "".join(path.read_text() for path in sorted((out / "quarantine").iterdir()))
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines.splitlines())}
    escape = "its name is absolute or holds '..', which no archive of pictures needs"
    assert summary.images == 6 and reasons == {
        "/tmp/absolute.png": escape,
        "a/../../up.png": escape,
        "a/link.png": "not a regular file in the archive",
        "a/hard.png": "not a regular file in the archive",
    }
    after = fake.read_tree(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("tokens/")} == before
    assert cache.verify(out, tokenizer, tmp_path / "p.tar").ok


@pytest.mark.parametrize("cut", [700, -1024, -10240, 5000])
@pytest.mark.parametrize("maker", ["tar", "webdataset"])
def test_a_truncated_tar_is_refused(tmp_path, tree, tokenizer, out, maker, cut, fake):
    root = fake.MAKERS[maker](tree, tmp_path / "archive")
    path = root if root.is_file() else root / "train-001.tar"
    data = path.read_bytes()
    path.write_bytes(data.rstrip(b"\0") if cut == -1024 else data[:cut])
    with pytest.raises(ValueError, match=path.name) as caught:
        cache.build(root, out, tokenizer, **SMALL)
    assert "\n" not in str(caught.value) and not (out / "manifest.json").exists()


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, tree, fake):
    """tarfile alone stops there without an error, and half the data set would be lost."""
    path = fake.make_tar_of_tars(tree, tmp_path / "train.tar")
    data = bytearray(path.read_bytes())
    second = data.index(b"class1.tar")
    data[second + 120] ^= 1
    path.write_bytes(data)
    with open(path, "rb") as file, pytest.raises(ValueError, match="damaged or truncated at byte"):
        list(members(file, path))
    data = bytearray(fake.make_tar_of_tars(tree, path).read_bytes())
    inner = data.index(b"007.png")
    data[inner + 120] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        list(open_source(path).entries())


def test_an_archive_that_changes_is_noticed(tmp_path, tree, tokenizer, out, fake):
    root = fake.make_webdataset(tree, tmp_path / "w")
    cache.build(root, out, tokenizer, **SMALL)
    (root / "train-002.tar").write_bytes((root / "train-000.tar").read_bytes())
    with pytest.raises(cache.ImagesChanged, match=r"1 of its files .*'train-002\.tar', not there"):
        cache.build(root, out, tokenizer, **SMALL)
    (root / "train-002.tar").unlink()
    with open(root / "train-001.tar", "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(cache.ImagesChanged, match=r"train-001\.tar.* then, .* now"):
        cache.build(root, out, tokenizer, **SMALL)
    with pytest.raises(cache.ImagesChanged, match="is a folder input, .* made from webdataset"):
        cache.build(tree, out, tokenizer, **SMALL)


def test_members_that_move_under_the_run(tmp_path, tree, tokenizer, out, fake):
    root = fake.make_webdataset(tree, tmp_path / "w")
    job = cache.prepare(root, out, tokenizer, **SMALL)
    entry = next(job.source.entries())
    assert job.source.read(entry)
    with pytest.raises(BadImage, match=f"changed since it was indexed: 7 bytes then, {entry.size}"):
        job.source.read(entry._replace(size=7))
    path = root / "train-000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:512] + bytes(512) + data[512:])
    cache.encode_shard(job, 0)
    assert shards.read_header(shards.shard_path(out, 0)).bad == 4
    path.unlink()
    with pytest.raises(FileNotFoundError, match="this archive has disappeared"):
        cache.encode_shard(job, 0)


def test_webdataset_labels_and_samples_without_pictures(tmp_path, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    (tmp_path / "w").mkdir()
    with tarfile.open(tmp_path / "w" / "a.tar", "w") as archive:
        for key, label in (("a", b"7\n"), ("b", b"cat"), ("c", b"-1"), ("d", b"9" * 9), ("e", b"")):
            fake.add_member(archive, f"deep/{key}.seg.png", b"mask")
            fake.add_member(archive, f"deep/{key}.png", data)
            fake.add_member(archive, f"deep/{key}.cls", label)
        fake.add_member(archive, "f.png", data)
        fake.add_member(archive, "g.txt", b"no picture")
    source = open_source(tmp_path / "w")
    found = {entry.path: (entry.label, entry.size) for entry in source.entries()}
    size = len(data)
    assert found == {
        "a.tar/deep/a.png": (7, size),
        "a.tar/deep/b.png": (-1, -4),
        "a.tar/deep/c.png": (-1, size),
        "a.tar/deep/d.png": (-1, -4),
        "a.tar/deep/e.png": (-1, -4),
        "a.tar/f.png": (-1, size),
    }


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_rows_in_any_order(tmp_path, fake, group):
    tree = fake.make_tree(tmp_path / "p", count=60)
    source = open_source(fake.make_parquet(tree, tmp_path / "q", group))
    wanted = [data for _, data, _ in fake.pictures(tree)]
    entries = list(source.entries())
    for place in (*range(60), 59, 0, 31, 30, 4, 3, 58):
        assert source.read(entries[place]) == wanted[place], place


def test_parquet_rows_that_hold_no_picture(tmp_path, tokenizer, out, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    values = [{"bytes": data}, {"bytes": None}, None, {"bytes": b""}, {"bytes": b"<html>"}]
    kind = pa.struct([("bytes", pa.binary())])
    table = pa.table({"img": pa.array(values, kind), "label": [None, 1, 2, -1, 5]})
    pq.write_table(table, tmp_path / "q.parquet")
    summary = cache.build(tmp_path / "q.parquet", out, tokenizer, **SMALL)
    assert (summary.images, summary.bad) == (5, 4)
    assert index.read_rows(out / "index.parquet", 0).labels == [-1, 1, 2, -1]
    assert cache.read_manifest(out).classes == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    "table, text",
    [
        ({"text": ["a"]}, "no pictures in it: expected a column .*; got text"),
        ({"image": [b"x"], "label": ["cat"]}, "column 'label' must hold class numbers, got string"),
    ],
)
def test_parquet_of_another_kind_is_refused(tmp_path, tokenizer, out, table, text):
    pq.write_table(pa.table(table), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=text) as caught:
        cache.build(tmp_path / "q.parquet", out, tokenizer, **SMALL)
    assert "\n" not in str(caught.value) and not out.exists()


def test_truncated_parquet_is_refused(tmp_path, tree, tokenizer, out, fake):
    root = fake.make_parquet(tree, tmp_path / "q")
    path = root / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="00001-of-00002.parquet: cannot be read as Parquet"):
        cache.build(root, out, tokenizer, **SMALL)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_lmdb_pickles_run_nothing(tmp_path, tree, tokenizer, out, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    data = fake.pictures(tree)[0][1]
    extra = [
        (11, pickle.dumps(Evil())),
        (12, pickle.dumps({"image": data, "label": Evil()})),
        (13, pickle.dumps({"image": data, "label": 1}, protocol=2)),
        (14, b"\x80\x04garbage"),
        (15, pickle.dumps({"image": data})),
        (16, pickle.dumps({"image": "text", "label": 1})),
        (17, pickle.dumps({"image": data, "label": "cat"})),
        (18, pickle.dumps({"image": data, "label": 2})[:-1]),
    ]
    root = fake.make_lmdb(tree, tmp_path / "db", count=20, extra=extra)
    summary = cache.build(root, out, tokenizer, **SMALL)
    assert (summary.images, summary.bad) == (20, 9)
    assert not (tmp_path / "pwned").exists()
    assert cache.verify(out, tokenizer, root).ok


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_pickle_reads_what_pickle_wrote(protocol):
    for value in ({"image": b"x" * 10, "label": 7}, {"image": b"y" * 70_000, "label": -(2**40)}, 5):
        assert plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("value", [Evil(), [1], (1,), 1.5, None, {"a": {1}}, b"x".join])
def test_plain_pickle_refuses_everything_else(value):
    with pytest.raises(NotPlain, match="instruction"):
        plain_pickle(pickle.dumps(value))


def test_plain_pickle_survives_damage():
    data = pickle.dumps({"image": b"x" * 300, "label": 7})
    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
            try:
                plain_pickle(changed)
            except NotPlain as error:
                assert "\n" not in str(error)
    with pytest.raises(NotPlain, match="more than one picture"):
        plain_pickle(b"\x80\x04" + b"K\x01" * 2000)


def test_lmdb_that_will_not_do(tmp_path, tree, tokenizer, out, monkeypatch, fake):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "empty")) as database, database.begin(write=True) as writer:
        writer.put(b"length", b"3")
    with pytest.raises(ValueError, match="no key num_samples"):
        cache.build(tmp_path / "empty", out, tokenizer, **SMALL)
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="cannot be read as LMDB"):
        cache.build(tmp_path / "no", out, tokenizer, **SMALL)
    root = fake.make_lmdb(tree, tmp_path / "db")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install 'vfmtok-fast\[lmdb\]'"):
        cache.build(root, out, tokenizer, **SMALL)
    assert not out.exists()


def test_kinds_are_told_apart(tmp_path, tree):
    (tree / "stray.tar").write_bytes(b"")
    assert open_source(tree).kind == "folder"
    with pytest.raises(ValueError, match="decompress it"):
        (tmp_path / "x.tar.gz").write_bytes(b"")
        open_source(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match=r"no \*\.parquet files"):
        open_source(tree, "parquet")
    with pytest.raises(ValueError, match="must be one of folder, tar"):
        open_source(tree, "zip")
    with pytest.raises(ValueError, match="must be one tar file"):
        open_source(tree, "tar")


def test_indexing_an_archive_needs_little_memory(tmp_path):
    """Memory is that of one shard and one header, however many there are."""
    header = tarfile.TarInfo("n01440764/n01440764_10026.JPEG").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "p.tar").write_bytes(header * 5_000 + bytes(1024))
    tracemalloc.start()
    try:
        source = open_source(tmp_path / "p.tar")
        origin = index.Origin(source.kind, source.files())
        count, *_ = index.write_index(tmp_path / "i", source.entries(), 500, origin)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_000 and peak < 2e6


def test_the_checksum_covers_places_and_files(tmp_path):
    checksums = set()
    for entry, origin in (
        (Entry("a.png", 1, 0, "x.tar", 512), index.Origin("tar", {"x.tar": 9})),
        (Entry("a.png", 1, 0, "x.tar", 1024), index.Origin("tar", {"x.tar": 9})),
        (Entry("a.png", 1, 0, "y.tar", 512), index.Origin("tar", {"x.tar": 9})),
        (Entry("a.png", 1, 0, "x.tar", 512), index.Origin("tar", {"x.tar": 8})),
        (Entry("a.png", 1, 0), index.Origin()),
    ):
        count, checksum, _ = index.write_index(tmp_path / "i", [entry], 4, origin)
        assert (count, checksum) == index.index_checksum(tmp_path / "i")
        assert index.read_rows(tmp_path / "i", 0).entries == [entry]
        checksums.add(checksum)
    assert len(checksums) == 5


def test_an_lmdb_that_was_cut_short(tmp_path, fake):
    """A cut file is refused: lmdb maps the file, and a page past its end would raise SIGBUS."""
    root = fake.MAKERS["lmdb"](fake.make_tree(tmp_path / "p"), tmp_path / "archive")
    whole = (root / "data.mdb").stat().st_size
    assert len(list(open_source(root).entries())) == 11
    cut = tmp_path / "cut"
    shutil.copytree(root, cut)
    os.truncate(cut / "data.mdb", whole - 8192)
    with pytest.raises(ValueError, match=f"was cut short, to {whole - 8192} of .* copy it again"):
        list(open_source(cut).entries())
