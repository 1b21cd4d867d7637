"""Which kind of input a folder is taken for, and which of its files are used."""

from __future__ import annotations

import os
import shutil
import tarfile

import pytest

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.make import parts
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.cache.sources.choice import Choice, named_split, split_patterns

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


def hub(fake, tree, root, split="train"):
    """Write two Parquet files in the hub's layout: root/data/train-00000-of-00002.parquet."""
    files = fake.make_parquet(tree, root.with_name(f"{root.name}-flat"))
    for path in sorted(files.iterdir()):
        target = root / "data" / path.name.replace("train", split)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    return root


def shards_of(fake, tree, root, name="train"):
    files = fake.make_webdataset(tree, root.with_name(f"{root.name}-{name}-flat"))
    root.mkdir(exist_ok=True)
    for path in sorted(files.iterdir()):
        shutil.move(path, root / path.name.replace("train", name))
    return root


def count(source):
    return len(list(source.entries()))


def test_the_layout_of_the_hub(tmp_path, tree, tokenizer, out, fake):
    root = hub(fake, tree, tmp_path / "q")
    (root / "README.md").write_text("text")
    (root / ".git" / "x").mkdir(parents=True)
    (root / ".git" / "x" / "a.png").write_bytes(b"x")
    source = open_source(root)
    assert source.kind == "parquet" and count(source) == 11
    assert source.names[0] == "data/train-00000-of-00002.parquet"
    assert cache.build(root, out, tokenizer, **SMALL).bad == 0
    assert cache.verify(out, tokenizer, root).agreement == 1.0


def test_the_hubs_local_copy_is_links(tmp_path, tree, fake):
    root = hub(fake, tree, tmp_path / "q")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted((root / "data").iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (root / "data" / "back").symlink_to(root)
    assert count(open_source(root)) == 11


@pytest.mark.parametrize("place", ["assets/logo.png", "logo.png", "preview/a/b.jpg"])
@pytest.mark.parametrize("maker", [hub, shards_of])
def test_archives_beside_pictures_are_asked_about(tmp_path, tree, place, maker, fake):
    root = maker(fake, tree, tmp_path / "q")
    fake.write_picture(root / place, 1)
    kind = {hub: "parquet", shards_of: "webdataset"}[maker]
    with pytest.raises(ValueError, match=rf"{kind} files .*1 pictures \({place}\)") as caught:
        open_source(root)
    assert f"--input {kind} or --input folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert count(open_source(root, kind)) == 11
    assert count(open_source(root, "folder")) == 1
    assert count(open_source(root, exclude=[place.split("/")[0]])) == 11


def test_two_kinds_of_archives_are_asked_about(tmp_path, tree, fake):
    root = shards_of(fake, tree, hub(fake, tree, tmp_path / "q"))
    with pytest.raises(ValueError, match="2 webdataset files .*--input webdataset"):
        open_source(root)


def test_class_folders_beside_what_they_were_unpacked_from(tmp_path, tree, fake):
    made = fake.make_tar_of_tars(tree, tmp_path / "made.tar")
    shutil.copy(made, tree / "ILSVRC2012_img_train.tar")
    assert open_source(tree).kind == "folder"
    shutil.copy(made, tree / "ILSVRC2012_img_val.tar")
    with pytest.raises(ValueError, match="--input webdataset or --input folder"):
        open_source(tree)


def test_tars_that_are_no_shards(tmp_path, tree, fake):
    root = tmp_path / "q"
    root.mkdir()
    fake.make_tar_of_tars(tree, root / "ILSVRC2012_img_train.tar")
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        fake.add_member(archive, "1.JPEG", b"x")
    with pytest.raises(ValueError, match="not WebDataset shards .*give one of the files") as caught:
        open_source(root)
    assert str(root / "ILSVRC2012_img_train.tar") in str(caught.value)
    (root / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(ValueError, match=r"without \.cls .*--input webdataset"):
        open_source(root)
    assert count(open_source(root, "webdataset")) == 1
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        fake.add_member(archive, "1.JPEG", b"x")
        fake.add_member(archive, "1.json", b"{}")
    assert open_source(root).kind == "webdataset"


@pytest.mark.parametrize("maker", [hub, shards_of])
def test_splits_in_one_folder_are_asked_about(tmp_path, tree, tokenizer, maker, out, fake):
    root, other = tmp_path / "q", fake.make_tree(tmp_path / "other", 3)
    maker(fake, tree, root)
    if maker is hub:
        shutil.copytree(hub(fake, other, tmp_path / "v", "validation") / "data", root / "more")
    else:
        shards_of(fake, other, root, "validation")
    with pytest.raises(ValueError, match="several splits .*train-.*validation-") as caught:
        open_source(root)
    assert "--split train" in str(caught.value) and "\n" not in str(caught.value)
    train = {"include": split_patterns("train")}
    assert count(open_source(root, **train)) == 11
    assert count(open_source(root, include=["validation-*"])) == 3
    assert count(open_source(root, include=["*"])) == 14
    assert count(open_source(root, exclude=["validation-*"])) == 11
    with pytest.raises(ValueError, match="nothing is left in it with include 'no"):
        open_source(root, include=["no*"])
    # The choice is recorded: a run with another one is refused, and verify and repair use it too.
    cache.build(root, out, tokenizer, **SMALL, **train)
    before = fake.read_tree(out)
    with pytest.raises(cache.ImagesChanged, match="include .there .*, here none"):
        cache.build(root, out, tokenizer, **SMALL, include=["*"])
    assert cache.build(root, out, tokenizer, **SMALL, **train).encoded == 0
    assert cache.verify(out, tokenizer, root).agreement == 1.0
    assert cache.repair(root, out, tokenizer) == 0
    assert fake.read_tree(out) == before


def test_everything_is_recorded_as_it_always_was(tmp_path, tree, tokenizer, fake):
    root = fake.make_webdataset(tree, tmp_path / "w")
    outs = tmp_path / "a", tmp_path / "b"
    cache.build(root, outs[0], tokenizer, **SMALL)
    cache.build(root, outs[1], tokenizer, **SMALL, include=["*"])
    assert fake.read_tree(outs[0]) == fake.read_tree(outs[1])
    assert "chosen" not in str(index.read_origin(outs[0] / "index.parquet").metadata())


def test_parts_of_another_choice_are_not_gone_on_with(tmp_path):
    one = index.Origin("parquet", {"a": 1}, chosen={"image_column": "left"})
    index.write_index(tmp_path / "i", [], 4, one)
    assert index.read_origin(tmp_path / "i") == one
    assert index.read_origin(tmp_path / "i") != index.Origin("parquet", {"a": 1})


def test_splits_of_class_folders(tmp_path, tree, tokenizer, out, fake):
    root = tmp_path / "q"
    shutil.copytree(tree, root / "train")
    fake.make_tree(root / "val", 2)
    with pytest.raises(ValueError, match=r"several splits .*\(train, val\); .*--split train"):
        open_source(root)
    train = {"include": split_patterns("train")}
    source = open_source(root, **train)
    assert source.classes(-1) == ["class0", "class1", "class2"]
    assert list(source.entries()) == list(open_source(tree).entries())
    cache.build(root, out, tokenizer, **SMALL, **train)
    with pytest.raises(cache.ImagesChanged, match="include"):
        cache.build(root, out, tokenizer, **SMALL, include=split_patterns("val"))
    assert cache.build(root, out, tokenizer, **SMALL, **train).encoded == 0
    assert cache.verify(out, tokenizer, root).agreement == 1.0
    assert cache.repair(root, out, tokenizer) == 0


@pytest.mark.parametrize(
    "chosen, left",
    [
        ({"exclude": ["*/n01"]}, ["n02/1.png"]),
        ({"exclude": ["t*n/n01"]}, ["n02/1.png", "n02/n01/b.png"]),
        ({"exclude": ["train/n01"]}, ["n02/1.png", "n02/n01/b.png"]),
        ({"exclude": ["n01"]}, ["n02/1.png"]),
        ({"include": ["t*n/n01"]}, ["n01/1.png"]),
    ],
)
def test_patterns_with_slashes_are_of_the_whole_path(tmp_path, fake, chosen, left):
    for name in ("train/n01/1.png", "train/n02/1.png", "train/n02/n01/b.png", "val/n01/1.png"):
        fake.write_picture(tmp_path / "q" / name, 1)
    source = open_source(tmp_path / "q", **{"include": split_patterns("train"), **chosen})
    assert [entry.path for entry in source.entries()] == left
    assert source.chosen == Choice(**{"include": split_patterns("train"), **chosen}).record()


def test_the_folder_around_one_split(tmp_path, tree, fake):
    root = tmp_path / "q"
    shutil.copytree(tree, root / "train")
    with pytest.raises(ValueError, match="nothing but the folder train, .*; give .*/q/train, or"):
        open_source(root)
    assert open_source(root, include=["*"]).classes(-1) == ["train"]
    assert len(open_source(root, include=split_patterns("train")).classes(-1)) == 3
    inner = tmp_path / "inner.tar"
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for split in ("train", "val"):
            with tarfile.open(inner, "w") as one:
                fake.add_member(one, "1.png", b"x")
            archive.add(inner, f"{split}/n01.tar")
    with pytest.raises(ValueError, match="several splits"):
        list(open_source(tmp_path / "p.tar").entries())
    assert count(open_source(tmp_path / "p.tar", include=["train"])) == 1


def test_compressed_shards_are_not_left_out(tmp_path, tree, fake):
    root = shards_of(fake, tree, tmp_path / "q")
    (root / "train-002.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 compressed tars \(train-002\.tar\.gz\)"):
        open_source(root)
    assert count(open_source(root, exclude=["*.gz"])) == 11
    for path in root.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="decompress them"):
        open_source(root)


def test_parts_that_an_older_version_left_are_listed_anew(
    tree, tmp_path, out, tokenizer, fake, monkeypatch
):
    """The older version took other folders for classes, so its labels differ."""
    monkeypatch.setattr(parts, "PART", 2)
    fake.write_picture(tree / "__MACOSX" / "a.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr("vfmtok_fast.cache.sources.folder._JUNK", frozenset())
        patch.setattr(parts, "RULES", 1)
        patch.setattr(parts, "remove_parts", lambda out: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.prepare(tree, out, tokenizer, **SMALL)
    (out / "index.parquet").unlink()
    cache.build(tree, out, tokenizer, **SMALL)
    cache.build(tree, tmp_path / "whole", tokenizer, **SMALL)
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def test_each_folder_is_listed_a_few_times_to_choose_one(tmp_path, fake, monkeypatch):
    for number in range(30):
        fake.write_picture(tmp_path / "q" / f"n{number:02d}" / "1.png", 1)
    listed, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
        assert count(open_source(tmp_path / "q", include=["n29"])) == 1
    assert len(listed) < 30 * 6


def in_a_tar(root):
    with tarfile.open(f"{root}.tar", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.add(path, path.relative_to(root.parent))
    return f"{root}.tar"


@pytest.mark.parametrize("form", [str, in_a_tar])
@pytest.mark.parametrize(
    "other", ["test/train/1.png", "test/a/my train 1.png", "extra/train/1.png", "train2/a/1.png"]
)
def test_what_is_named_like_a_split_in_another(tmp_path, fake, form, other):
    for name in ("train/a/my test 1.png", "train/train/1.png", "train/z/test.png", other):
        fake.write_picture(tmp_path / "q" / name, 1)
    source = open_source(form(tmp_path / "q"), include=split_patterns("train"))
    assert source.classes(-1) == ["a", "train", "z"]
    assert [entry.path for entry in source.entries()] == [
        "a/my test 1.png",
        "train/1.png",
        "z/test.png",
    ]
    with pytest.raises(ValueError, match="nothing is left in it"):
        source = open_source(tmp_path / "q", include=split_patterns("val"))


def test_what_is_named_like_a_split_among_inner_tars(tmp_path, fake):
    fake.write_picture(tmp_path / "1.png", 1)
    with tarfile.open(tmp_path / "inner.tar", "w") as one:
        one.add(tmp_path / "1.png", "1.png")
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name in ("test/apple.tar", "test/train.tar", "train/apple.tar", "train/train.tar"):
            archive.add(tmp_path / "inner.tar", name)
    source = open_source(tmp_path / "p.tar", include=split_patterns("train"))
    assert source.classes(-1) == ["apple", "train"] and count(source) == 2


def test_the_split_of_an_archive_is_the_word_nearest_to_its_name(tmp_path, tree, fake):
    shutil.move(fake.make_parquet(tree, tmp_path / "p"), tmp_path / "q" / "test-set")
    some, other = sorted((tmp_path / "q" / "test-set").iterdir())
    other.rename(other.with_name("test-0.parquet"))
    with pytest.raises(ValueError, match="several splits"):
        open_source(tmp_path / "q")
    source = open_source(tmp_path / "q", include=split_patterns("test"))
    assert source.names == ("test-set/test-0.parquet",)
    source = open_source(tmp_path / "q", include=split_patterns("train"))
    assert source.names == (f"test-set/{some.name}",)


def test_patterns_that_name_no_split_do_not_mix_them(tmp_path, fake):
    for name in ("train/n01/1.png", "train/n02/1.png", "val/n01/1.png"):
        fake.write_picture(tmp_path / "q" / name, 1)
    for root in (tmp_path / "q", in_a_tar(tmp_path / "q")):
        with pytest.raises(ValueError, match=r"several splits .*\(train, val\)"):
            open_source(root, include=["*/n01"]).classes(-1)
        assert open_source(root, include=["*"]).classes(-1) == ["train", "val"]
    assert open_source(tmp_path / "q", include=["t*/n01"]).classes(-1) == ["n01"]
    assert open_source(tmp_path / "q", include=["val", "t*"]).classes(-1) == ["train", "val"]


def test_patterns_on_class_folders(tree):
    source = open_source(tree, exclude=["class1"])
    assert source.classes(-1) == ["class0", "class2"]
    assert {entry.label for entry in source.entries()} == {0, 1} and count(source) == 7
    source = open_source(tree, include=["class2/*", "class1/00*"], exclude=["*/004.png"])
    assert source.classes(-1) == ["class1", "class2"]
    assert [entry.path for entry in source.entries()] == [
        "class1/001.png",
        "class1/007.png",
        "class2/002.png",
        "class2/005.png",
        "class2/008.png",
    ]
    after = list(source.entries())[1]
    assert list(source.entries(after)) == list(source.entries())[2:]


def test_splits_in_one_tar(tmp_path, tree, fake):
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for split, name in (("train", "a"), ("train", "b"), ("val", "a")):
            fake.add_member(archive, f"{split}/{name}/1.png", b"x")
    with pytest.raises(ValueError, match=r"several splits .*\(train, val\)"):
        list(open_source(tmp_path / "p.tar").entries())
    source = open_source(tmp_path / "p.tar", include=split_patterns("train"))
    assert [(entry.path, entry.label) for entry in source.entries()] == [
        ("a/1.png", 0),
        ("b/1.png", 1),
    ]
    root = fake.make_tar_of_tars(tree, tmp_path / "t.tar")
    for one in ("class1", "class1.tar"):
        source = open_source(root, exclude=[one])
        assert source.classes(-1) == ["class0", "class2"] and count(source) == 7


@pytest.mark.parametrize(
    "chosen",
    [
        {"exclude": ["001.png"]},
        {"include": ["*.png"]},
        {"include": ["00[0-3].png"]},
        {"include": ["class1/*", "class2"], "exclude": ["*/004.png", "class2/002.png"]},
        {"include": ["class0/000.png"]},
    ],
)
def test_patterns_reach_into_inner_tars(tmp_path, tree, fake, chosen):
    """Patterns match there as in the folder that the tars would be unpacked to."""
    source = open_source(fake.make_tar_of_tars(tree, tmp_path / "t.tar"), **chosen)
    folders = open_source(tree, **chosen)
    assert source.classes(-1) == folders.classes(-1)
    assert [e[:3] for e in source.entries()] == [e[:3] for e in folders.entries()]


def test_what_cannot_be_chosen_from(tmp_path, tree, fake):
    with pytest.raises(ValueError, match="no files to include or exclude"):
        open_source(fake.make_lmdb(tree, tmp_path / "db"), exclude=["x"])
    with pytest.raises(TypeError, match="must be a list of patterns"):
        open_source(tree, include="class0")


@pytest.mark.parametrize(
    "name, split, fits",
    [
        ("data/train-00000-of-00002.parquet", "train", True),
        ("train/0.tar", "train", True),
        ("train.parquet", "train", True),
        ("imagenet1k-train-0001.tar", "train", True),
        ("cc_train0001.tar", "train", True),
        ("retrain-0.tar", "train", False),
        ("trainable/0.tar", "train", False),
        ("val-0.tar", "validation", False),
    ],
)
def test_names_of_splits(name, split, fits):
    assert Choice(split_patterns(split)).takes(name) == fits


def test_the_last_word_for_a_split_counts():
    assert named_split("data/ab-test-train-00000-of-00002.parquet") == "train"


def test_a_folder_that_cannot_be_listed_and_a_loop(tmp_path, tree):
    os.symlink(tree, tree / "class0" / "loop")
    assert open_source(tree).kind == "folder"
