"""Building: the contents of a shard, bad images, and resuming a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.format.fingerprint import weights_checksum
from vfmtok_fast.cache.make import encode
from vfmtok_fast.cache.make.encode import encode_rows
from vfmtok_fast.cache.make.prepare import prepare
from vfmtok_fast.cache.sources.folder import FolderSource
from vfmtok_fast.images import center_crop, decode_image, to_float

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


def one_line(error):
    return "\n" not in str(error.value)


def expected_tokens(tokenizer, path, flip=False):
    crop = center_crop(decode_image(path), 16)
    crop = np.ascontiguousarray(crop[:, ::-1] if flip else crop)
    with torch.no_grad():
        return tokenizer.eval().encode(to_float(crop[None]))[0].numpy()


def test_contents(tree, out, tokenizer):
    summary = cache.build(tree, out, tokenizer, views=("center-flip", "center"), **SMALL)
    assert (summary.images, summary.bad, summary.shards, summary.encoded) == (11, 0, 3, 11)
    assert summary.exit_code == 0
    assert set(tokenizer.batches) == {3} and tokenizer.training
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.png"))
    seen = 0
    for number, count in enumerate((4, 4, 3)):
        path = out / "shards" / f"tokens-{number:05d}.safetensors"
        with safe_open(path, framework="numpy") as file:
            assert list(file.metadata()) == ["vfmtok_fast"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        kinds = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        assert kinds == {
            "tokens": ("uint16", (count, 2, 4)),
            "index": ("int64", (count,)),
            "label": ("int32", (count,)),
            "status": ("uint8", (count,)),
        }
        assert arrays["index"].tolist() == list(range(seen, seen + count))
        assert not arrays["status"].any()
        for row in range(count):
            name = paths[seen + row]
            assert arrays["label"][row] == int(name[5])
            for view, flip in enumerate((True, False)):
                np.testing.assert_array_equal(
                    arrays["tokens"][row, view], expected_tokens(tokenizer, tree / name, flip)
                )
        seen += count
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["views"] == ["center-flip", "center"] and manifest["version"] == 1
    assert manifest["counts"] == {"images": 11, "shards": 3, "classes": 3}
    assert manifest["classes"] == ["class0", "class1", "class2"]
    assert json.loads((out / "COMPLETE.json").read_text())["bad"] == 0
    assert list((out / "quarantine").iterdir()) == []


def test_bytes_do_not_depend_on_workers_place_or_time(tree, tmp_path, tokenizer, fake):
    trees = []
    for number, workers in enumerate((1, 4)):
        cache.build(tree, tmp_path / str(number), tokenizer, **{**SMALL, "workers": workers})
        trees.append(fake.read_tree(tmp_path / str(number)))
    moved = tree.rename(tmp_path / "moved")
    cache.build(moved, tmp_path / "2", tokenizer, **SMALL)
    assert trees[0] == trees[1] == fake.read_tree(tmp_path / "2")


def test_bad_pictures_keep_their_slot_and_change_no_other(tmp_path, out, tokenizer, fake):
    good = fake.make_tree(tmp_path / "good")
    bad = fake.make_tree(tmp_path / "bad", bad=(0, 5))
    (bad / "class1" / "007.png").write_bytes(b"")
    Image.new("RGB", (90000, 1)).save(bad / "class2" / "002.png")
    cache.build(good, tmp_path / "all", tokenizer, **SMALL)
    summary = cache.build(bad, out, tokenizer, **SMALL)
    assert summary.bad == 4 and summary.exit_code == 3
    lines = [
        json.loads(line)
        for path in sorted((out / "quarantine").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("class0/000.png", 1),
        ("class1/007.png", 1),
        ("class2/002.png", 1),
        ("class2/005.png", 1),
    ]
    assert "truncated" in lines[0]["reason"] and lines[1]["reason"] == "empty file"
    assert "too elongated" in lines[2]["reason"]
    assert str(tmp_path) not in json.dumps(lines)
    quarantined = {line["index"] for line in lines}
    for number in range(3):
        name = f"shards/tokens-{number:05d}.safetensors"
        with (
            safe_open(out / name, framework="numpy") as now,
            safe_open(tmp_path / "all" / name, framework="numpy") as then,
        ):
            index = now.get_tensor("index")
            hit = np.isin(index, list(quarantined))
            assert (now.get_tensor("tokens")[hit] == 0xFFFF).all()
            assert now.get_tensor("status").tolist() == hit.astype(int).tolist()
            np.testing.assert_array_equal(
                now.get_tensor("tokens")[~hit], then.get_tensor("tokens")[~hit]
            )
            np.testing.assert_array_equal(now.get_tensor("label"), then.get_tensor("label"))
    assert cache.verify(out, tokenizer, bad).ok


def test_pictures_that_cannot_be_opened(tree, out, tokenizer):
    (tree / "class0" / "dangling.png").symlink_to(tree / "nothing")
    (tree / "class0" / "loop.png").symlink_to(tree / "class0" / "loop.png")
    odd = os.fsencode(tree / "class1") + b"/caf\xe9.png"
    shutil.copy(tree / "class0" / "000.png", odd)
    summary = cache.build(tree, out, tokenizer, **SMALL)
    lines = "".join(path.read_text() for path in sorted((out / "quarantine").iterdir()))
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines.splitlines())}
    assert summary.bad == 3 and reasons == {
        "class0/dangling.png": "a link to a file that does not exist",
        "class0/loop.png": "cannot be opened: Too many levels of symbolic links",
        "class1/caf\\xe9.png": "its name is not UTF-8; rename it",
    }
    assert cache.verify(out, tokenizer, tree).ok


def test_picture_without_permission(as_nobody, tokenizer, fake):
    tree, out = fake.make_tree(as_nobody / "p"), as_nobody / "tokens"
    (tree / "class0" / "003.png").chmod(0)
    assert cache.build(tree, out, tokenizer, **SMALL).bad == 1
    assert "Permission denied" in (out / "quarantine" / "00000.jsonl").read_text()


def test_pictures_that_vanish_or_change_during_the_run(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    (tree / "class0" / "003.png").unlink()
    (tree / "class0" / "006.png").write_bytes(b"other")
    (tree / "class1" / "001.png").unlink()
    (tree / "class1" / "001.png").mkdir()
    for number in cache.pending(job):
        cache.encode_shard(job, number)
    assert cache.finish(job) == 3
    entries = map(
        json.loads,
        "".join(path.read_text() for path in sorted((out / "quarantine").iterdir())).splitlines(),
    )
    assert [(entry["status"], entry["reason"].split(":")[0]) for entry in entries] == [
        (2, "gone since it was indexed"),
        (2, "changed since it was indexed"),
        (2, "no longer a regular file"),
    ]


def test_a_vanished_folder_stops_the_run_instead_of_quarantining_it(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    shutil.rmtree(tree / "class0")
    with pytest.raises(FileNotFoundError, match="class0: this folder has disappeared") as caught:
        cache.encode_shard(job, 0)
    assert one_line(caught) and list((out / "shards").iterdir()) == []


def test_resume_encodes_only_what_is_missing_or_cut_short(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    before = fake.read_tree(out)
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 0
    shards = sorted((out / "shards").iterdir())
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-5])
    assert cache.status(out).damaged == (2,) and cache.status(out).state == "incomplete"
    assert cache.build(tree, out, tokenizer, **SMALL).encoded == 4 + 3
    assert fake.read_tree(out) == before


def test_two_writers_of_one_shard_agree(tree, out, tokenizer, fake):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    other = cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
    for number in (2, 0, 1, 0):
        cache.encode_shard(job, number)
        cache.encode_shard(other, number)
    assert cache.pending(job) == [] and cache.finish(job) == cache.finish(other) == 0
    assert cache.verify(out, tokenizer, tree).ok
    with pytest.raises(ValueError, match="has 3 shards, no shard 3"):
        cache.encode_shard(job, 3)


def test_finish_refuses_while_shards_are_missing(tree, out, tokenizer):
    job = cache.prepare(tree, out, tokenizer, **SMALL)
    cache.encode_shard(job, 1)
    with pytest.raises(ValueError, match="2 of 3 shards are missing"):
        cache.finish(job)
    assert not (out / "COMPLETE.json").exists()


def test_progress(tree, out, tokenizer, capfd):
    states = []
    cache.build(
        tree, out, tokenizer, views=("center", "center-flip"), progress=states.append, **SMALL
    )
    assert states[-1] == cache.Progress(done=11, bad=0, total=11)
    assert [state.done for state in states] == sorted(state.done for state in states)
    (out / "shards" / "tokens-00001.safetensors").unlink()
    states.clear()
    cache.build(
        tree, out, tokenizer, views=("center", "center-flip"), progress=states.append, **SMALL
    )
    assert states[0].done >= 7 and states[-1].done == 11
    cache.build(tree, out, tokenizer, views=("center", "center-flip"), progress=True, **SMALL)
    assert capfd.readouterr() == ("", "")  # without a terminal there is no progress bar


def test_max_bad(tmp_path, out, tokenizer, fake):
    tree = fake.make_tree(tmp_path / "p", bad=(0, 1, 2))
    with pytest.raises(cache.TooManyBadImages, match="more than max_bad=2") as caught:
        cache.build(tree, out, tokenizer, max_bad=2, **SMALL)
    assert one_line(caught) and caught.value.exit_code == 4
    assert not (out / "COMPLETE.json").exists()
    with pytest.raises(cache.TooManyBadImages):  # the next run still counts them
        cache.build(tree, out, tokenizer, max_bad=2, **SMALL)
    assert cache.build(tree, out, tokenizer, max_bad=3, **SMALL).exit_code == 3
    with pytest.raises(cache.TooManyBadImages):  # and so does one that has nothing to encode
        cache.build(tree, out, tokenizer, max_bad=0, **SMALL)


def test_decoding_ahead_is_bounded(tree, out, tokenizer, monkeypatch):
    """However slow the encoder is, at most two batches and the workers' images are held."""
    job = cache.prepare(tree, out, tokenizer, batch_size=1, shard_size=100, workers=1)
    rows = index.read_rows(out / "index.parquet", 0)
    decoded, ahead = [], []
    monkeypatch.setattr(
        "vfmtok_fast.cache.make.encode.decode_image",
        lambda data: decoded.append(1) or decode_image(data),
    )
    encode = tokenizer.encode

    def slow(images):
        time.sleep(0.02)
        ahead.append(len(decoded) - len(ahead))
        return encode(images)

    tokenizer.encode = slow
    encode_rows(FolderSource(tree), rows, job.manifest, tokenizer, 1)
    assert len(ahead) == 11 and 2 <= max(ahead) <= 4


def test_padding_and_bad_pictures_are_black(tmp_path, out, tokenizer, fake):
    """Buffers are reused, so what an earlier batch left there must be cleared."""
    tree = fake.make_tree(tmp_path / "p", count=8, bad=(4,))
    batches, encode = [], tokenizer.encode
    tokenizer.encode = lambda images: batches.append(images.clone()) or encode(images)
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=100, workers=1)
    black = torch.cat(batches).flatten(1).eq(-1).all(1)
    names = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.png"))
    assert black.tolist() == [name.endswith("004.png") for name in names] + [True]


def test_bfloat16_weights_get_bfloat16_pictures(tree, out, fake):
    tokenizer = fake.FakeTokenizer().to(torch.bfloat16)
    kinds = set()

    def encode(images):
        kinds.add(images.dtype)
        return torch.zeros(3, 4, dtype=torch.long)

    tokenizer.encode = encode
    cache.build(tree, out, tokenizer, **SMALL)
    assert kinds == {torch.bfloat16}
    covers = json.loads((out / "manifest.json").read_text())["covers"]
    assert covers["dtype"] == "bfloat16" and covers["config"] == {
        **dataclasses.asdict(tokenizer.config),
        "levels": [1, 2],
    }


def test_a_default_device_changes_nothing(tree, tmp_path, tokenizer, fake):
    cache.build(tree, tmp_path / "plain", tokenizer, **SMALL)
    torch.set_default_device("meta")
    try:
        cache.build(tree, tmp_path / "other", tokenizer, **SMALL)
        tokens, _ = cache.TokenCacheDataset(tmp_path / "other")[3]
        assert cache.verify(tmp_path / "other", tokenizer, tree).ok
    finally:
        torch.set_default_device(None)
    assert tokens.device.type == "cpu"
    assert fake.read_tree(tmp_path / "other") == fake.read_tree(tmp_path / "plain")


def test_a_compiled_or_wrapped_tokenizer_is_the_same(tree, out, tokenizer):
    """The checksum ignores what torch.compile and DistributedDataParallel add to weight names."""
    cache.build(tree, out, tokenizer, **SMALL)
    plain = weights_checksum({"a.weight": torch.ones(2), "b.c": torch.zeros(1)})
    for names in (
        ("_orig_mod.a.weight", "_orig_mod.b.c"),
        ("module.a.weight", "module.b.c"),
        ("module._orig_mod.a.weight", "module._orig_mod.b.c"),
        ("a._orig_mod.weight", "b.c"),
    ):
        assert (
            weights_checksum(dict(zip(names, (torch.ones(2), torch.zeros(1)), strict=True)))
            == plain
        )
    assert cache.build(tree, out, torch.compile(tokenizer), **SMALL).encoded == 0


def test_wrappers_as_torch_makes_them_leave_the_checksum(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    plain = weights_checksum(model.state_dict())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for wrapped in (torch.compile(model), parallel, torch.compile(parallel)):
            assert weights_checksum(wrapped.state_dict()) == plain
    finally:
        torch.distributed.destroy_process_group()
    model[1] = torch.compile(model[1])
    assert any("_orig_mod." in name for name in model.state_dict())
    assert weights_checksum(model.state_dict()) == plain


def test_another_current_folder_during_a_build(tree, tokenizer, tmp_path, monkeypatch):
    """Both paths keep their meaning if the current folder changes, as it does with Hydra."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tree.parent)
    calls = []

    def move(progress: cache.Progress) -> None:
        calls.append(progress)
        os.chdir(tmp_path / "elsewhere")

    summary = cache.build(
        tree.name, "tokens", tokenizer, batch_size=3, shard_size=2, workers=1, progress=move
    )
    assert calls and summary.bad == 0 and not list((tmp_path / "elsewhere").iterdir())
    assert cache.verify(tree.parent / "tokens", tokenizer, tree).ok


def test_the_batch_size_is_the_caches_own(tree, out, tokenizer):
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=2)
    before = (out / "manifest.json").read_bytes()
    (out / "shards" / "tokens-00001.safetensors").unlink()
    (out / "COMPLETE.json").unlink()
    assert cache.build(tree, out, tokenizer, shard_size=2).encoded == 2
    assert (out / "manifest.json").read_bytes() == before and cache.verify(out, tokenizer, tree).ok
    with pytest.raises(cache.FingerprintMismatch, match=r"batch_size \(there 3, here 16\)"):
        cache.build(tree, out, tokenizer, batch_size=16, shard_size=2)
    cache.build(tree, out.with_name("new"), tokenizer)
    assert cache.read_manifest(out.with_name("new")).batch_size == 4
    job = prepare(tree, out.with_name("gpu"), tokenizer, device="cuda")
    assert job.manifest.batch_size == 64


def test_until_the_first_shard_the_batch_size_may_change(tree, tmp_path, out, tokenizer, fake):
    """A cache without shards accepts another batch size, as after a run that ran out of memory."""
    slow = cache.prepare(tree, out, tokenizer, batch_size=64, shard_size=4)
    with pytest.raises(cache.FingerprintMismatch, match="views"):
        cache.prepare(tree, out, tokenizer, batch_size=3, shard_size=4, views=["center-flip"])
    assert cache.read_manifest(out) == slow.manifest
    cache.prepare(tree, out, tokenizer, batch_size=3, shard_size=4)
    with pytest.raises(cache.ImagesChanged, match="with a batch size of 3 instead of 64; run aga"):
        cache.encode_shard(slow, 0)
    cache.build(tree, out, tokenizer, **SMALL)
    with pytest.raises(cache.ImagesChanged, match="with a batch size of 3 instead of 64; run aga"):
        cache.finish(slow)
    cache.build(tree, tmp_path / "new", tokenizer, **SMALL)
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "new")
    with pytest.raises(cache.FingerprintMismatch, match=r"batch_size \(there 3, here 2\)"):
        cache.prepare(tree, out, tokenizer, batch_size=2, shard_size=4)


@pytest.mark.parametrize("in_flight", [2, 3])
def test_batches_in_flight_change_no_byte(in_flight, tree, tmp_path, fake, monkeypatch):
    """As on a GPU, all batches but the first are encoded concurrently, and collected in order."""
    running, most, calls = [], [], itertools.count()

    class Slow(fake.FakeTokenizer):
        def encode(self, images):
            call = next(calls)
            running.append(call)
            most.append(len(running))
            if 1 <= call <= number:
                together.wait(60)  # for the largest number in flight, however slow the machine
            # Even calls take twice as long as odd ones, so batches may finish out of order.
            time.sleep(0.05 / (1 + call % 2))
            tokens = super().encode(images)
            running.pop()
            return tokens

    want = {}
    for number in (1, in_flight):
        monkeypatch.setitem(encode.IN_FLIGHT, "cpu", number)
        out = tmp_path / str(number)
        most.clear()
        calls, together = itertools.count(), threading.Barrier(number)
        cache.build(tree, out, Slow(), batch_size=2, shard_size=11, workers=2)
        assert max(most) == number and most[0] == 1
        want[number] = fake.read_tree(out)
    assert want[1] == want[in_flight]


def test_an_error_of_a_batch_in_flight_ends_the_run(tree, out, tokenizer, monkeypatch):
    monkeypatch.setitem(encode.IN_FLIGHT, "cpu", 2)
    plain, calls = tokenizer.encode, []

    def failing(images):
        calls.append(images)
        if len(calls) == 3:
            raise RuntimeError("the third batch")
        return plain(images)

    tokenizer.encode = failing
    with pytest.raises(RuntimeError, match="the third batch"):
        cache.build(tree, out, tokenizer, batch_size=2, shard_size=11, workers=2)
    tokenizer.encode = plain
    cache.build(tree, out, tokenizer, batch_size=2, shard_size=11, workers=2)
    assert cache.verify(out, tokenizer, tree).ok
