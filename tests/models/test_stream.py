"""Many images: batches fit into memory, are no larger than useful, and come as they finish."""

from __future__ import annotations

import pytest
import torch
from generators import CLASSES, CONFIG, make

import vfmtok_fast
from vfmtok_fast import GPT
from vfmtok_fast.decoding import KVCache
from vfmtok_fast.generator import Decoder, memory


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


def test_a_stream_keeps_its_own_ids(model):
    ids, noise = torch.arange(4), torch.arange(4)
    want = model.generate(ids.clone(), image_ids=noise.clone())
    stream = model.stream(ids, image_ids=noise, batch_size=2)
    first = next(stream)[1]
    ids.fill_(0)
    noise.fill_(7)
    assert torch.equal(torch.cat([first, *(codes for _, codes in stream)]), want)


def test_batches_are_handed_out_as_they_finish(model):
    want = model.generate(CLASSES[:7], seed=1, cfg_scale=2.0)
    told = []
    batches = model.stream(
        CLASSES[:7], batch_size=3, seed=1, cfg_scale=2.0, progress=lambda *done: told.append(done)
    )
    assert not told
    images, codes = next(batches)
    assert images == slice(0, 3) and torch.equal(codes, want[:3])
    assert told[-1] == (3 * 16, 7 * 16) and len(told) == 16
    rest = list(batches)
    assert [images for images, _ in rest] == [slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([codes for _, codes in rest]), want[3:])
    assert told[-1] == (7 * 16, 7 * 16) and told == sorted(told)


def test_a_batch_that_does_not_fit_is_split_evenly(model, monkeypatch):
    each = memory.bytes_per_image(model, True)
    assert each == 2 * memory.bytes_per_image(model, False)
    want = model.generate(CLASSES[:7], cfg_scale=2.0)
    batches = list(model.stream(CLASSES[:7], cfg_scale=2.0, memory=3 * each + each // 2))
    assert [images for images, _ in batches] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([codes for _, codes in batches]), want)
    room = 4 * each / memory.SHARE + 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: room - model.kept.nbytes)
    assert [i for i, _ in model.stream(CLASSES[:7], cfg_scale=2.0)] == [slice(0, 4), slice(4, 7)]
    with pytest.raises(MemoryError, match=r"^generate: 6 images at a time .*; at most 4 fit$"):
        model.stream(CLASSES[:7], batch_size=6, cfg_scale=2.0)
    with pytest.raises(MemoryError, match="^generate: 1 images at a time .*; free some memory"):
        model.stream(CLASSES[:7], memory=10)


def test_a_batch_is_no_larger_than_gains_something(model, monkeypatch):
    monkeypatch.setitem(memory.ENOUGH, "cpu", 3)
    want = model.generate(CLASSES[:7])
    assert [images for images, _ in model.stream(CLASSES[:7])] == [
        slice(0, 3),
        slice(3, 6),
        slice(6, 7),
    ]
    assert torch.equal(torch.cat([codes for _, codes in model.stream(CLASSES[:7])]), want)
    # An explicit batch size is used as given. A device type that was not measured has no such
    # limit.
    assert [i for i, _ in model.stream(CLASSES[:7], batch_size=6)] == [slice(0, 6), slice(6, 7)]
    monkeypatch.delitem(memory.ENOUGH, "cpu")
    assert [images for images, _ in model.stream(CLASSES[:7])] == [slice(0, 7)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nA long text"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["gpu", "cpu"],
)
@pytest.mark.parametrize("where", ["_run", "cache"])
def test_out_of_memory_says_what_to_take_instead(where, error, monkeypatch):
    def full(*args, **kwargs):
        raise error

    model = make()
    if where == "_run":
        monkeypatch.setattr(Decoder, "_run", full)
    else:
        monkeypatch.setattr(KVCache, "empty", full)
    for count, advice in ((8, r"stream\(batch_size=4\)"), (1, "a single image")):
        with (
            vfmtok_fast.enable(),
            pytest.raises(MemoryError, match=f"^generate: out of memory with .*{advice}") as caught,
        ):
            model.generate(CLASSES[:count])
        assert "\n" not in str(caught.value)


def test_what_is_kept_counts_as_free(monkeypatch):
    """Otherwise the second of two equal calls would find less memory than the first."""
    model = make()
    each = memory.bytes_per_image(model, False)
    list(model.stream(CLASSES[:8]))
    kept = model.kept.nbytes
    assert kept == 8 * (each - 4 * memory.LOGIT_COPIES * CONFIG.vocab_size)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * each / memory.SHARE + 1 - kept)
    assert [images for images, _ in model.stream(CLASSES[:8])] == [slice(0, 8)]


def test_free_memory_is_a_number_of_this_machine():
    assert 2**20 < memory.free_bytes(torch.device("cpu"))
    assert memory.free_bytes(torch.device("meta")) == 2**62


@pytest.mark.parametrize("name", ["batch_size", "memory"])
@pytest.mark.parametrize(("size", "error"), [(-1, ValueError), (True, TypeError), (2.0, TypeError)])
def test_stream_refuses(model, name, size, error):
    with pytest.raises(error, match=f"^stream: {name} must be"):
        model.stream(CLASSES, **{name: size})
    with pytest.raises(ValueError, match="^stream: batch_size must be"):
        model.stream(CLASSES, batch_size=0)


def test_stream_checks_before_the_first_batch(model):
    with pytest.raises(ValueError, match="top_p"):
        model.stream(CLASSES, top_p=2.0)
