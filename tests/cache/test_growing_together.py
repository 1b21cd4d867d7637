"""Concurrent extensions: another process works between two reads of this one."""

from __future__ import annotations

import itertools

import pytest

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.make import changes, extension, parts, prepare

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


class Stop(BaseException):
    """Stands for kill -9."""


def extended(tree, out, fake):
    return cache.build(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)


def test_mended_shards_are_gone_before_the_manifest_says_so(tmp_path, out, fake, monkeypatch):
    tree = fake.make_tree(tmp_path / "p", bad=(2, 9))
    cache.build(tree, out, fake.FakeTokenizer(), **SMALL)
    for number in (2, 9):
        fake.write_picture(tree / f"class{number % 3}" / f"{number:03d}.png", number)
    install, others = extension.install, []

    def and_another_looks(place):
        coming = (place / extension.NEXT_MANIFEST).exists()
        install(place)
        if coming:
            others.append(cache.build(tree, place, fake.FakeTokenizer(), **SMALL))

    monkeypatch.setattr(extension, "install", and_another_looks)
    assert (extended(tree, out, fake).bad, others[0].bad) == (0, 0)
    assert cache.verify(out, fake.FakeTokenizer(), tree).ok


def test_an_index_that_another_extends_is_not_damaged(tree, out, tokenizer, fake, monkeypatch):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    check = prepare.manifest.check_same

    def meanwhile(*arguments):
        monkeypatch.undo()
        cache.prepare(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)
        check(*arguments)

    monkeypatch.setattr(prepare.manifest, "check_same", meanwhile)
    assert cache.prepare(tree, out, tokenizer, **SMALL).manifest.images == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_the_manifest_is_that_of_the_index(tree, out, tokenizer, fake, monkeypatch, rank):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    module, name = (changes, "check_unchanged") if rank else (extension, "extend")
    original = getattr(module, name)

    def meanwhile(*arguments):
        monkeypatch.undo()
        cache.prepare(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)
        return original(*arguments)

    monkeypatch.setattr(module, name, meanwhile)
    job = cache.prepare(tree, out, tokenizer, extend=True, rank=rank, **SMALL)
    assert job.manifest.images == 12


def test_two_that_extend_at_once_lose_nothing(tree, out, tokenizer, fake, monkeypatch):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    write = index.write_index

    def meanwhile(path, entries, *rest):
        monkeypatch.undo()
        first = next(entries)
        extended(tree, out, fake)
        return write(path, itertools.chain([first], entries), *rest)

    monkeypatch.setattr(index, "write_index", meanwhile)
    assert extended(tree, out, fake).images == 12 and cache.verify(out).ok


def test_two_listings_at_once_leave_a_sound_cache(tree, out, tokenizer, fake, monkeypatch):
    """The second overwrites the first one's index, which has no manifest yet."""
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/a.png")
    write, calls = index.write_index, []

    def meanwhile(path, *rest):
        found = write(path, *rest)
        if path.name == extension.NEXT_INDEX:
            calls.append(path)
            if len(calls) == 1:
                fake.add(tree, "class0/b.png")
                with pytest.raises(Stop):
                    cache.prepare(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)
            elif len(calls) == 2:
                raise Stop
        return found

    monkeypatch.setattr(index, "write_index", meanwhile)
    extended(tree, out, fake)
    assert extended(tree, out, fake).images == 13 and cache.verify(out).ok


def test_a_batch_size_and_an_extension_at_once(tree, out, tokenizer, fake, monkeypatch):
    """Both can happen while this process hashes the weights of a cache that has no shard yet."""
    cache.prepare(tree, out, tokenizer, **{**SMALL, "batch_size": 64})
    fake.add(tree, "class0/a.png")
    describe, jobs = prepare.describe, []

    def slow(*arguments):
        found = describe(*arguments)
        if not jobs:
            jobs.append(None)
            jobs[0] = cache.prepare(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)
            cache.encode_shard(jobs[0], 0)
        return found

    monkeypatch.setattr(prepare, "describe", slow)
    job = cache.prepare(tree, out, tokenizer, extend=True, rank=1, **SMALL)
    assert job.manifest == jobs[0].manifest and job.manifest.images == 12
    assert cache.build(tree, out, tokenizer, **SMALL).images == 12 and cache.verify(out).ok


def test_one_that_began_before_completes_no_extended_cache(tmp_path, out, tokenizer, fake):
    """A run that began before an extension must not complete the extended cache.

    Its shards are all full, so they are shards of the extended cache too.
    """
    tree = fake.make_tree(tmp_path / "p", count=12)
    cache.build(tree, out, tokenizer, **SMALL)
    slow = cache.prepare(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    extended(tree, out, fake)
    with pytest.raises(cache.ImagesChanged, match="run again"):
        cache.finish(slow)
    assert cache.verify(out).ok


def test_the_end_of_one_listing_breaks_no_other(tree, out, tokenizer, fake, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    write, calls = index.write_index, []

    def meanwhile(path, entries, *rest):
        calls.append(path.name)
        if len(calls) != 3:
            return write(path, entries, *rest)

        def and_another_lists():
            cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
            yield from entries

        return write(path, and_another_lists(), *rest)

    monkeypatch.setattr(index, "write_index", meanwhile)
    assert cache.prepare(tree, out, tokenizer, **SMALL).manifest.images == 11
