"""Inputs and disks that change at the wrong moment cost no label and no token."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
import unicodedata

import pytest

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.make import parts
from vfmtok_fast.cache.sources.folder import FolderSource
from vfmtok_fast.cache.store import LocalPlace

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


class Stop(BaseException):
    """Stands for kill -9."""


def kill():
    raise Stop


def during_second_listing(monkeypatch, number, action):
    """Call `action` when `number` images have been listed for the second time.

    The first time, a new cache looks for an image that can be read, and an extension counts.
    """
    listing, calls = FolderSource.entries, itertools.count(1)

    def entries(self, after=None):
        second = next(calls) == 2
        for count, entry in enumerate(listing(self, after)):
            if count == number and second:
                action()
            yield entry

    monkeypatch.setattr(FolderSource, "entries", entries)


@pytest.mark.parametrize("extend", [False, True])
def test_a_class_that_comes_while_images_are_listed(
    tree, out, tokenizer, fake, monkeypatch, extend
):
    """Every later class has another number then; a folder in front of them shifts them all."""
    if extend:
        cache.build(tree, out, tokenizer, **SMALL)
        fake.add(tree, "class2/later.png")
    before = fake.read_tree(out) if extend else {}
    arrive = functools.partial(fake.add, tree, "a/0.png", "class1/new.png")
    during_second_listing(monkeypatch, 2, arrive)
    with pytest.raises(
        cache.ImagesChanged, match=r"while their pictures were listed .*'a'"
    ) as error:
        cache.build(tree, out, tokenizer, extend=extend, **SMALL)
    assert "\n" not in str(error.value)
    assert extend or not (out / "manifest.json").exists()
    assert not extend or before.items() <= fake.read_tree(out).items()
    cache.build(tree, out, tokenizer, extend=extend, **SMALL)
    assert cache.verify(out, tokenizer, tree).agreement == 1.0
    names = cache.TokenCache(out).classes
    assert names == (["class0", "class1", "class2", "a"] if extend else sorted(names))
    entries = [entry for rows in index.read_all(out / "index.parquet") for entry in rows.entries]
    assert len(entries) == 13 + extend
    assert all(names[entry.label] == entry.path.partition("/")[0] for entry in entries)


def test_a_class_that_comes_and_goes_while_images_are_listed(tree, out, tokenizer, monkeypatch):
    """As an unpacker's scratch folder does: labels are numbered by the classes of the manifest."""
    listing = FolderSource.entries

    def entries(self, after=None):
        (tree / "a").mkdir()
        found = list(listing(self, after))
        (tree / "a").rmdir()
        return iter(found)

    monkeypatch.setattr(FolderSource, "entries", entries)
    cache.build(tree, out, tokenizer, **SMALL)
    assert cache.read_tokens(out)[1].tolist() == [0] * 4 + [1] * 4 + [2] * 3


@pytest.mark.parametrize("target", ["000.png/zzz", "z" * 300])
def test_a_link_to_nowhere_stops_no_listing(tree, out, tokenizer, target):
    (tree / "class0" / "notes.txt").symlink_to(target)
    (tree / "class0" / "link.png").symlink_to(target)
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 1


def test_an_index_that_cannot_be_read_for_a_moment_is_not_called_damaged(
    tree, out, tokenizer, monkeypatch
):
    cache.build(tree, out, tokenizer, **SMALL)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(index, "_source", stale)
    with pytest.raises(OSError, match=r"index.parquet: cannot be read \(Stale .*; run again"):
        cache.build(tree, out, tokenizer, **SMALL)
    monkeypatch.undo()
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 0


def test_a_class_that_came_before_interrupted_indexing_goes_on(
    tree, out, tokenizer, fake, monkeypatch, tmp_path
):
    monkeypatch.setattr(parts, "PART", 2)
    with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
        during_second_listing(patch, 5, kill)
        cache.build(tree, out, tokenizer, **SMALL)
    assert len(list((out / parts.FOLDER).iterdir())) == 2
    fake.add(tree, "a/0.png", "class0/0.png")
    cache.build(tree, out, tokenizer, **SMALL)
    cache.build(tree, tmp_path / "whole", tokenizer, **SMALL)
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def failing_once(monkeypatch, name):
    read, left = LocalPlace.read_range, [name]

    def read_range(self, start, end):
        if self.name in left:
            left.clear()
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, start, end)

    monkeypatch.setattr(LocalPlace, "read_range", read_range)


@pytest.mark.parametrize("again", ["build", "repair", "verify"])
def test_a_shard_that_cannot_be_read_for_a_moment_is_kept(
    tree, out, tokenizer, fake, monkeypatch, again
):
    """Making it again would lose the tokens of images that have been deleted since."""
    cache.build(tree, out, tokenizer, **SMALL)
    (tree / "class0" / "000.png").unlink()
    before = fake.read_tree(out)
    failing_once(monkeypatch, "tokens-00000.safetensors")
    with pytest.raises(OSError, match=r"tokens-00000.*: cannot be read \(Stale file handle\)") as e:
        if again == "build":
            cache.build(tree, out, tokenizer, **SMALL)
        elif again == "repair":
            cache.repair(tree, out, tokenizer)
        else:
            cache.verify(out)
    assert "\n" not in str(e.value) and fake.read_tree(out) == before
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 0
    assert cache.repair(tree, out, tokenizer) == 0 and fake.read_tree(out) == before


@pytest.mark.parametrize("name", ["000.png", "class1"])
def test_a_name_that_cannot_be_examined_for_a_moment_is_not_left_out(
    tree, out, tokenizer, monkeypatch, name
):
    """Neither is an image quarantined for it, nor a folder passed over."""
    stat = os.stat

    def stale(path, *args, **kwargs):
        if os.path.basename(os.fspath(path).rstrip("/")) == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(ValueError, match=rf"{name}: cannot .*: Stale file handle") as error:
        cache.build(tree, out, tokenizer, **SMALL)
    assert "\n" not in str(error.value) and not (out / "manifest.json").exists()
    monkeypatch.undo()
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 0


def test_a_deleted_folder_inside_a_class_is_like_deleted_images(tmp_path, out, tokenizer, fake):
    tree = tmp_path / "p"
    fake.add(tree, *(f"{name}/{number}.png" for name in ("a", "b/x", "b/y") for number in range(4)))
    cache.build(tree, out, tokenizer, **SMALL)
    shutil.rmtree(tree / "b" / "y")
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 0
    fake.add(tree, "a/new.png")
    summary = cache.build(tree, out, tokenizer, extend=True, **SMALL)
    assert (summary.images, summary.bad) == (13, 0) and len(cache.TokenCache(out)) == 13
    # A shard that is made again loses them; nothing else stops.
    (out / "shards" / "tokens-00002.safetensors").unlink()
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 4
    assert len(cache.TokenCache(out)) == 9 and cache.verify(out, tokenizer, tree).ok


def test_reading_while_a_cache_is_being_extended(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/new.png")
    job = cache.prepare(tree, out, tokenizer, extend=True, **SMALL)  # Nothing is encoded yet.
    found = cache.status(out)
    assert (found.state, found.damaged, found.shards_done, found.shards) == ("incomplete", (), 2, 3)
    assert len(cache.TokenCache(out, partial=True)) == 8
    # A shard of more images than it should have is not one that the cache outgrew.
    shard = out / "shards" / "tokens-00002.safetensors"
    shutil.copy(out / "shards" / "tokens-00001.safetensors", shard)
    assert cache.status(out).damaged == (2,)
    with pytest.raises(ValueError, match="tokens-00002.*: is shard 1, not 2"):
        cache.TokenCache(out, partial=True)
    cache.encode_shard(job, 2)
    assert cache.finish(job) == 0 and len(cache.TokenCache(out)) == 12


def test_names_in_another_unicode_form_are_told_as_such(tmp_path, out, tokenizer, fake):
    tree = tmp_path / "p"
    fake.add(tree, "cafe\u0301/0.png", "tea/0.png")
    cache.build(tree, out, tokenizer, **SMALL)
    (tree / "cafe\u0301").rename(tree / unicodedata.normalize("NFC", "cafe\u0301"))
    with pytest.raises(
        cache.ImagesChanged, match=r"only their Unicode form differs \(NFC or NFD\)"
    ):
        cache.build(tree, out, tokenizer, **SMALL)
