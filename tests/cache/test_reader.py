"""Reading tokens back: random access, views, skipped bad images, and other processes."""

from __future__ import annotations

import os
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vfmtok_fast import cache
from vfmtok_fast.cache.format import shards

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2, "views": ("center", "center-flip")}


@pytest.fixture
def built(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(1, 10))
    cache.build(tree, out, tokenizer, **SMALL)
    return tree


def test_random_access(built, out, tmp_path, tokenizer, fake):
    """Reading gives the tokens of a cache of the good images alone, at positions without gaps."""
    for name in ("class1/001.png", "class1/010.png"):
        (built / name).unlink()
    cache.build(built, tmp_path / "good", tokenizer, **{**SMALL, "shard_size": 100})
    for view in ("center", "center-flip", None):
        tokens, plain = cache.TokenCache(out, view), cache.TokenCache(tmp_path / "good", view)
        assert len(tokens) == len(plain) == 9
        for position in (8, 0, 5, -1, 3):
            (mine, label), (other, other_label) = tokens[position], plain[position]
            assert mine.dtype == torch.int64 and torch.equal(mine, other)
            assert mine.shape == ((4,) if view else (2, 4)) and label == other_label
    assert tokens.classes == ["class0", "class1", "class2"]
    assert tokens.rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10]
    assert tokens.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    first, second = cache.TokenCache(out, "center"), cache.TokenCache(out, "center-flip")
    assert not torch.equal(first[0][0], second[0][0])


def test_positions_out_of_range(built, out):
    tokens = cache.TokenCache(out, "center")
    for position in (9, -10):
        with pytest.raises(IndexError, match="has 9 pictures"):
            tokens[position]
    for position in (slice(0, 2), "a", 1.0, None):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            tokens[position]
    assert torch.equal(tokens[np.int64(2)][0], tokens[2][0])


def test_read_tokens(built, out):
    for view in ("center", "center-flip"):
        tokens, labels = cache.read_tokens(out, view)
        assert tokens.dtype == np.uint16 and tokens.shape == (9, 4) and tokens.max() < 1000
        for (row, label), expected, number in zip(
            cache.TokenCache(out, view), tokens, labels, strict=True
        ):
            assert row.tolist() == expected.tolist() and label == number


def test_unknown_view(built, out):
    with pytest.raises(ValueError, match="has the views center, center-flip, not 'left'"):
        cache.TokenCache(out, "left")


def test_loader_processes_and_pickles(built, out):
    tokens = cache.TokenCache(out, "center")
    tokens[0]  # opens a file, which must not be pickled
    loader = DataLoader(tokens, batch_size=4, num_workers=1)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    again = pickle.loads(pickle.dumps(tokens))
    for position, row in enumerate(torch.cat([rows for rows, _ in batches])):
        assert torch.equal(row, tokens[position][0]) and torch.equal(row, again[position][0])


def test_incomplete_caches_only_on_request(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    cache.encode_shard(job, 1)
    with pytest.raises(ValueError, match="not complete"):
        cache.TokenCache(out)
    with pytest.raises(ValueError, match="not complete"):
        cache.read_tokens(out)
    assert cache.TokenCache(out, partial=True).rows.tolist() == [4, 5, 6, 7]


def test_a_shard_that_shrinks_under_its_reader(tree, out, tokenizer):
    """Reading it raises an error; if it were mapped, SIGBUS would end the process."""
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=4)
    reader = cache.TokenCache(out)
    first = reader[0]
    path = out / "shards" / "tokens-00000.safetensors"
    os.truncate(path, path.stat().st_size - 300)
    with pytest.raises(ValueError, match="00000.safetensors: was cut short; run vfmtok-fast"):
        for position in range(4):
            reader[position]
    with pytest.raises(ValueError, match="damaged or not a shard"):
        cache.TokenCache(out)
    assert len(first[0]) and len(cache.verify(out).problems) >= 1


def test_a_cache_that_changes_under_its_reader(built, out, tokenizer, fake, monkeypatch):
    reader, sent = cache.TokenCache(out), cache.TokenCache(out)
    first, last = reader[0][0], reader[-1][0]
    shutil.rmtree(out)
    cache.build(built, out, fake.FakeTokenizer(scale=2), **SMALL)
    assert not torch.equal(cache.TokenCache(out)[0][0], first)
    # What is open stays as it was; row 5 is in a shard that is not.
    assert torch.equal(reader[0][0], first) and torch.equal(reader[-1][0], last)
    for changed, position in ((reader, 5), (pickle.loads(pickle.dumps(sent)), 0)):
        with pytest.raises(ValueError, match="tokens-0000.*: changed since this cache was opened"):
            changed[position]
    monkeypatch.setattr("vfmtok_fast.cache.read.reader.TokenCache", lambda out, view: sent)
    with pytest.raises(ValueError, match="tokens-00000.*: changed since this cache was opened"):
        cache.read_tokens(out)


def test_a_cache_that_grows_under_its_reader(built, out, tokenizer, fake):
    reader = cache.TokenCache(out)
    fake.make_tree(built, count=12, bad=(1, 10))
    cache.build(built, out, tokenizer, extend=True, **SMALL)
    with pytest.raises(ValueError, match="tokens-00002.*: changed since this cache was opened"):
        reader[8]
    assert torch.equal(reader[0][0], cache.TokenCache(out)[0][0])


def test_more_shards_than_may_be_open(tree, out, tokenizer, monkeypatch):
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=1)
    want = [tokens for tokens, _ in cache.TokenCache(out)]
    monkeypatch.setattr("vfmtok_fast.cache.read.reader.MOST_OPEN", 3)
    reader, parsed, real = cache.TokenCache(out), [], shards.opened
    monkeypatch.setattr(shards, "opened", lambda path: parsed.append(path) or real(path))
    for _ in range(2):
        assert all(torch.equal(a, b) for (a, _), b in zip(reader, want, strict=True))
        assert len(reader._files) == 3
    assert len(parsed) == len(want)  # not again, because no file changed
    shards.shard_path(out, 0).write_bytes(shards.shard_path(out, 1).read_bytes())
    with pytest.raises(ValueError, match="tokens-00000.*: changed since this cache was opened"):
        reader[0]


def test_few_files_may_be_open(tree, out, tokenizer, monkeypatch):
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=1)
    readers = [cache.TokenCache(out) for _ in range(2)]
    want = [tokens for tokens, _ in cache.TokenCache(out)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)  # numbers are given out in order
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 16, limits[1]))
        for part in (8, 1):  # a small budget; and a large one, which the other reader uses up
            monkeypatch.setattr("vfmtok_fast.cache.read.reader.PART", part)
            for position in (*range(len(want)), 0, 5):
                for reader in readers:
                    assert torch.equal(reader[position][0], want[position])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sum(len(reader._files) for reader in readers) <= 16 < 2 * len(want)


def test_a_shard_that_another_thread_closes_at_once(built, out):
    class Closed(dict):
        def __setitem__(self, number, rows):
            pass

    reader, want = cache.TokenCache(out), cache.TokenCache(out)[3][0]
    reader._files = Closed()
    assert torch.equal(reader[3][0], want)


def test_another_current_folder(built, out, tmp_path, monkeypatch):
    """A relative path keeps its meaning if the current folder changes, as it does with Hydra."""
    monkeypatch.chdir(out.parent)
    reader = cache.TokenCache(out.name)
    want = reader[3][0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(reader[5][0], again[5][0]) and torch.equal(again[3][0], want)
