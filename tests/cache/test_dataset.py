"""TokenCacheDataset: which view is shown at which epoch, and that worker processes agree."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from vfmtok_fast import cache

VIEWS = ("center", "center-flip", "random-0..1")
SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2, "views": VIEWS}


@pytest.fixture
def built(tmp_path, out, tokenizer, fake):
    cache.build(fake.make_tree(tmp_path / "p", count=20, bad=(1, 10)), out, tokenizer, **SMALL)
    return out


def test_all_and_each(built):
    every = cache.TokenCache(built)
    both = cache.TokenCacheDataset(built, ["random-1", "center"], per_picture="all")
    each = cache.TokenCacheDataset(built, ["random-1", "center"], per_picture="each")
    assert len(both) == 18 and len(each) == 36 and each.views == ["random-1", "center"]
    for picture in range(18):
        tokens, label = every[picture]
        assert torch.equal(both[picture][0], tokens[[3, 0]]) and both[picture][1] == label
        for place, view in enumerate((3, 0)):
            row, number = each[2 * picture + place]
            assert torch.equal(row, tokens[view]) and number == label
    assert torch.equal(each[-1][0], each[35][0])
    assert len(cache.TokenCacheDataset(built, ["random-0..1"], per_picture="all")[0][0]) == 2


def test_one_view_an_epoch(built):
    every, data = cache.TokenCache(built), cache.TokenCacheDataset(built, seed=np.int64(3))
    shown = []
    for epoch in range(200):
        data.set_epoch(epoch)
        shown.append([data.view_of(picture) for picture in range(18)])
        tokens, _ = data[epoch % 18]
        assert torch.equal(tokens, every[epoch % 18][0][shown[-1][epoch % 18]])
    counts = np.bincount(np.ravel(shown), minlength=4)
    expected = 18 * 200 / 4
    assert ((counts - expected) ** 2 / expected).sum() < 25  # chi-square, df = 3: p = 1e-5
    pairs = np.bincount(np.ravel(shown[:-1]) * 4 + np.ravel(shown[1:]), minlength=16)
    expected = 18 * 199 / 16
    assert ((pairs - expected) ** 2 / expected).sum() < 50  # df = 15: p = 1e-5
    again = cache.TokenCacheDataset(built, seed=3)
    again.set_epoch(7)
    assert [again.view_of(picture) for picture in range(18)] == shown[7]
    other = cache.TokenCacheDataset(built, seed=4)
    other.set_epoch(7)
    assert [other.view_of(picture) for picture in range(18)] != shown[7]


def test_worker_processes_see_the_epoch_also_when_they_live_on(built):
    data = cache.TokenCacheDataset(built)
    loader = DataLoader(data, batch_size=5, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        tokens = torch.cat([tokens for tokens, _ in loader])
        assert torch.equal(tokens, torch.stack([data[i][0] for i in range(18)]))
        seen.append(tokens)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    data[0]  # opens a file, which must not be pickled
    again = pickle.loads(pickle.dumps(data))
    assert again.epoch == 2 and torch.equal(again[4][0], data[4][0])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))]
)
def test_a_copy_has_an_epoch_of_its_own(built, copied):
    original = cache.TokenCacheDataset(built)
    original.set_epoch(3)
    data = copied(original)
    assert data.epoch == 3 and data._epoch.is_shared()
    data.set_epoch(4)
    assert (original.epoch, data.epoch) == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copys_workers_see_its_epoch(built, copied, start):
    """Workers follow the epoch of a copy, which a framework may make before it makes a loader."""
    original = cache.TokenCacheDataset(built)
    original.set_epoch(3)
    data = copied(original)
    loader = DataLoader(
        data, batch_size=18, num_workers=1, persistent_workers=True, multiprocessing_context=start
    )
    for epoch in (3, 4, 5):
        data.set_epoch(epoch)
        ((tokens, _),) = loader
        assert torch.equal(tokens, torch.stack([data[i][0] for i in range(18)]))
    assert (original.epoch, data.epoch) == (3, 5)


def test_ranks_of_ddp_share_the_pictures_and_agree_on_their_views(built):
    """As under DistributedDataParallel: a sampler and workers per rank, and one epoch for all."""
    for epoch in (0, 1):
        shown = {}
        for rank in range(3):
            data = cache.TokenCacheDataset(built, seed=5)
            sampler = DistributedSampler(data, num_replicas=3, rank=rank, shuffle=True, seed=1)
            data.set_epoch(epoch)
            sampler.set_epoch(epoch)
            loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=rank)
            tokens = torch.cat([tokens for tokens, _ in loader])
            assert len(tokens) == 6
            shown |= dict(zip(sampler, tokens, strict=True))
        alone = cache.TokenCacheDataset(built, seed=5)
        alone.set_epoch(epoch)
        assert sorted(shown) == list(range(18))
        assert all(torch.equal(shown[picture], alone[picture][0]) for picture in range(18))


def test_what_will_not_do(built, tree, tokenizer):
    with pytest.raises(ValueError, match="has the views center, .*, not 'random-2'"):
        cache.TokenCacheDataset(built, ["random-2"])
    with pytest.raises(ValueError, match="per_picture must be one of one, each, all, got two"):
        cache.TokenCacheDataset(built, per_picture="two")
    for position in (18, -19):
        with pytest.raises(IndexError, match="has 18 items"):
            cache.TokenCacheDataset(built)[position]
    (built / "COMPLETE.json").unlink()
    with pytest.raises(ValueError, match="not complete"):
        cache.TokenCacheDataset(built)
    assert len(cache.TokenCacheDataset(built, partial=True)) == 18
