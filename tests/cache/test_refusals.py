"""Everything that a build refuses, with a one-line message and without touching any file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import ImageFile

import vfmtok_fast
from vfmtok_fast import cache
from vfmtok_fast.cache.format.fingerprint import describe

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, key",
    [
        ({"views": ("center-flip",)}, r"views \(there center, here center-flip\)"),
        ({"batch_size": 4}, "batch_size"),
        ({"shard_size": 5}, "shard_size"),
        ({"scale": 2}, "weights_sha256"),
        ({"levels": (1, 3)}, r"config\.levels \(there 1\+2, here 1\+3\)"),
        ({"codebook_size": 999}, "codebook_size.*config.codebook_size"),
        ({"dtype": torch.float64}, r"dtype \(there float32, here float64\)"),
        ({"decoder": "0.0"}, "decoder_version"),
        ({"levels": (2,), "scale": 3}, "config.levels.*weights_sha256"),
    ],
)
def test_another_fingerprint_is_refused_by_name(tree, out, fake, change, key, monkeypatch):
    cache.build(tree, out, fake.FakeTokenizer(), **SMALL)
    before = fake.read_tree(out)
    config = {k: change[k] for k in ("levels", "codebook_size") if k in change}
    other = fake.FakeTokenizer(fake.FakeConfig(**config), change.get("scale", 1))
    other.to(change.get("dtype", torch.float32))
    if "decoder" in change:
        monkeypatch.setattr("vfmtok_fast.images.DECODER_VERSION", change["decoder"])
    settings = {k: change[k] for k in ("views", "batch_size", "shard_size") if k in change}
    with pytest.raises(cache.FingerprintMismatch, match=key) as caught:
        cache.build(tree, out, other, **{**SMALL, **settings})
    assert one_line(caught) and fake.read_tree(out) == before


def test_a_foreign_shard_is_refused(tree, tmp_path, out, fake):
    cache.build(tree, out, fake.FakeTokenizer(), **SMALL)
    cache.build(tree, tmp_path / "other", fake.FakeTokenizer(scale=2), **SMALL)
    name = "shards/tokens-00001.safetensors"
    shutil.copy(tmp_path / "other" / name, out / name)
    with pytest.raises(cache.FingerprintMismatch, match="tokens-00001.*another tokenizer"):
        cache.build(tree, out, fake.FakeTokenizer(), **SMALL)


def test_pictures_added_later_are_refused(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    fake.write_picture(tree / "class1" / "new.png", 99)
    with pytest.raises(cache.ImagesChanged, match=r"1 added, 0 .*'class1/new\.png'") as caught:
        cache.build(tree, out, tokenizer, **SMALL)
    assert one_line(caught)


@pytest.mark.parametrize("kind", ["file", "manifest", "index", "folder", "no_manifest_shard"])
def test_folder_that_holds_something_else_is_left_alone(tree, out, tokenizer, fake, kind):
    out.mkdir()
    name = {"manifest": "manifest.json", "index": "index.parquet"}.get(kind, "thesis.tex")
    if kind == "folder":
        (out / "shards").mkdir()
        name = "shards/mine.bin"
    if kind == "no_manifest_shard":
        cache.build(tree, out, tokenizer, **SMALL)
        (out / "manifest.json").unlink()
    else:
        (out / name).write_text('{"my": "own"}')
    before = fake.read_tree(out)
    with pytest.raises((FileExistsError, ValueError)) as caught:
        cache.build(tree, out, tokenizer, **SMALL)
    assert one_line(caught) and str(out) in str(caught.value)
    assert fake.read_tree(out) == before


def test_what_a_run_leaves_that_died_before_its_manifest_is_taken_over(tree, out, tokenizer, fake):
    cache.build(tree, out, tokenizer, **SMALL)
    before = fake.read_tree(out)
    for name in before:
        if name != "index.parquet":
            (out / name).unlink()
    (out / "shards" / "tokens-00000.safetensors.tmp-elsewhere-1").write_bytes(b"")
    assert cache.status(out).state == "indexing"
    cache.build(tree, out, tokenizer, **SMALL)
    (out / "shards" / "tokens-00000.safetensors.tmp-elsewhere-1").unlink()
    assert fake.read_tree(out) == before


def test_folders_that_will_not_do(tmp_path, tree, out, tokenizer, fake):
    empty, bad, note = tmp_path / "empty", tmp_path / "bad", tmp_path / "note"
    (empty / "class").mkdir(parents=True)
    fake.make_tree(bad, 3, bad=(0, 1, 2))
    note.write_text("hello")
    cases = [
        (tmp_path / "missing", out, FileNotFoundError, "no such folder"),
        (note, out, NotADirectoryError, "must be a folder"),
        (empty, out, ValueError, "no pictures here"),
        (bad, out, ValueError, r"none of its 3 pictures can be read; .*000\.png.*truncated"),
        (tree, note, FileExistsError, "must be a folder, but is a file"),
        (tree, tree / "out", ValueError, "inside the pictures' folder"),
        (tree, tree, ValueError, "inside the pictures' folder"),
        (tree, "/proc/self/no/out", cache.CacheWriteError, "cannot write /proc/self/no/out"),
    ]
    for images, target, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            cache.build(images, target, tokenizer, **SMALL)
        assert one_line(caught)
        assert not out.exists() and not (tree / "out").exists()
    assert note.read_text() == "hello"


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"views": ()}, ValueError, "at least one of center, center-flip"),
        ({"views": "center"}, TypeError, r"use \['center'\]"),
        ({"views": ("centre",)}, ValueError, "must be among center, center-flip, .*, got 'centre'"),
        ({"views": ("center", "center")}, ValueError, "name each view once"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, r"batch_size must be an integer, got 2\.0"),
        ({"shard_size": True}, TypeError, "shard_size must be an integer, got True"),
        ({"workers": 0}, ValueError, "workers must be at least 1"),
        ({"max_bad": -1}, ValueError, "max_bad must be at least 0"),
    ],
)
def test_arguments_that_will_not_do(tree, out, tokenizer, arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        cache.build(tree, out, tokenizer, **arguments)
    assert one_line(caught) and not out.exists()


@pytest.mark.parametrize(
    "answer, text",
    [
        (torch.full((3, 4), 1000), "0 to 999, got 1000"),
        (torch.full((3, 4), -1), "0 to 999, got -1"),
        (torch.zeros(3, 5, dtype=torch.long), r"shape \[3, 4\], got torch.int64 \[3, 5\]"),
        (torch.zeros(3, 4), r"integers of shape \[3, 4\], got torch.float32"),
    ],
)
def test_impossible_tokens_are_an_error(tree, out, tokenizer, answer, text):
    tokenizer.encode = lambda images: answer
    with pytest.raises(cache.TokenError, match=text) as caught:
        cache.build(tree, out, tokenizer, **SMALL)
    assert one_line(caught) and list((out / "shards").iterdir()) == []
    assert tokenizer.training  # restored although the build failed


def test_codebook_must_fit_16_bits(tree, out, fake):
    with pytest.raises(ValueError, match="codebook_size must be 1 to 65535"):
        cache.build(tree, out, fake.FakeTokenizer(fake.FakeConfig(codebook_size=65536)), **SMALL)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_half_precision_the_enabled_ops_count(dtype, fake, clean_switch):
    """Enabled ops round differently in half precision; in float32 codes are the reference's."""
    tokenizer = fake.FakeTokenizer().to(dtype)
    plain = describe(tokenizer, ["center"], 4)
    with vfmtok_fast.enable(["nearest_code", "sample_token"]):
        fast = describe(tokenizer, ["center"], 4)
    assert "fast_ops" not in plain
    if dtype == torch.float32:
        assert fast == plain
    else:
        assert fast == {**plain, "fast_ops": ["nearest_code"]}


def test_a_cache_in_half_precision_is_not_gone_on_with_otherwise(tree, out, fake, clean_switch):
    class HalfTokenizer(fake.FakeTokenizer):
        def encode(self, images):
            return super().encode(images.float())

    tokenizer = HalfTokenizer().half()
    cache.build(tree, out, tokenizer, batch_size=3, shard_size=4)
    with vfmtok_fast.enable("nearest_code"):
        with pytest.raises(cache.FingerprintMismatch, match=r"fast_ops \(there none, here nearest"):
            cache.build(tree, out, tokenizer, batch_size=3, shard_size=4)
        with pytest.raises(cache.FingerprintMismatch, match="fast_ops"):
            cache.verify(out, tokenizer)
    assert cache.verify(out, tokenizer).ok


def test_a_process_that_accepts_truncated_images(tree, out, tokenizer, monkeypatch):
    """They would be cached as whole ones."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for begin in (cache.build, cache.prepare):
        with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES must be False"):
            begin(tree, out, tokenizer, **SMALL)
        assert not out.exists()


def test_a_url_that_pathlib_has_had(tree, tokenizer, tmp_path, monkeypatch):
    """A URL given as a Path is refused: Path("s3://bucket/x") is the local folder s3:/bucket/x."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give a URL as a string"):
        cache.build(tree, Path("s3://bucket/tokens"), tokenizer, **SMALL)
    assert not (tmp_path / "s3:").exists()


def test_paths_from_home(tree, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.build(f"~/{tree.name}", "~/tokens", tokenizer, **SMALL)
    assert cache.status(tmp_path / "tokens").state == "complete" and len(
        cache.TokenCache("~/tokens")
    )


def test_a_cache_inside_of_pictures_from_home(tree, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    with pytest.raises(ValueError, match="is inside the pictures' folder"):
        cache.build(f"~/{tree.name}", f"~/{tree.name}/tokens", tokenizer, **SMALL)
    assert not (tree / "tokens").exists()
