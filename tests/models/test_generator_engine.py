"""The engine: equal codes, one set of buffers, no weights of its own, batches that fit."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig
from vfmtok_fast.generator import Sampling, engine, memory

CONFIG = GPTConfig(
    num_layers=2, num_heads=4, dim=64, vocab_size=512, block_size=16, num_classes=10,
    ffn_multiple_of=32,
)  # fmt: skip
CLASSES = torch.arange(64) % 10
SETTINGS = (
    {"seed": 1},
    {"seed": 2, "cfg_scale": 2.0},
    {"seed": 3, "cfg_scale": 1.5, "cfg_interval": 4, "top_k": 40},
    {"seed": 4, "cfg_scale": 0.0, "top_p": 0.9, "temperature": 0.8},
    {"greedy": True, "cfg_scale": 3.0, "cfg_interval": 0},
)


def make(config: GPTConfig = CONFIG, **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, **changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


def fast(model: GPT, classes: torch.Tensor, **settings) -> torch.Tensor:
    before = vfmtok_fast.status().paths.get("generate", {}).get("engine", 0)
    with vfmtok_fast.enable(engine.STEP_OPS, strict=True):
        codes = model.generate(classes, **settings)
    assert vfmtok_fast.status().paths["generate"]["engine"] > before
    return codes


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_the_references(model, settings):
    for B in (1, 2, 3, 7):
        want = model.generate(CLASSES[:B], **settings)
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), B
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), "the same seed repeats"
    assert vfmtok_fast.status().paths["generate"] == {"reference": 4, "engine": 8}
    assert "generate: 8 engine, 4 reference" in str(vfmtok_fast.status())


def test_the_engine_needs_every_op_of_a_step(model):
    for missing in engine.STEP_OPS:
        with vfmtok_fast.enable(engine.STEP_OPS - {missing}):
            model.generate(CLASSES[:1])
    assert vfmtok_fast.status().paths["generate"] == {"reference": len(engine.STEP_OPS)}
    with vfmtok_fast.enable():
        model.generate(CLASSES[:1], use_cache=False)
        assert "engine" not in vfmtok_fast.status().paths["generate"]
        model.generate(CLASSES[:1])
    assert vfmtok_fast.status().paths["generate"]["engine"] == 1


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_an_image_is_the_same_in_batches_of_1_3_and_64(model, settings):
    """Products round differently with the rows; a tie that this decides would show here."""
    together = fast(model, CLASSES, **settings)
    for rows in (slice(0, 1), slice(5, 6), slice(20, 23)):
        ids = torch.arange(64)[rows]
        assert torch.equal(fast(model, CLASSES[rows], image_ids=ids, **settings), together[rows])
    other = fast(model, CLASSES, **{**settings, "seed": 99})
    assert (other != together).any(dim=1).all()


def test_weights_that_change_count_at_once():
    model = make()
    base = fast(model, CLASSES[:2], seed=1)
    with torch.no_grad():
        model.blocks[0].ffn.up.weight.mul_(-1)  # in place
    changed = fast(model, CLASSES[:2], seed=1)
    assert not torch.equal(changed, base)
    assert torch.equal(changed, model.generate(CLASSES[:2], seed=1))
    model.head.weight = nn.Parameter(model.head.weight.detach().flip(0).clone())  # replaced
    replaced = fast(model, CLASSES[:2], seed=1)
    assert not torch.equal(replaced, changed)
    assert torch.equal(replaced, model.generate(CLASSES[:2], seed=1))
    model.double()  # moved
    assert torch.equal(fast(model, CLASSES[:2], seed=1), model.generate(CLASSES[:2], seed=1))


def live_bytes() -> int:
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        # Not what torch.compile left behind in this process, which has no memory.
        if type(x) in (torch.Tensor, nn.Parameter)
        and not torch._is_functional_tensor(x)
        and x.device.type == "cpu"
    }
    return sum(storages.values())


def test_buffers_are_kept_once_hold_no_weights_and_go_with_the_model():
    model = make()
    before = live_bytes()
    fast(model, CLASSES[:3], cfg_scale=2.0)
    kept = live_bytes() - before
    cache = 6 * 2 * CONFIG.num_layers * CONFIG.dim * CONFIG.block_size * 4
    # Besides keys and values only the codes, and the noise's workspace of the thread.
    assert cache <= kept <= cache + 8 * 3 * 20 + 6 * 8 * 3 * CONFIG.vocab_size
    for _ in range(20):
        fast(model, CLASSES[:3], cfg_scale=2.0)
        fast(model, CLASSES[:3], cfg_scale=2.0, cfg_interval=2, seed=3)
    assert live_bytes() - before == kept
    fast(model, CLASSES[:1], cfg_scale=2.0)  # Other buffers take the place of the first.
    assert live_bytes() - before < kept
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_results_are_not_overwritten_by_the_next_call(model):
    first = fast(model, CLASSES[:2], seed=1)
    copy = first.clone()
    fast(model, CLASSES[:2], seed=2)
    assert torch.equal(first, copy)


def test_a_call_within_a_call_and_after_one_that_was_stopped(model):
    want = model.generate(CLASSES[:2], seed=1)
    inner = []

    def nest(done: int, total: int) -> None:
        if done == 6:
            inner.append(fast(model, CLASSES[:2], seed=1))

    assert torch.equal(fast(model, CLASSES[:2], seed=1, progress=nest), want)
    assert torch.equal(inner[0], want)

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(model, CLASSES[:2], seed=5, progress=stop)
    assert torch.equal(fast(model, CLASSES[:2], seed=1), want)


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_reads_nothing_on_the_host(guided):
    """Fake tensors have no values: `.item()` or a branch on one would raise, as below."""
    sampling = Sampling(cfg_scale=1.5 if guided else 1.0, top_k=5, top_p=0.9, seed=7)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        model = make()
        made = engine.Engine(model, 3, guided, ())
        made.advance(model, made.cache, sampling, guided, made.at)
        assert made.codes.shape == (3, CONFIG.block_size)
        with pytest.raises(DataDependentOutputException):
            made.at[0].item()


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_steps_with_positions_on_the_device_make_the_same_codes(model, settings):
    """What a graph replays: the engine's step with a tensor for the position, here eagerly."""
    sampling = Sampling(**settings)
    want = model.generate(CLASSES[:2], **settings)
    with torch.no_grad():
        made = engine.Engine(model, 2, sampling.guided(0), ())
        made._replay = lambda *args: made.advance(*args, made.at)

        class OnCuda(torch.Tensor):
            is_cuda = True

        got = made.run(
            model, CLASSES[:2].as_subclass(OnCuda), torch.arange(2), sampling, lambda step: None
        )
    assert torch.equal(got.as_subclass(torch.Tensor), want)
    assert made.at.tolist() == [CONFIG.block_size, CONFIG.block_size + 1]


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
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * each / memory.SHARE + 1)
    assert [i for i, _ in model.stream(CLASSES[:7], cfg_scale=2.0)] == [slice(0, 4), slice(4, 7)]
    with pytest.raises(MemoryError, match=r"^generate: 6 images at a time .*; at most 4 fit$"):
        model.stream(CLASSES[:7], batch_size=6, cfg_scale=2.0)
    with pytest.raises(MemoryError, match="^generate: 1 images at a time .*; free some memory"):
        model.stream(CLASSES[:7], memory=10)


def test_out_of_memory_says_what_to_take_instead(model, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nA long text")

    monkeypatch.setattr(engine, "run", full)
    for count, advice in ((8, r"GPT.stream\(batch_size=4\)"), (1, "a single image")):
        with (
            vfmtok_fast.enable(),
            pytest.raises(MemoryError, match=f"^generate: out of memory with .*{advice}") as caught,
        ):
            model.generate(CLASSES[:count])
        assert "\n" not in str(caught.value)


def test_free_memory_is_a_number_of_this_machine():
    assert 2**20 < memory.free_bytes(torch.device("cpu"))
    assert memory.free_bytes(torch.device("meta")) == 2**62


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (True, TypeError), (2.0, TypeError)])
def test_stream_refuses(model, size, error):
    with pytest.raises(error, match="^stream: batch_size must be"):
        model.stream(CLASSES, batch_size=size)


def test_stream_checks_before_the_first_batch(model):
    with pytest.raises(ValueError, match="top_p"):
        model.stream(CLASSES, top_p=2.0)
