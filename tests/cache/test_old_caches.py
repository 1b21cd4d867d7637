"""A cache of commit f734c78, from before the cache was rebuilt, can be read and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vfmtok_fast import cache

OLD = Path(__file__).parents[1] / "data" / "old_cache"
SETTINGS = {"views": ("center", "center-flip"), "batch_size": 3, "shard_size": 4, "workers": 1}


@pytest.fixture
def old(tmp_path):
    """A copy of the old cache, because a run may write into it."""
    return shutil.copytree(OLD, tmp_path / "old")


def test_it_is_sound_and_complete(old, tokenizer):
    assert cache.status(old / "tokens").state == "complete"
    report = cache.verify(old / "tokens", tokenizer, old / "pictures")
    assert report.ok and report.agreement == 1.0 and (report.images, report.bad) == (7, 1)
    tokens, label = cache.TokenCache(old / "tokens", "center-flip")[2]
    assert tokens.shape == (4,) and label == 1
    assert [f["path"] for f in cache.failures(old / "tokens")] == ["class0/003.png"]


def test_a_new_one_has_the_same_bytes(old, tokenizer, fake, tmp_path):
    cache.build(old / "pictures", tmp_path / "new", tokenizer, **SETTINGS)
    assert fake.read_tree(tmp_path / "new") == fake.read_tree(old / "tokens")


def test_a_run_goes_on_with_it(old, tokenizer, fake):
    before = fake.read_tree(old / "tokens")
    assert cache.build(old / "pictures", old / "tokens", tokenizer, **SETTINGS).encoded == 0
    (old / "tokens" / "shards" / "tokens-00001.safetensors").unlink()
    assert cache.build(old / "pictures", old / "tokens", tokenizer, **SETTINGS).encoded == 3
    assert fake.read_tree(old / "tokens") == before


def test_it_can_be_added_to(old, tokenizer, fake):
    fake.write_picture(old / "pictures" / "class1" / "009.png", 9)
    shown = np.array(cache.read_tokens(old / "tokens")[0])
    summary = cache.build(old / "pictures", old / "tokens", tokenizer, extend=True, **SETTINGS)
    assert summary.images == 8 and cache.verify(old / "tokens").ok
    assert np.array_equal(cache.read_tokens(old / "tokens")[0][:6], shown)
