"""Everything left out of an input is reported, and nothing is read under the wrong name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import types

import pytest
from PIL import Image

from vfmtok_fast import cache, cli, images
from vfmtok_fast.cache.format import index, manifest, shards
from vfmtok_fast.cache.make import parts
from vfmtok_fast.cache.sources import base, folder, open_source

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}
JUNK = ["__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"]


def archive_of(path, fake, *members):
    """Write a tar whose members are given as (name, data) or (name, data, fields)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data, *fields in members:
            fake.add_member(archive, name, data, **(fields[0] if fields else {}))
    return path


def found(source):
    return {entry.path: (entry.label, source.read(entry)) for entry in source.entries()}


# ---- names with dots in WebDataset shards


def test_names_with_further_dots(tmp_path, fake):
    path = archive_of(
        tmp_path / "w" / "a.tar",
        fake,
        ("d.x/dog.v2.jpg", b"1"),
        ("d.x/dog.cls", b"3"),
        ("0001.left.png", b"2"),
        ("0001.right.png", b"3"),
        ("0001.cls", b"4"),
        ("0002.seg.png", b"4"),
        ("0002.JPG", b"5"),
        ("0003.txt", b"6"),
        ("0004.heic", b"7"),
    )
    source = open_source(path)
    assert found(source) == {
        "a.tar/d.x/dog.v2.jpg": (3, b"1"),
        "a.tar/0001.left.png": (4, b"2"),
        "a.tar/0002.jpg": (-1, b"5"),
    }
    assert source.left_out == {
        "samples without a picture": 1,
        "pictures of samples that have another one before": 1,
        ".heic files (pip install 'vfmtok-fast[heif]' to read them)": 1,
    }


def test_what_was_left_out_is_said(tmp_path, tree, tokenizer, out, fake):
    archive_of(tmp_path / "w" / "a.tar", fake, ("1.txt", b"x"), ("1.cls", b"1"), ("2.txt", b"x"))
    with pytest.raises(ValueError, match="no pictures .*left out: 2 samples without a picture"):
        cache.build(tmp_path / "w", out, tokenizer, **SMALL)
    (tree / "class0" / "photo.HEIC").write_bytes(b"x")
    (tree / "class0" / "photo.psd").write_bytes(b"x")
    with pytest.warns(base.LeftOutWarning, match=r"left out: 1 \.heic files .*, 1 \.psd files"):
        cache.build(tree, out, tokenizer, **SMALL)
    tar = fake.make_tar_of_tars(tree, tmp_path / "t.tar")
    with tarfile.open(tar, "a") as archive:
        fake.add_member(archive, "more/x.heif", b"x")
    with pytest.warns(base.LeftOutWarning, match=r"1 \.heic files .*1 \.heif files"):
        cache.build(tar, out.with_name("other"), tokenizer, **SMALL)


def test_compressed_inner_tars_are_counted(tmp_path, tree, fake):
    tar = fake.make_tar_of_tars(tree, tmp_path / "t.tar")
    with tarfile.open(tar, "a") as archive:
        fake.add_member(archive, "n03.tar.gz", b"x")
    source = open_source(tar)
    assert len(list(source.entries())) == 11
    assert source.left_out == {"compressed tars (decompress them to plain .tar)": 1}


# ---- what operating systems leave behind


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_junk_is_no_class_and_no_picture(tmp_path, tree, kind, fake):
    wanted = open_source(tree).classes(-1), [e[:3] for e in open_source(tree).entries()]
    for name in JUNK:
        fake.write_picture(tree / name / "a.png", 1)
        fake.write_picture(tree / "class1" / name / "thumb.png", 1)
    (tree / "Thumbs.db").mkdir()
    source = open_source(tree)
    if kind == "tar":
        with tarfile.open(tmp_path / "p.tar", "w") as archive:
            for path in sorted(tree.rglob("*.png")):
                archive.add(path, path.relative_to(tree))
        source = open_source(tmp_path / "p.tar")
    assert (source.classes(-1), [entry[:3] for entry in source.entries()]) == wanted


def test_junk_in_shards(tmp_path, fake):
    path = archive_of(
        tmp_path / "a.tar", fake, ("1.png", b"1"), ("1.cls", b"0"), ("__MACOSX/2.png", b"2")
    )
    assert list(found(open_source(path))) == ["a.tar/1.png"]


def test_a_closed_lost_and_found_blocks_nothing(as_nobody, fake, tokenizer):
    tree = fake.make_tree(as_nobody / "p")
    (tree / "lost+found").mkdir(mode=0)
    assert cache.build(tree, as_nobody / "tokens", tokenizer, **SMALL).images == 11


def test_a_cache_with_a_class_of_junk_is_refused_and_readable(
    tree, out, tokenizer, fake, monkeypatch
):
    fake.write_picture(tree / "__MACOSX" / "a.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr("vfmtok_fast.cache.sources.folder._JUNK", frozenset())
        cache.build(tree, out, tokenizer, **SMALL)
    before = fake.read_tree(out)
    with pytest.raises(cache.ImagesChanged, match="4 then, 3 now; first: '__MACOSX'") as caught:
        cache.build(tree, out, tokenizer, **SMALL)
    assert "\n" not in str(caught.value) and fake.read_tree(out) == before
    assert len(cache.TokenCache(out, view="center")) == 12


# ---- resumed indexing


@pytest.mark.parametrize("inner", [False, True])
def test_an_archive_that_holds_a_name_twice(tmp_path, tokenizer, fake, monkeypatch, inner):
    names = ["a/1.png", "a/2.png", "a/1.png", "a/3.png", "a/2.png", "a/1.png"]
    data = [fake.write_picture(tmp_path / "x.png", number).read_bytes() for number in range(6)]
    members = list(zip([n.removeprefix("a/" * inner) for n in names], data, strict=True))
    path = archive_of(tmp_path / "p.tar", fake, *members)
    if inner:
        path = archive_of(tmp_path / "q.tar", fake, ("a.tar", path.read_bytes()))
    monkeypatch.setattr(parts, "PART", 2)
    source = open_source(path)
    every = list(source.entries())
    assert len(every) == 6
    for number, entry in enumerate(every):
        assert list(source.entries(entry)) == every[number + 1 :]
    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "remove_parts", lambda out: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.prepare(path, out, tokenizer, **SMALL)
    (out / "index.parquet").unlink()
    assert cache.build(path, out, tokenizer, **SMALL).images == 6


def test_to_go_on_behind_what_is_not_there_is_refused(tmp_path, fake):
    source = open_source(archive_of(tmp_path / "p.tar", fake, ("a/1.png", b"1")))
    (entry,) = source.entries()
    with pytest.raises(ValueError, match="was listed before indexing was interrupted"):
        list(source.entries(entry._replace(path="a/2.png")))


# ---- what tars can hold


def test_tars_behind_one_another(tmp_path, tokenizer, out, fake):
    one = archive_of(tmp_path / "1.tar", fake, ("a/1.png", b"1"), ("b/2.png", b"2"))
    two = archive_of(tmp_path / "2.tar", fake, ("c/3.png", b"3"))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    source = open_source(both)
    assert found(source) == {"a/1.png": (0, b"1"), "b/2.png": (1, b"2"), "c/3.png": (2, b"3")}
    shard = archive_of(tmp_path / "s.tar", fake, ("1.cls", b"5"), ("1.png", b"4"))
    both.write_bytes(shard.read_bytes() + two.read_bytes())
    assert found(open_source(both)) == {
        "both.tar/1.png": (5, b"4"),
        "both.tar/c/3.png": (-1, b"3"),
    }
    outer = archive_of(tmp_path / "o.tar", fake, ("x.tar", one.read_bytes() + two.read_bytes()))
    assert [entry.path for entry in open_source(outer).entries()] == [
        "x/a/1.png",
        "x/b/2.png",
        "x/c/3.png",
    ]
    both.write_bytes(one.read_bytes() + b"junk behind the end")
    with pytest.raises(ValueError, match="both.tar: damaged"):
        list(open_source(both).entries())


def with_sizes_in_pax_headers(path, fake, *members):
    """Write a tar whose headers give 0 bytes, as POSIX allows if a PAX header gives the size."""
    blocks = []
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.pax_headers = {"size": str(len(data)), "comment": "x" * 700}
        whole = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        blocks.append(whole + data + bytes(-len(data) % 512))
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


def test_sizes_in_pax_headers(tmp_path, fake):
    members = [(f"a/{number}.png", os.urandom(2000 + number)) for number in range(3)]
    source = open_source(with_sizes_in_pax_headers(tmp_path / "p.tar", fake, *members))
    with tarfile.open(source.root) as archive:
        assert [member.size for member in archive] == [2000, 2001, 2002]
    assert found(source) == {name: (0, data) for name, data in members}
    entry = next(source.entries())
    with pytest.raises(base.BadImage, match="changed since it was indexed: 7 bytes then, 2000"):
        source.read(entry._replace(size=7))


def link(name, to, hard=False):
    kind = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    return name, b"", {"type": kind, "linkname": to}


def test_a_sparse_member_is_as_long_as_it_is_in_the_tar(tmp_path, fake):
    with open(tmp_path / "hole.bin", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    fake.write_picture(tmp_path / "a" / "1.png", 1)
    command = ["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "t.tar", "a", "hole.bin"]
    subprocess.run(command, check=True)
    assert os.path.getsize(tmp_path / "t.tar") < 1 << 20
    assert list(found(open_source(tmp_path / "t.tar"))) == ["a/1.png"]


def test_links_inside_a_tar(tmp_path, tokenizer, out, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    path = archive_of(
        tmp_path / "p.tar",
        fake,
        ("./a/1.png", data),
        link("a/hard.png", "a/1.png", hard=True),
        link("b/soft.png", "../a/1.png"),
        link("b/chain.png", "soft.png"),
        link("b/later.png", "../c/2.dat"),
        link("b/gone.png", "nothing.png"),
        link("b/up.png", "../../x.png"),
        link("b/absolute.png", str(tmp_path / "x.png")),
        link("b/round.png", "again.png"),
        link("b/again.png", "round.png"),
        ("c/2.dat", data),
    )
    good = {"a/1.png", "a/hard.png", "b/soft.png", "b/chain.png", "b/later.png"}
    source = open_source(path)
    entries = {entry.path: entry for entry in source.entries()}
    assert len(entries) == 10
    for name, entry in entries.items():
        if name in good:
            assert source.read(entry) == data and entry.label == "ab".index(name[0])
        else:
            with pytest.raises(base.BadImage, match="not a regular file in the archive"):
                source.read(entry)
    assert cache.build(path, out, tokenizer, **SMALL).bad == 5


def test_links_inside_shards_and_inner_tars(tmp_path, fake):
    shard = archive_of(
        tmp_path / "s.tar",
        fake,
        ("1.png", b"1"),
        ("1.cls", b"5"),
        link("2.png", "1.png"),
        link("2.cls", "1.cls", hard=True),
    )
    assert found(open_source(shard)) == {"s.tar/1.png": (5, b"1"), "s.tar/2.png": (5, b"1")}
    inner = archive_of(tmp_path / "n.tar", fake, ("1.png", b"1"), link("2.png", "1.png", True))
    other = archive_of(tmp_path / "m.tar", fake, ("9.png", b"9"), link("8.png", "1.png"))
    outer = archive_of(
        tmp_path / "o.tar", fake, ("n.tar", inner.read_bytes()), ("m.tar", other.read_bytes())
    )
    source = open_source(outer)
    entries = {entry.path: entry for entry in source.entries()}
    assert source.read(entries["n/2.png"]) == b"1" and entries["m/8.png"].size == base.NOT_A_FILE


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "tar"])
def test_names_of_archives_and_caches_that_are_not_utf8(tmp_path, tree, tokenizer, out, fake, kind):
    root = fake.MAKERS[kind](tree, tmp_path / "a")
    odd = os.fsdecode(b"train-\xff")
    path = root if kind == "tar" else sorted(root.iterdir())[0]
    path = path.rename(path.with_name(odd + path.suffix))
    for given in {path, path if kind == "tar" else root}:
        with pytest.raises(ValueError, match=r"train-\\xff\.\w+: its name is not UTF-8; rename it"):
            open_source(given)
    with pytest.raises(ValueError, match=r"train-\\xff: its name is not UTF-8; rename it"):
        cache.build(tree, out.with_name(odd), tokenizer, **SMALL)


# ---- the command


def test_the_command_names_classes_and_what_was_left_out(tmp_path, fake, capsys):
    tree = fake.make_tree(tmp_path / "p", 3)
    (tree / "class5").mkdir()
    (tree / "class1" / "x.heic").write_bytes(b"x")
    options = ["--untrained", "small", "--device", "cpu", "--batch-size", "1"]
    code = cli.main(["cache", str(tree), str(tmp_path / "t"), *options])
    text, lines = capsys.readouterr()
    assert code == 0 and "\nclasses: 4\n" in text
    assert "note: 1 of 4 classes have no picture: class5" in lines
    assert "left out: 1 .heic files (pip install 'vfmtok-fast[heif]' to read them)" in lines


def test_names_of_two_lines_are_told_in_one(tmp_path, fake, capsys):
    fake.write_picture(tmp_path / "p" / "a" / "1.png", 1)
    (tmp_path / "p" / "two\nlines").mkdir()
    fake.write_picture(tmp_path / "p" / "b" / "1\n2.png", 1).write_bytes(b"x")
    small = ["--untrained", "small", "--device", "cpu"]
    assert cli.main(["cache", str(tmp_path / "p"), str(tmp_path / "t"), *small]) == 3
    assert "have no picture: two\\x0alines\n" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "t")]) == 3
    assert "b/1\\x0a2.png: " in capsys.readouterr().out


def test_the_commands_options(tmp_path, fake, capsys):
    root = fake.make_parquet(fake.make_tree(tmp_path / "p", 5), tmp_path / "q")
    options = ["--untrained", "small", "--device", "cpu", "--batch-size", "1"]
    command = ["cache", str(root), str(tmp_path / "t"), *options]
    assert cli.main([*command, "--split", "x", "--include", "y"]) == 2
    assert "give only one of the two" in capsys.readouterr().err
    assert cli.main([*command, "--split", "test"]) == 2
    assert "nothing is left in it" in capsys.readouterr().err
    assert cli.main([*command, "--image-column", "label"]) == 2
    assert "'label' (--image-column)" in capsys.readouterr().err
    assert cli.main([*command, "--split", "train", "--label-column", "none"]) == 0
    assert index.read_origin(tmp_path / "t" / "index.parquet").chosen["label_column"] == "none"
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path / "t"), "--images", str(root), *options[:4]]) == 0


# ---- HEIC

# Stands in for pillow-heif: "HEIF" is a PNG after the signature of a HEIC file.
PLUGIN = """
import io
from PIL import Image, PngImagePlugin

MARK = b"\\0\\0\\0\\x18ftypheic"

def register_heif_opener():
    def factory(file, name):
        return PngImagePlugin.PngImageFile(io.BytesIO(file.read()[len(MARK):]))
    Image.register_open("HEIF", factory, lambda start: start[:12] == MARK)
"""

BUILD = """
import json, sys
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.images import decode_image
source = open_source(sys.argv[1])
for entry in source.entries():
    print(json.dumps([entry.path, decode_image(source.read(entry)).size]))
"""


def test_heic_with_the_package_that_reads_it(tmp_path, fake):
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + data)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pillow_heif.py").write_text(PLUGIN)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "p")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["a/1.HEIC", [21, 21]]


def test_its_version_is_in_the_fingerprint_where_it_is_used(
    tmp_path, out, tokenizer, fake, monkeypatch
):
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(images, "reads_heif", lambda: True)
    monkeypatch.setattr(folder, "EXTENSIONS", folder.EXTENSIONS | images.HEIF_SUFFIXES)
    monkeypatch.setattr(folder, "UNREADABLE", {})
    plugin = types.ModuleType("pillow_heif")
    exec(PLUGIN, vars(plugin))
    plugin.__version__ = "1.0"
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    tree = fake.make_tree(tmp_path / "p")
    cache.build(tree, tmp_path / "plain", tokenizer, **SMALL)
    assert "heif_decoder_version" not in manifest.read_manifest(tmp_path / "plain").covers
    picture = tree / "class1" / "x.HEIC"
    data = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    picture.write_bytes(b"\0\0\0\x18ftypheic" + data)
    # The fingerprint of this cache cannot change any more.
    with pytest.raises(ValueError, match="cannot be added to a cache without any"):
        cache.build(tree, tmp_path / "plain", tokenizer, extend=True, **SMALL)
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 0
    assert manifest.read_manifest(out).covers["heif_decoder_version"] == "1.0"
    cache.build(tree, out, tokenizer, **SMALL)
    assert cache.verify(out, images=tree, tokenizer=tokenizer).ok
    plugin.__version__ = "2.0"
    with pytest.raises(FileExistsError, match="heif_decoder_version"):
        cache.build(tree, out, tokenizer, **SMALL)
    with pytest.raises(FileExistsError, match="heif_decoder_version"):
        cache.verify(out, images=tree, tokenizer=tokenizer)


def test_heic_without_it_is_named(tmp_path, tokenizer, out, fake):
    good = fake.write_picture(tmp_path / "x.png", 1).read_bytes()
    path = archive_of(
        tmp_path / "p.tar", fake, ("a/1.png", good), ("a/2.jpg", b"\0\0\0\x18ftypheic" + bytes(40))
    )
    assert cache.build(path, out, tokenizer, **SMALL).bad == 1
    (entry,) = shards.read_quarantine(out, 0)[0]
    assert "pip install 'vfmtok-fast[heif]'" in entry["reason"]
