"""Generation with every op of a step in Triton: on a GPU as graphs, else in the interpreter."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from where_kernels_run import DEVICE, GPU, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, switch
from vfmtok_fast.generator.decoder import STEP_OPS

pytest.importorskip("triton")
from vfmtok_fast.kernels import decode_step, launch

CLASSES = torch.arange(64) % 10
# Sizes for the interpreter.
SMALL = {"block_size": 9, "num_layers": 1, "dim": 32, "num_heads": 2, "vocab_size": 96}
SETTINGS = (
    {"seed": 1},
    {"seed": 2, "cfg_scale": 2.0, "cfg_interval": 4, "top_k": 40},
    {"seed": 2**63 + 5, "cfg_scale": 1.5, "top_p": 0.9, "temperature": 0.8},
    {"greedy": True, "cfg_scale": 3.0},
)


test_in_the_interpreter = in_the_interpreter(__file__)


def make(**changes: int) -> GPT:
    torch.manual_seed(0)
    shape = {
        "num_layers": 2, "num_heads": 4, "dim": 64, "vocab_size": 512, "block_size": 16,
        "num_classes": 10, "ffn_multiple_of": 32,
    }  # fmt: skip
    model = GPT(GPTConfig(**(shape | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(autouse=True)
def large_programs():
    """Use few large programs in the interpreter, which runs them one after another."""
    with contextlib.ExitStack() as stack:
        for space in decode_step.SPACES if not GPU else ():
            if "tile" in space.choices and "slices" not in space.choices:
                stack.enter_context(
                    space.using(space.setting({"tile": 8, "warps": 4, "chunk": 1024, "early": 0}))
                )
        yield


@pytest.fixture(scope="module")
def model() -> GPT:
    return make() if GPU else make(**SMALL)


def fast(model: GPT, classes: torch.Tensor, **settings) -> torch.Tensor:
    """Return codes computed on ``DEVICE`` by Triton kernels and nothing else."""
    switch.record.clear()
    model.to(DEVICE)
    try:
        with vfmtok_fast.enable(STEP_OPS, strict=True):
            codes = model.generate(classes.to(DEVICE), **settings).cpu()
    finally:
        model.cpu()
    status = vfmtok_fast.status()
    for op in STEP_OPS:
        assert set(status.ops[op].calls) == {"triton"}, op
    return codes


@runs
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_the_references(model, settings):
    """In float32; a tie within rounding would need a closer look."""
    for B in (1, 3, 34) if GPU else (2,):
        want = model.generate(CLASSES[:B], **settings)
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), B


@runs
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_codes_of_an_int8_cache_are_the_references(model, settings):
    """A value at a tie that rounds the other way would need a closer look."""
    settings = {**settings, "kv_dtype": torch.int8}
    for B in (1, 3, 34) if GPU else (2,):
        want = model.generate(CLASSES[:B], **settings)
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), B


@pytest.mark.gpu
def test_a_decoder_of_ones_own_replays(model):
    model.to("cuda")
    try:
        with vfmtok_fast.enable(STEP_OPS, strict=True):
            decoder = model.decoder(4, guided=True)
            for B, settings in ((4, SETTINGS[0]), (3, SETTINGS[1]), (4, SETTINGS[1])):
                want = model.generate(CLASSES[:B].cuda(), **settings)
                assert torch.equal(decoder.generate(CLASSES[:B].cuda(), **settings), want)
            assert decoder.graphs
            with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(ValueError, match="stream"):
                decoder.generate(CLASSES[:4].cuda())
    finally:
        model.cpu()


@pytest.mark.gpu
def test_a_replay_is_no_repeat(model):
    """One graph gives new codes for other seeds, images and classes, and the same for the same."""
    first = fast(model, CLASSES[:4], seed=1, cfg_scale=2.0)
    assert torch.equal(fast(model, CLASSES[:4], seed=1, cfg_scale=2.0), first)
    for other in (
        fast(model, CLASSES[:4], seed=2, cfg_scale=2.0),
        fast(model, CLASSES[:4], seed=1, cfg_scale=2.0, image_ids=torch.arange(4) + 4),
        fast(model, CLASSES[4:8], seed=1, cfg_scale=2.0),
    ):
        assert (other != first).any(dim=1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_an_image_is_the_same_in_batches_of_1_3_and_64(model, settings):
    together = fast(model, CLASSES, **settings)
    for rows in (slice(0, 1), slice(5, 6), slice(20, 23)):
        ids = torch.arange(64)[rows]
        assert torch.equal(fast(model, CLASSES[rows], image_ids=ids, **settings), together[rows])


@pytest.mark.gpu
def test_calls_on_two_streams_share_nothing(model):
    """The second call starts on the host while the first is still running on the device."""
    model.to("cuda")
    classes = CLASSES[:4].cuda()
    try:
        with vfmtok_fast.enable(STEP_OPS, strict=True):
            want = [model.generate(classes, seed=seed) for seed in range(6)]
            torch.cuda.synchronize()
            streams = [torch.cuda.Stream() for _ in range(2)]
            got = []
            for seed in range(6):
                with torch.cuda.stream(streams[seed % 2]):
                    torch.cuda._sleep(20_000_000)
                    got.append(model.generate(classes, seed=seed))
            torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))
    finally:
        model.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one(model):
    want = fast(model, CLASSES[:4], seed=1, cfg_scale=2.0)
    model.to("cuda:1")
    try:
        with vfmtok_fast.enable(STEP_OPS, strict=True):
            got = model.generate(CLASSES[:4].to("cuda:1"), seed=1, cfg_scale=2.0)
        assert torch.equal(got.cpu(), want) and got.device == torch.device("cuda:1")
    finally:
        model.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 4, 16])
def test_kernels_that_overlap_make_the_same_codes(dtype, B, monkeypatch):
    """A kernel that reads before the previous one has written would show here, by chance."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    model = make(num_layers=8, dim=512, num_heads=8, block_size=64).to(dtype)
    settings = {"seed": 3, "cfg_scale": 1.5, "top_k": 100}
    monkeypatch.setattr(launch, "OVERLAP", False)
    switch.new_generation()
    want = fast(model, CLASSES[:B], **settings)
    monkeypatch.setattr(launch, "OVERLAP", True)
    switch.new_generation()
    for _ in range(10):
        assert torch.equal(fast(model, CLASSES[:B], **settings), want)


@pytest.mark.gpu
def test_memory_does_not_grow(model):
    model.to("cuda")
    try:
        with vfmtok_fast.enable(STEP_OPS, strict=True):
            for _ in range(3):
                model.generate(CLASSES[:4].cuda(), cfg_scale=2.0, cfg_interval=3)
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            for _ in range(20):
                model.generate(CLASSES[:4].cuda(), cfg_scale=2.0, cfg_interval=3)
            assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    finally:
        model.cpu()
