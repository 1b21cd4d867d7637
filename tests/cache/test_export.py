"""Exports hold what the cache holds, whole or not at all; repair fixes what verify reports."""

from __future__ import annotations

import json
import os
import re
import resource

import numpy as np
import pyarrow.parquet as pq
import pytest

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index, shards

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2, "views": ("center", "center-flip")}


@pytest.fixture
def built(tmp_path, out, tokenizer, fake):
    """A cache of 11 images in 3 shards; the one bad image is in the second, so 10 are readable."""
    tree = fake.make_tree(tmp_path / "p", bad=(1,))
    cache.build(tree, out, tokenizer, **SMALL)
    return tree


def wanted(out):
    tokens = [row[0].tolist() for row in cache.TokenCache(out)]
    return tokens, cache.TokenCache(out).labels.tolist()


def test_llamagen(built, out, tmp_path):
    assert cache.export(out, tmp_path / "lg", "llamagen") == 10
    tokens, labels = wanted(out)
    for folder in ("codes", "labels"):
        assert len(os.listdir(tmp_path / "lg" / f"imagenet256_{folder}")) == 10
    for i in range(10):
        codes = np.load(tmp_path / "lg" / "imagenet256_codes" / f"{i}.npy")
        label = np.load(tmp_path / "lg" / "imagenet256_labels" / f"{i}.npy")
        assert codes.dtype == label.dtype == np.int64 and codes.shape == (1, 2, 4)
        assert codes[0].tolist() == tokens[i] and label.tolist() == [labels[i]]
    assert sorted(os.listdir(tmp_path)) == ["lg", "p", "tokens"]


@pytest.mark.parametrize("format, name", [("rar", "x" * 249 + ".jsonl"), ("llamagen", "é" * 127)])
def test_names_as_long_as_they_may_be(built, out, tmp_path, format, name):
    assert cache.export(out, tmp_path / name, format) > 0
    assert (tmp_path / name).exists() and len(list(tmp_path.glob("*.tmp-*"))) == 0


def test_rar(built, out, tmp_path):
    assert cache.export(out, tmp_path / "new" / "t.jsonl", "rar", views=["center-flip"]) == 10
    tokens, labels = wanted(out)
    lines = [json.loads(line) for line in (tmp_path / "new" / "t.jsonl").read_text().splitlines()]
    assert lines == [
        {"class_id": label, "tokens": row[1]} for row, label in zip(tokens, labels, strict=True)
    ]
    cache.export(out, tmp_path / "all.jsonl", "rar")
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 20


def test_parquet(built, out, tmp_path):
    assert cache.export(out, tmp_path / "t.parquet", "parquet") == 10
    tokens, labels = wanted(out)
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert table["tokens"] == [view for row in tokens for view in row]
    assert table["label"] == [label for label in labels for _ in range(2)]
    assert table["view"] == ["center", "center-flip"] * 10
    assert table["index"][::2] == cache.TokenCache(out).rows.tolist()
    names = [path.relative_to(built).as_posix() for path in sorted(built.rglob("*.png"))]
    assert table["path"][::2] == [name for name in names if name != "class1/001.png"]


@pytest.mark.parametrize("format", ["llamagen", "rar", "parquet"])
def test_nothing_is_left_of_an_export_that_fails(built, out, tmp_path, format, fake):
    path = shards.shard_path(out, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = fake.read_tree(tmp_path)
    with pytest.raises(ValueError, match="tokens-00002.*not match its checksum; run vfmtok-fast"):
        cache.export(out, tmp_path / "target", format)
    assert fake.read_tree(tmp_path) == before and not (tmp_path / "target").exists()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(cache.CacheWriteError, match="cannot write .*target: File too large"):
            cache.export(out, tmp_path / "target", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fake.read_tree(tmp_path) == before


def test_exports_that_are_refused(built, out, tmp_path):
    (tmp_path / "mine").write_text("precious")
    cases = [
        (tmp_path / "mine", "rar", None, FileExistsError, "already exists"),
        (tmp_path / "x", "npz", None, ValueError, "must be one of llamagen, rar, parquet"),
        (tmp_path / "x", "rar", ["random-0"], ValueError, "not 'random-0'"),
        (tmp_path / "mine" / "x", "rar", None, cache.CacheWriteError, "cannot write"),
    ]
    for target, format, views, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            cache.export(out, target, format, views=views)
        assert "\n" not in str(caught.value)
    (out / "COMPLETE.json").unlink()
    with pytest.raises(ValueError, match="not complete"):
        cache.export(out, tmp_path / "x", "rar")
    assert not (tmp_path / "x").exists() and (tmp_path / "mine").read_text() == "precious"


def test_repair(built, out, tmp_path, tokenizer, fake):
    before = fake.read_tree(out)
    flipped = bytearray(before["shards/tokens-00000.safetensors"])
    flipped[-1] ^= 1
    (out / "shards/tokens-00000.safetensors").write_bytes(flipped)
    (out / "quarantine/00001.jsonl").unlink()
    assert len(cache.verify(out).problems) == 2
    told, encoded = [], []
    encode = tokenizer.encode
    tokenizer.encode = lambda images: encoded.append(len(images)) or encode(images)
    assert cache.repair(built, out, tokenizer, tell=told.append) == 2
    assert len(told) == 2 and "does not match its checksum" in told[0]
    assert fake.read_tree(out) == before and len(encoded) == 6
    assert cache.repair(built, out, tokenizer) == 0 and len(encoded) == 6
    for name in ("shards/tokens-00002.safetensors", "COMPLETE.json"):
        (out / name).unlink()
    assert cache.repair(built, out, tokenizer) == 1
    assert fake.read_tree(out) == before


def test_repair_makes_up_for_pictures_that_are_back(built, out, tokenizer, fake):
    """Repair reads images that were missing when their shard was remade; all files match again."""
    before, bad = fake.read_tree(out), cache.status(out).bad
    picture = built / "class0" / "000.png"
    content = picture.read_bytes()
    picture.unlink()
    shards.shard_path(out, 0).unlink()
    assert cache.repair(built, out, tokenizer) == 1
    assert cache.status(out).bad == bad + 1 and fake.read_tree(out) != before
    assert cache.repair(built, out, tokenizer) == 0  # the image is still missing
    picture.write_bytes(content)
    told = []
    assert cache.repair(built, out, tokenizer, tell=told.append) == 1
    assert re.search(r"1 of its [12] quarantined pictures can be read now$", told[0])
    assert fake.read_tree(out) == before


def test_an_interrupted_repair_is_not_forgotten(built, out, tokenizer, fake):
    before = fake.read_tree(out)
    for number in (0, 2):
        path = shards.shard_path(out, number)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    encode = tokenizer.encode
    tokenizer.encode = lambda images: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.repair(built, out, tokenizer)
    assert (cache.status(out).state, cache.status(out).shards_done) == ("incomplete", 1)
    tokenizer.encode = encode
    assert cache.build(built, out, tokenizer, **SMALL).encoded == 7
    assert fake.read_tree(out) == before


def test_repair_mends_a_shard_of_another_tokenizer(built, out, tmp_path, tokenizer, fake):
    before = fake.read_tree(out)
    cache.build(built, tmp_path / "other", fake.FakeTokenizer(scale=2), **SMALL)
    name = "shards/tokens-00001.safetensors"
    (out / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(cache.FingerprintMismatch):
        cache.repair(built, out, fake.FakeTokenizer(scale=2))
    assert cache.repair(built, out, tokenizer) == 1
    assert fake.read_tree(out) == before


def test_repair_refuses_what_it_cannot_mend(built, out, tokenizer, tmp_path):
    (built / "class0" / "000.png").write_bytes(b"other")
    with pytest.raises(cache.ImagesChanged):
        cache.repair(built, out, tokenizer)
    with pytest.raises(FileNotFoundError, match="no token cache here"):
        cache.repair(built, tmp_path / "nowhere", tokenizer)
    (out / "index.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the index"):
        cache.repair(built, out, tokenizer)


def test_the_index_is_opened_as_often_for_many_shards_as_for_one(
    tmp_path, tokenizer, fake, monkeypatch
):
    # Its footer names every shard, so opening it for each of them takes quadratic time.
    opened, real = [], index._source
    monkeypatch.setattr(index, "_source", lambda path: opened.append(path) or real(path))
    tree = fake.make_tree(tmp_path / "p", bad=(1,))

    def counts(size):
        out = tmp_path / str(size)
        cache.build(tree, out, tokenizer, **{**SMALL, "shard_size": size})
        yield "build", len(opened)
        cache.verify(out, tokenizer, tree)
        yield "verify", len(opened)
        cache.repair(tree, out, tokenizer)
        yield "repair", len(opened)
        cache.export(out, tmp_path / f"{size}.parquet", "parquet")
        yield "parquet", len(opened)
        cache.export(out, tmp_path / f"{size}.jsonl", "rar")  # has no paths
        yield "rar", len(opened)

    many = dict(counts(1))
    opened.clear()
    assert many == dict(counts(100)) and many["rar"] == many["parquet"]
