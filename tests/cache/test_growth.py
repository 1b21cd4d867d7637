"""Images added later, hashes, and interrupted indexing."""

from __future__ import annotations

import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vfmtok_fast import cache, cli, temporary
from vfmtok_fast.cache.format import index, shards
from vfmtok_fast.cache.make import extension, job, parts, prepare, progress
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.cache.sources.choice import split_patterns

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


class Stop(BaseException):
    """Stands for kill -9."""


def tokens_by_path(out):
    found, tokens = {}, cache.TokenCache(out)
    paths = [path for rows in index.read_all(out / "index.parquet") for path in rows.paths]
    for position, row in enumerate(tokens.rows):
        found[paths[row]] = tokens[position][0].tolist(), tokens.classes[tokens[position][1]]
    return found


# ---- images added later


def test_extending_keeps_every_row_and_label(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    before, first = cache.read_tokens(out), fake.read_tree(out)
    fake.add(tree, "class0/000a.png", "class2/zz.png", "class1b/new.png", "aaa/deep/x.png")
    with pytest.raises(cache.ImagesChanged, match=r"class folders changed .* extend the cache"):
        cache.build(tree, out, tokenizer, **SMALL)
    assert fake.read_tree(out) == first
    summary = cache.build(tree, out, tokenizer, extend=True, **SMALL)
    # 11 images in shards of 4: the third shard was not full.
    assert (summary.images, summary.encoded, summary.shards) == (15, 7, 4)
    for name in ("shards/tokens-00000.safetensors", "shards/tokens-00001.safetensors"):
        assert fake.read_tree(out)[name] == first[name]
    tokens, labels = cache.read_tokens(out)
    np.testing.assert_array_equal(tokens[:11], before[0])
    np.testing.assert_array_equal(labels[:11], before[1])
    found = cache.read_manifest(out)
    assert found.classes == ["class0", "class1", "class2", "aaa", "class1b"]
    assert labels[11:].tolist() == [3, 0, 4, 2]
    assert cache.verify(out, tokenizer, tree).agreement == 1.0
    # From here on it is a cache like any other: the same input resumes, with or without `extend`.
    for extend in (False, True):
        assert cache.build(tree, out, tokenizer, extend=extend, **SMALL).encoded == 0
    anew = out.with_name("anew")
    cache.build(tree, anew, tokenizer, **SMALL)
    assert tokens_by_path(out) == tokens_by_path(anew)
    fake.add(tree, "class0/0.png")
    with pytest.raises(cache.ImagesChanged, match="1 added, 0 with another size; first: 'class0/0"):
        cache.build(tree, out, tokenizer, **SMALL)
    assert cache.build(tree, out, tokenizer, extend=True, **SMALL).encoded == 4
    assert index.read_origin(out / "index.parquet").runs == (11, 15)
    assert cache.verify(out, tokenizer, tree).agreement == 1.0


def test_extending_a_new_folder_is_building_it(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    cache.build(tree, out.with_name("other"), tokenizer, extend=True, **SMALL)
    assert fake.read_tree(out) == fake.read_tree(out.with_name("other"))


def test_what_cannot_be_extended(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    before = fake.read_tree(out)
    fake.add(tree, "class0/new.png")
    (tree / "class1" / "001.png").write_bytes(b"other")
    with pytest.raises(cache.ImagesChanged, match="but 1 pictures have another size"):
        cache.build(tree, out, tokenizer, extend=True, **SMALL)
    with pytest.raises(cache.FingerprintMismatch, match="batch_size"):
        cache.build(tree, out, tokenizer, extend=True, **{**SMALL, "batch_size": 4})
    assert fake.read_tree(out) == before


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "tar", "lmdb"])
def test_extending_archives(tmp_path, out, tokenizer, fake, kind):
    tree = fake.make_tree(tmp_path / "p")
    root = fake.MAKERS[kind](tree, tmp_path / "archive")
    cache.build(root, out, tokenizer, **SMALL)
    before = cache.read_tokens(out)
    if kind in ("tar", "lmdb"):
        path = root if kind == "tar" else root / "data.mdb"
        with open(path, "ab") as file:
            file.write(bytes(10240))
        with pytest.raises(cache.ImagesChanged, match="1 of its files changed"):
            cache.build(root, out, tokenizer, extend=True, **SMALL)
        return
    first = sorted(root.iterdir())[0]
    shutil.copy(first, root / first.name.replace("0000", "0003").replace("-000.", "-003."))
    with pytest.raises(cache.ImagesChanged, match="not there then"):
        cache.build(root, out, tokenizer, **SMALL)
    added = cache.build(root, out, tokenizer, extend=True, **SMALL).images - 11
    tokens, labels = cache.read_tokens(out)
    assert added == (5 if kind == "webdataset" else 4)
    np.testing.assert_array_equal(tokens, np.concatenate([before[0], before[0][:added]]))
    np.testing.assert_array_equal(labels, np.concatenate([before[1], before[1][:added]]))
    assert cache.verify(out, tokenizer, root).agreement == 1.0


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_going_on_with_one_split_when_another_has_come(tmp_path, out, tokenizer, fake, kind):
    root = fake.MAKERS[kind](fake.make_tree(tmp_path / "p"), tmp_path / "archive")
    cache.build(root, out, tokenizer, **SMALL)
    first = sorted(root.iterdir())[0]
    shutil.copy(first, root / first.name.replace("train", "val"))
    with pytest.raises(ValueError, match="several splits .*--split train"):
        cache.build(root, out, tokenizer, **SMALL)
    for chosen in ({"include": split_patterns("train")}, {"exclude": ["val*"]}):
        for extend in (False, True):
            found = cache.build(root, out, tokenizer, extend=extend, **SMALL, **chosen)
            assert (found.images, found.encoded) == (11, 0)
    shutil.copy(first, root / first.name.replace("train-", "train-1"))
    train = {"include": split_patterns("train")}
    with pytest.raises(cache.ImagesChanged, match="other files or columns .* include"):
        cache.build(root, out, tokenizer, **SMALL, **train)
    assert cache.build(root, out, tokenizer, extend=True, **SMALL, **train).images > 11
    assert cache.build(root, out, tokenizer, **SMALL, **train).encoded == 0
    assert cache.verify(out, tokenizer, root).ok and cache.repair(root, out, tokenizer) == 0


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_extension_goes_on(tmp_path, tokenizer, fake, monkeypatch, after):
    """A kill before or after each rename loses nothing: index and manifest, then both installed."""
    tree = fake.make_tree(tmp_path / "p")
    cache.build(tree, tmp_path / "base", tokenizer, **SMALL)
    fake.add(tree, "class0/0.png", "class3/1.png")
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "base", whole)
    cache.build(tree, whole, tokenizer, extend=True, **SMALL)
    replace = os.replace
    for at in range(1, 5):
        out, calls = tmp_path / f"out{at}", []
        shutil.copytree(tmp_path / "base", out)

        def killing(source, target, at=at, calls=calls):
            calls.append(target)
            if len(calls) == at and not after:
                raise Stop
            replace(source, target)
            if len(calls) == at:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing)
            with pytest.raises(Stop):
                cache.build(tree, out, tokenizer, extend=True, **SMALL)
        # Once the new manifest is complete, a run without `extend` resumes; before, it refuses.
        begun = at > 2 or (at == 2 and after)
        if begun:
            cache.build(tree, out, tokenizer, **SMALL)
        else:
            with pytest.raises(cache.ImagesChanged):
                cache.build(tree, out, tokenizer, **SMALL)
            cache.build(tree, out, tokenizer, extend=True, **SMALL)
        assert fake.read_tree(out) == fake.read_tree(whole), at


def test_many_processes_extend_as_one(tree, out, tokenizer, fake, monkeypatch):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    waited = []

    def await_first(out, done):
        if not done():
            waited.append(out)
            job = cache.prepare(tree, out, fake.FakeTokenizer(), extend=True, **SMALL)
            assert done() and job.manifest.images == 12

    monkeypatch.setattr(prepare, "_await", await_first)
    # Rank 0 does not run, so rank 1 must not wait long for its shards.
    monkeypatch.setattr(progress, "SLOW_SHARD", 0.1)
    extended = {"extend": True, "rank": 1, "world_size": 2}
    assert cache.build(tree, out, tokenizer, **extended, **SMALL).images == 12
    assert len(waited) == 1
    assert cache.build(tree, out, tokenizer, **extended, **SMALL).encoded == 0


def test_commands(tree, out, fake, capsys):
    asked = ["cache", str(tree), str(out), "--untrained", "small", "--device", "cpu", "--hash"]
    assert cli.main(asked) == 0
    fake.add(tree, "class0/0.png")
    assert cli.main(asked) == 2
    assert "extend the cache (--extend)" in capsys.readouterr().err
    assert cli.main([*asked, "--extend"]) == 0
    assert "12 pictures in 1 shards, 12 encoded now" in capsys.readouterr().out


# ---- hashes


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "parquet", "lmdb"])
def test_hashes_notice_what_keeps_its_size(tmp_path, out, tokenizer, fake, kind):
    tree = fake.make_tree(tmp_path / "p", bad=(3,))
    (tree / "class0" / "dangling.png").symlink_to(tmp_path / "nowhere")
    root = tree
    if kind != "folder":
        (tree / "class0" / "dangling.png").unlink()
        root = fake.MAKERS[kind](tree, tmp_path / "archive")
    cache.build(root, tmp_path / "plain", tokenizer, **SMALL)
    summary = cache.build(root, out, tokenizer, hashed=True, **SMALL)
    assert summary.bad == 1 + (kind == "folder")
    for ours, theirs in zip(
        cache.read_tokens(out), cache.read_tokens(tmp_path / "plain"), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert cache.build(root, out, tokenizer, hashed=True, **SMALL).encoded == 0
    assert cache.build(root, out, tokenizer, **SMALL).encoded == 0
    if kind == "folder":
        path = tree / "class1" / "001.png"
        data = path.read_bytes()
        fake.write_picture(path, 8)
        assert path.stat().st_size != len(data) or path.read_bytes() != data
        path.write_bytes(path.read_bytes()[: len(data)].ljust(len(data), b"\0"))
        report = cache.verify(out, tokenizer, tree)
        assert any("as many bytes, but others" in problem for problem in report.problems)
        shards.shard_path(out, 1).unlink()
        assert cache.build(root, out, tokenizer, **SMALL).bad == 3
    with pytest.raises(ValueError, match="was indexed without hashes"):
        cache.build(root, tmp_path / "plain", tokenizer, hashed=True, **SMALL)


# ---- interrupted indexing


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "parquet", "lmdb"])
@pytest.mark.parametrize("hashed", [False, True])
def test_listing_goes_on_behind_the_last_part(tmp_path, tokenizer, fake, monkeypatch, kind, hashed):
    tree = fake.make_tree(tmp_path / "p", count=23)
    fake.add(tree, "class0/a.png", "class0/a.png.png", "class0/a/b.png", "class0-/x.png")
    fake.add(tree, "loose.png")
    if kind != "folder":
        shutil.rmtree(tree / "class0" / "a")
        shutil.rmtree(tree / "class0-")
        (tree / "loose.png").unlink()
    root = tree if kind == "folder" else fake.MAKERS[kind](tree, tmp_path / "archive")
    monkeypatch.setattr(parts, "PART", 5)
    settings = {"hashed": hashed, **SMALL}
    cache.build(root, tmp_path / "whole", tokenizer, **settings)
    listed = []
    original = type(open_source(root)).entries

    def counted(self, after=None):
        for entry in original(self, after):
            listed.append(entry.path)
            if len(listed) == stop:
                raise Stop
            yield entry

    total = cache.read_manifest(tmp_path / "whole").images
    for stop in range(2, total, 4):
        out = tmp_path / f"out{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "_check_any_readable", lambda source: None)
            patch.setattr(type(open_source(root)), "entries", counted)
            listed.clear()
            with pytest.raises(Stop):
                cache.prepare(root, out, tokenizer, **settings)
            ahead = 4 * SMALL["workers"] if hashed else 0
            kept = max(0, (stop - 1 - ahead)) // 5 * 5
            assert len(names_of_parts(out)) * 5 >= kept
            kept = len(names_of_parts(out)) * 5
            listed.clear()
            stop = -1
            cache.build(root, out, tokenizer, **settings)
            assert len(listed) == total - kept
        assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def names_of_parts(out):
    folder = out / parts.FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if not temporary.is_temporary(name))


def test_parts_of_another_input_are_not_gone_on_with(tmp_path, out, tokenizer, fake, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    one, other = (fake.make_tree(tmp_path / name) for name in ("one", "other"))
    (other / "class0" / "000.png").unlink()
    (other / "class0" / "003.png").unlink()

    def interrupted(source, **settings):
        job = itertools.islice(source.entries(), 5)
        origin = index.Origin(source.kind, source.files())

        def entries(after):
            yield from job
            raise Stop

        out.make_folder()
        with pytest.raises(Stop):
            parts.write_in_parts(out / "index.parquet", entries, 4, origin, source.root)

    interrupted(open_source(one))
    assert names_of_parts(out) == ["00000.parquet", "00001.parquet"]
    cache.build(other, out, tokenizer, **SMALL)
    cache.build(other, tmp_path / "whole", tokenizer, **SMALL)
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


def test_parts_that_are_no_parts(tree, out, tokenizer):
    (out / parts.FOLDER).mkdir(parents=True)
    (out / parts.FOLDER / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something other than a cache"):
        cache.build(tree, out, tokenizer, **SMALL)


def test_an_extension_that_lost_its_index(tree, out, tokenizer, fake):
    """An extension without its index is dropped, unless the cache's index does not fit either."""
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class0/0.png")
    other = out.with_name("other")
    cache.build(tree, other, tokenizer, **SMALL)
    shutil.copy(other / "manifest.json", out / extension.NEXT_MANIFEST)
    with pytest.raises(cache.ImagesChanged, match="1 added"):
        cache.build(tree, out, tokenizer, **SMALL)
    assert not (out / extension.NEXT_MANIFEST).exists() and cache.verify(out).ok
    assert cache.build(tree, out, tokenizer, extend=True, **SMALL).images == 12
    fake.add(tree, "class0/1.png")
    for folder in (out.with_name("more"), out.with_name("most")):
        cache.build(tree, folder, tokenizer, **SMALL)
        fake.add(tree, "class0/2.png")
    shutil.copy(out.with_name("more") / "manifest.json", out / extension.NEXT_MANIFEST)
    shutil.copy(out.with_name("most") / "index.parquet", out / "index.parquet")
    with pytest.raises(ValueError, match="manifest-next.json: does not match the index"):
        cache.build(tree, out, tokenizer, extend=True, **SMALL)


@pytest.mark.parametrize("how", ["repair", "extend", "extend with more"])
@pytest.mark.parametrize("hashed", [False, True])
def test_quarantined_pictures_that_were_mended_heal(tmp_path, out, tokenizer, fake, how, hashed):
    """Images that were mended to another size are encoded, also in the middle of a full shard."""
    tree = fake.make_tree(tmp_path / "p", count=9, bad=(2, 4, 7))
    settings = {**SMALL, "hashed": hashed}
    assert cache.build(tree, out, tokenizer, **settings).bad == 3
    before = dict(zip(cache.TokenCache(out).rows, cache.read_tokens(out)[0], strict=True))
    for number in (2, 7):
        fake.write_picture(tree / f"class{number % 3}" / f"{number:03d}.png", number)
    # This is no reason to refuse a run: a quarantined image has no tokens that could be wrong.
    assert cache.build(tree, out, tokenizer, **settings).encoded == 0
    if how == "repair":
        assert cache.repair(tree, out, tokenizer) >= 1
    else:
        if how == "extend with more":
            fake.add(tree, "class0/new.png")
        cache.build(tree, out, tokenizer, extend=True, **settings)
    report = cache.verify(out, tokenizer, tree)
    assert report.ok and report.agreement == 1.0 and report.bad == 1
    after = dict(zip(cache.TokenCache(out).rows, cache.read_tokens(out)[0], strict=True))
    assert len(after) == len(before) + 2 + (how == "extend with more")
    assert all(np.array_equal(after[row], tokens) for row, tokens in before.items())
    if how != "extend with more":
        fresh = tmp_path / "fresh"
        cache.build(tree, fresh, tokenizer, **settings)
        assert fake.read_tree(fresh) == fake.read_tree(out)


@pytest.mark.parametrize("how", ["repair", "extend", "extend together"])
def test_hashes_take_in_what_was_mended_to_the_same_size(tmp_path, out, tokenizer, fake, how):
    tree = fake.make_tree(tmp_path / "p", count=9)
    path, other = tree / "class2" / "002.png", tree / "class1" / "004.png"
    good = path.read_bytes()
    for one in (path, other):
        one.write_bytes(bytes(40) + one.read_bytes()[40:])
    settings = {**SMALL, "hashed": True}
    assert cache.build(tree, out, tokenizer, **settings).bad == 2
    path.write_bytes(good)
    if how == "repair":
        assert cache.repair(tree, out, tokenizer) == 1
    else:
        ranks = [1, 0] if how == "extend together" else [0]
        for rank in ranks:
            world = {"rank": rank, "world_size": len(ranks)}
            cache.build(tree, out, tokenizer, extend=True, **world, **settings)
    assert cache.status(out).bad == 1 and cache.verify(out, tokenizer, tree).ok
    fresh = tmp_path / "fresh"
    cache.build(tree, fresh, tokenizer, **settings)
    assert fake.read_tree(fresh) == fake.read_tree(out)


def test_deleted_pictures_are_no_reason_to_refuse(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(4,))
    cache.build(tree, out, tokenizer, **SMALL)
    for number in (0, 4):  # one with cached tokens, one that could not be read
        (tree / f"class{number % 3}" / f"{number:03d}.png").unlink()
    fake.add(tree, "class2/new.png")
    summary = cache.build(tree, out, tokenizer, extend=True, **SMALL)
    assert (summary.images, summary.bad) == (12, 1)
    assert cache.repair(tree, out, tokenizer) == 0 and cache.verify(out).ok


def test_what_extending_keeps_of_deleted_pictures(tmp_path, out, tokenizer, fake):
    """Extending keeps their tokens, except in a last shard that has room and is made again."""
    tree = fake.make_tree(tmp_path / "p")
    cache.build(tree, out, tokenizer, **SMALL)
    before = tokens_by_path(out)
    names = [rows.paths for rows in index.read_all(out / "index.parquet")]
    first, last = names[0][0], names[-1][0]
    assert len(names[-1]) < SMALL["shard_size"]
    kept = (tree / last).read_bytes()
    for name in (first, last):
        (tree / name).unlink()
    fake.add(tree, "class2/new.png")
    assert cache.build(tree, out, tokenizer, extend=True, **SMALL).bad == 1
    (entry,) = shards.read_quarantine(out, len(names) - 1)[0]
    assert (entry["path"], entry["status"]) == (last, shards.GONE)
    now = tokens_by_path(out)
    assert now.keys() == before.keys() - {last} | {"class2/new.png"}
    assert now[first] == before[first]
    # When the image comes back, so do its tokens.
    (tree / last).write_bytes(kept)
    assert cache.repair(tree, out, tokenizer) == 1
    assert tokens_by_path(out)[last] == before[last]


def test_a_slow_run_does_not_write_over_an_extended_cache(tree, out, tokenizer, fake, monkeypatch):
    """A run that began before the extension is stopped before its commit, or undoes the commit.

    Its last shard has fewer images than that of the extended cache.
    """
    slow = cache.prepare(tree, out, tokenizer, **SMALL)
    cache.build(tree, out, tokenizer, **SMALL)
    fake.add(tree, "class2/new.png")
    cache.build(tree, out, tokenizer, extend=True, **SMALL)
    before = fake.read_tree(out)
    last = slow.manifest.shards - 1
    with pytest.raises(cache.ImagesChanged, match="extended it from 11 to 12 pictures; run again"):
        cache.encode_shard(slow, last)
    assert {**fake.read_tree(out), "COMPLETE.json": before["COMPLETE.json"]} == before
    # Nothing can stop it between its check of the manifest and its commit, so it undoes the commit.
    check, looks = job._check_current, []

    def late(one):
        looks.append(one)
        if len(looks) > 1:
            check(one)

    monkeypatch.setattr(job, "_check_current", late)
    with pytest.raises(cache.ImagesChanged, match="run again"):
        cache.encode_shard(slow, last)
    assert len(looks) == 2 and last in cache.pending(cache.prepare(tree, out, tokenizer, **SMALL))
    monkeypatch.undo()
    assert cache.build(tree, out, tokenizer, **SMALL).images == 12 and cache.verify(out).ok


def test_processes_take_mended_pictures_in_together(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(2, 9))
    cache.build(tree, out, tokenizer, **SMALL)
    for number in (2, 9):
        fake.write_picture(tree / f"class{number % 3}" / f"{number:03d}.png", number)
    settings = {**SMALL, "extend": True, "world_size": 2}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(cache.build, tree, out, fake.FakeTokenizer(), rank=1, **settings)
        first = cache.build(tree, out, tokenizer, rank=0, **settings)
        assert (first.bad, other.result(60).bad) == (0, 0)
    assert cache.verify(out, tokenizer, tree).agreement == 1.0
