"""verify and status: sound caches pass, and every kind of damage is found and reported."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vfmtok_fast import cache
from vfmtok_fast.cache.format import shards
from vfmtok_fast.cache.store import atomic
from vfmtok_fast.images import center_crop, decode_image

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}
SHARD = "shards/tokens-00001.safetensors"


@pytest.fixture
def built(tmp_path, out, tokenizer, fake):
    """The images of a cache of 11 images in 3 shards, with one bad image in shard 1."""
    tree = fake.make_tree(tmp_path / "p", bad=(1,))
    cache.build(tree, out, tokenizer, views=("center", "center-flip"), **SMALL)
    return tree


def flip_bit(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_sound_cache(built, out, tokenizer, fake):
    before = fake.read_tree(out)
    report = cache.verify(out)
    assert report.ok and (report.images, report.bad, report.shards) == (11, 1, 3)
    assert report.agreement is None and report.sampled == 0
    report = cache.verify(out, tokenizer, built)
    assert report.ok and report.agreement == 1.0 and report.sampled == 11
    assert fake.read_tree(out) == before


def test_contact_sheet(tmp_path, built, out, tokenizer):
    """The sheet pairs first views with their decoded tokens; a good image replaces a bad one."""
    decoded = []

    def decode(codes):
        decoded.append(codes[0].tolist())
        assert not tokenizer.training and codes.dtype == torch.int64
        return torch.full((1, 3, 16, 16), codes[0, 0].item() % 256 / 127.5 - 1)

    with pytest.raises(ValueError, match="a contact sheet needs the pictures and a tokenizer"):
        cache.verify(out, tokenizer, built, sheet=tmp_path / "x.png")
    tokenizer.decode = decode
    with pytest.raises(ValueError, match="a contact sheet needs"):
        cache.verify(out, tokenizer, sheet=tmp_path / "x.png")
    assert cache.verify(out, tokenizer, built, sheet=tmp_path / "deep" / "x.png").ok
    sheet = np.asarray(Image.open(tmp_path / "deep" / "x.png"))
    found = cache.TokenCache(out)
    assert sheet.shape == (3 * 16, 8 * 16, 3) and len(decoded) == found.manifest.images
    known = {tuple(found[i][0][0].tolist()) for i in range(len(found))}
    assert set(map(tuple, decoded)) == known
    path = sorted(path for path in built.rglob("*.png"))[0]
    first = center_crop(decode_image(path), 16)
    first = first[:, ::-1] if found.manifest.views[0].endswith("flip") else first
    np.testing.assert_array_equal(sheet[:16, :16], first)
    assert (sheet[:16, 16:32] == decoded[0][0] % 256).all()


def test_sample_is_spread_and_rounded_to_batches(built, out, tokenizer):
    tokenizer.batches.clear()
    report = cache.verify(out, tokenizer, built, sample=4)
    assert report.ok and 4 <= report.sampled < 11 and set(tokenizer.batches) == {3}


def test_every_flipped_bit_of_the_payload_is_found(built, out):
    path = out / SHARD
    data = path.read_bytes()
    payload = 8 + int.from_bytes(data[:8], "little")
    for at in range(payload, len(data), 7):
        flip_bit(path, at)
        report = cache.verify(out)
        assert len(report.problems) == 1 and "does not match its checksum" in report.problems[0]
        assert SHARD in report.problems[0]
        flip_bit(path, at)
    assert cache.verify(out).ok


def test_no_flipped_bit_of_the_header_is_a_crash(built, out):
    path = out / SHARD
    data = path.read_bytes()
    for at in range(0, 8 + int.from_bytes(data[:8], "little"), 11):
        flip_bit(path, at)
        for problem in cache.verify(out).problems:
            assert "\n" not in problem
        path.write_bytes(data)
    assert cache.verify(out).ok


def damage_truncated(out):
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-9])


def damage_missing(out):
    (out / SHARD).unlink()


def damage_swapped(out):
    shutil.copy(out / "shards/tokens-00000.safetensors", out / SHARD)


def damage_extra(out):
    shutil.copy(out / SHARD, out / "shards/tokens-00007.safetensors")


def damage_quarantine(out):
    path = out / "quarantine/00001.jsonl"
    path.write_text(path.read_text().replace("class1", "class2"))


def damage_quarantine_missing(out):
    (out / "quarantine/00001.jsonl").unlink()


def damage_quarantine_extra(out):
    shutil.copy(out / "quarantine/00001.jsonl", out / "quarantine/00000.jsonl")


def damage_index(out):
    (out / "index.parquet").write_bytes(b"no")


def damage_complete_missing(out):
    (out / "COMPLETE.json").unlink()


def damage_complete(out):
    path = out / "COMPLETE.json"
    path.write_text(path.read_text().replace('"bad": 1', '"bad": 0'))


def damage_not_a_shard(out):
    (out / SHARD).write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    "damage, text",
    [
        (damage_truncated, "damaged or not a shard"),
        (damage_missing, "1 of 3 shards are missing"),
        (damage_swapped, "is shard 0, not 1"),
        (damage_extra, "does not belong to this cache"),
        (damage_quarantine, "does not agree with .*00001.jsonl"),
        (damage_quarantine_missing, "does not agree with .*00001.jsonl"),
        (damage_quarantine_extra, "does not agree with .*00000.jsonl"),
        (damage_index, "cannot read the index"),
        (damage_complete_missing, "COMPLETE.json: missing although"),
        (damage_complete, "COMPLETE.json: does not agree"),
        (damage_not_a_shard, "damaged or not a shard"),
    ],
)
def test_damage_is_named(built, out, tokenizer, damage, text):
    damage(out)
    problems = cache.verify(out, tokenizer, built).problems
    assert len(problems) == 1 and "\n" not in problems[0]
    assert re.search(text, problems[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((text, "damaged") for text in ("1\n", "null\n", "[]\n", '{"a": 1}\n', "\n", '{"ind')),
        ('{"index": "x", "path": "y", "status": 1}\n', "does not agree"),
        ('{"path": "y"}\n', "does not agree"),
    ],
)
def test_a_damaged_quarantine_list_is_named_and_mended(built, out, tokenizer, fake, text, problem):
    before = fake.read_tree(out)
    (out / "quarantine/00001.jsonl").write_text(text)
    (found,) = cache.verify(out).problems
    assert problem in found and "run vfmtok-fast repair" in found
    assert cache.repair(built, out, tokenizer) == 1
    assert fake.read_tree(out) == before


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda shard: shard.tokens.__setitem__((1, 0, 0), 1000), "tokens of 1000 or more"),
        (lambda shard: shard.tokens.__setitem__((0, 1, 3), 7), "holds tokens for bad pictures"),
        (lambda shard: shard.status.__setitem__(1, 9), "status holds values other"),
        (lambda shard: shard.index.__setitem__(1, 0), "index is not the run of numbers"),
        (lambda shard: shard.label.__setitem__(1, 2), "labels do not agree with the index"),
        (
            lambda shard: setattr(shard, "tokens", shard.tokens[:, :1]),
            r"instead of uint16 \(4, 2, 4\)",
        ),
    ],
)
def test_wrong_contents_with_right_checksums_are_named(built, out, change, text):
    """verify reports what a faulty writer would produce."""
    header, shard = shards.read_shard(out / SHARD)
    bad = int(np.flatnonzero(shard.status)[0])
    assert bad == 0
    change(shard)
    entries, _ = shards.read_quarantine(out, 1)
    shard.quarantine = entries
    shards.write_shard(out, header.fingerprint, shard)
    problems = cache.verify(out).problems
    assert any(re.search(text, problem) for problem in problems), problems


def test_another_tokenizer_is_refused_by_name(built, out, fake):
    with pytest.raises(cache.FingerprintMismatch, match=r"weights_sha256 \(there \w{12}\.\.\.,"):
        cache.verify(out, fake.FakeTokenizer(scale=2))


def test_disagreement_is_measured(built, out, tokenizer):
    encode = tokenizer.encode
    tokenizer.encode = lambda images: encode(images) * 0 + 1
    report = cache.verify(out, tokenizer, built)
    assert not report.ok and report.agreement < 0.1 and "tokens agree" in report.problems[0]


def test_changed_pictures_show_in_the_sample(built, out, tokenizer):
    (built / "class2" / "002.png").unlink()
    report = cache.verify(out, tokenizer, built)
    assert report.agreement == 1.0
    assert report.problems == [
        f"{built}: 'class2/002.png' is cached as read, but: gone since it was indexed"
    ]


def test_a_folder_that_has_gone_is_one_problem_among_others(built, out, tokenizer):
    flip_bit(out / SHARD, -1)
    shutil.rmtree(built / "class2")
    tokenizer.decode = lambda codes: torch.zeros(1, 3, 16, 16)
    report = cache.verify(out, tokenizer, built, sheet=out.with_name("x.png"))
    first, second = report.problems
    assert SHARD in first and f"{built / 'class2'}: this folder has disappeared" in second
    assert out.with_name("x.png").exists()


def test_arguments_that_will_not_do(built, out, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="needs the tokenizer"):
        cache.verify(out, images=built)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cache.verify(out, tokenizer, tmp_path / "missing")
    with pytest.raises(ValueError, match="sample must be at least 1"):
        cache.verify(out, sample=0)


@pytest.mark.parametrize("function", [cache.verify, cache.status, cache.TokenCache])
def test_no_cache_here(function, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="no token cache here"):
            function(folder)


@pytest.mark.parametrize(
    "old, new, text",
    [
        ('"version": 1', '"version": 2', "format version 2, but this program reads 1"),
        ("token cache", "other thing", "not the manifest of a token cache"),
        ('"shard_size": 4', '"shard_size": 0', "damaged"),
        ('"batch_size": 3', '"batch_size": 4', "fingerprint does not match"),
        ('"counts"', '"count"', "damaged"),
        ("{", "", "damaged"),
    ],
)
def test_damaged_manifest(built, out, old, new, text):
    path = out / "manifest.json"
    content = path.read_text()
    path.write_text(content.replace(old, new, 1))
    assert path.read_text() != content
    with pytest.raises(ValueError, match=text) as caught:
        cache.verify(out)
    assert "\n" not in str(caught.value)


def test_status_through_a_run(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    state = cache.status(out)
    assert (state.state, state.images, state.done, state.shards) == ("incomplete", 11, 0, 3)
    cache.encode_shard(job, 1)
    state = cache.status(out)
    assert (state.done, state.shards_done, state.writing) == (4, 1, 0)
    for number in cache.pending(job):
        cache.encode_shard(job, number)
    assert cache.status(out).state == "incomplete"  # until COMPLETE.json says so
    cache.finish(job)
    state = cache.status(out)
    assert (state.state, state.done, state.bad, state.views) == ("complete", 11, 0, ("center",))


def test_failures_are_listed_while_it_runs(tmp_path, out, tokenizer, fake):
    tree, seen = fake.make_tree(tmp_path / "p", bad=(0, 5, 10)), []

    def look(state):
        found = cache.status(out)
        listed = [entry["path"] for entry in cache.failures(out)]
        # Another shard may be committed between these calls.
        assert found.bad <= len(listed) <= cache.status(out).bad
        seen.append((found.state, listed))

    cache.build(tree, out, tokenizer, progress=look, **SMALL)
    every = ["class0/000.png", "class1/010.png", "class2/005.png"]
    # Which of them are listed at a given call depends on the speed of the committing thread.
    assert all(listed == [path for path in every if path in listed] for _, listed in seen)
    assert any(state == "incomplete" and listed for state, listed in seen)
    assert seen[-1][1] == every


def test_status_while_indexing(out):
    out.mkdir()
    (out / "index.parquet.tmp-elsewhere-1").write_bytes(b"")
    assert cache.status(out).state == "indexing" and cache.status(out).writing == 1


def test_complete_is_written_last(tree, out, tokenizer, monkeypatch):
    order = []
    write = atomic.atomic_file
    monkeypatch.setattr(atomic, "atomic_file", lambda path: order.append(path.name) or write(path))
    cache.build(tree, out, tokenizer, **SMALL)
    assert order[:2] == ["index.parquet", "manifest.json"] and order[-1] == "COMPLETE.json"
    assert len(order) == 6
    (out / SHARD).unlink()
    with pytest.raises(RuntimeError, match="stop"):
        tokenizer.encode = lambda images: (_ for _ in ()).throw(RuntimeError("stop"))
        cache.build(tree, out, tokenizer, **SMALL)
    assert not (out / "COMPLETE.json").exists()


def test_shard_without_bad_pictures_clears_an_orphaned_list(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    orphan = out / "quarantine" / "00000.jsonl"
    orphan.write_text(json.dumps({"index": 0, "path": "x", "reason": "y", "status": 1}) + "\n")
    cache.encode_shard(job, 0)
    assert not orphan.exists()
