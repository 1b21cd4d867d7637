"""`encode` and `decode` of few images as CUDA graphs: the same results, and never stale ones."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import vfmtok_fast
from vfmtok_fast import VFMTok, graphs, timing
from vfmtok_fast.graphs import Replayed, state_of
from vfmtok_fast.untrained import untrained_tokenizer


@pytest.fixture
def tok() -> VFMTok:
    return untrained_tokenizer("small").cuda()


def pictures(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 12, 12, generator=draw) * 2 - 1
    return nn.functional.interpolate(coarse, size=336, mode="bilinear").cuda()


def recorded(tok: VFMTok) -> int:
    return sum(len(replayed._recorded) for replayed in tok._graphs.values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_a_replay_gives_what_a_call_gives(tok, precision):
    tok.set_precision(precision)
    with vfmtok_fast.enable():
        for seed in range(4):
            images = pictures(3, seed)
            codes, decoded = tok.encode(images), tok.decode(tok.encode(images))
            graphs, tok._graphs = tok._graphs, {what: Replayed(what) for what in tok._graphs}
            assert torch.equal(codes, tok.encode(images))
            assert torch.equal(decoded, tok.decode(codes))
            tok._graphs = graphs
    assert recorded(tok) == 2


@pytest.mark.gpu
def test_weights_in_place_replaced_and_moved_count_at_once(tok):
    images = pictures(2)
    with vfmtok_fast.enable():
        for _ in range(3):
            codes = tok.encode(images)
        before = tok.decode(codes)
        for _ in range(2):
            tok.decode(codes)
        with torch.no_grad():
            for level in tok.pixel_decoder.levels:
                for parameter in level.parameters():
                    parameter.mul_(0.5)
        changed = tok.decode(codes)
        assert not torch.equal(before, changed)
        with vfmtok_fast.enable([]):
            want = tok.decode(codes)
        assert (changed - want).abs().max() < 1e-3 * want.abs().max()
        tok.quantizer.codebook = nn.Parameter(tok.quantizer.codebook.flip(0).clone())
        assert torch.equal(tok.encode(images), tok.config.codebook_size - 1 - codes)


@pytest.mark.gpu
def test_hooks_training_and_other_policies_are_no_replay(tok):
    images, seen = pictures(2), []
    with vfmtok_fast.enable():
        for _ in range(3):
            tok.encode(images)
        hook = tok.region_encoder.register_forward_hook(lambda *_: seen.append(1))
        tok.encode(images)
        hook.remove()
        assert seen == [1]
    with vfmtok_fast.enable([]):
        vfmtok_fast.switch.record.clear()
        tok.encode(images)
        assert set(vfmtok_fast.status().ops["nearest_code"].calls) == {"reference"}


@pytest.mark.gpu
def test_streams_threads_and_inference_mode(tok):
    want = dict.fromkeys(range(8))
    with vfmtok_fast.enable():
        for seed in want:
            want[seed] = tok.encode(pictures(2, seed)).cpu()
        with torch.inference_mode():
            assert torch.equal(tok.encode(pictures(2, 0)).cpu(), want[0])
        got = {}

        def run(seeds: list[int]) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for seed in seeds * 3:
                    got[seed] = tok.encode(pictures(2, seed)).cpu()

        threads = [threading.Thread(target=run, args=([i, i + 4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[seed], want[seed]) for seed in want)


@pytest.mark.gpu
def test_bad_pictures_are_told_whatever_runs_already(tok):
    """The check of values runs while the batch is being encoded."""
    images = pictures(2)
    bad = images.clone()
    bad[1, 2, 5, 5] = float("nan")
    with vfmtok_fast.enable():
        want = tok.encode(images)
        for _ in range(3):
            with pytest.raises(ValueError, match="got NaN"):
                tok.encode(bad)
            with pytest.raises(ValueError, match="got a magnitude of 255"):
                tok.encode(images * 0 + 255)
            assert torch.equal(tok.encode(images), want)


@pytest.mark.gpu
def test_memory_does_not_grow(tok):
    with vfmtok_fast.enable():
        for B in (1, 2, 3, 4, 1, 2):
            for _ in range(3):
                tok.encode(pictures(B))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for B in (1, 2, 3, 4, 1, 2) * 2:
            for _ in range(3):
                tok.encode(pictures(B))
        assert torch.cuda.memory_allocated() <= before
    assert recorded(tok) <= 2 * Replayed.MOST


def test_a_copy_has_recorded_nothing():
    tok = untrained_tokenizer("small")
    tok._graphs["encode"]._recorded["key"] = None
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert not other._graphs["encode"]._recorded


def test_the_state_tells_every_change():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.GELU())
    states = [state_of(model)]
    assert state_of(model) == states[0]
    with torch.no_grad():
        model[0].weight.mul_(2)
    states.append(state_of(model))
    model[0].bias = nn.Parameter(torch.zeros(2))
    states.append(state_of(model))
    model(torch.zeros(3, 2))  # changes the running statistics
    states.append(state_of(model))
    model.double()
    states.append(state_of(model))
    model[2] = nn.ReLU()
    states.append(state_of(model))
    assert len(set(states)) == len(states)
    hook = model[0].register_forward_pre_hook(lambda *_: None)
    assert state_of(model) is None
    hook.remove()
    assert state_of(model) == states[-1]
    model[0].forward = lambda x: x
    assert state_of(model) is None
    del model[0].forward
    assert state_of(model) == states[-1]


class NoStream:
    """A stream that does nothing, for a machine without a GPU."""

    device_index = 0

    def wait_stream(self, other: NoStream) -> None:
        assert isinstance(other, NoStream)


@pytest.fixture
def current(monkeypatch) -> list[NoStream]:
    """torch's streams and graphs replaced; one element, the current stream."""
    streams = [NoStream()]

    @contextlib.contextmanager
    def on(stream: NoStream):
        before, streams[0] = streams[0], stream
        yield
        streams[0] = before  # Like torch's graph, not after an error.

    def capturing(graph, pool=None, stream=None, **_):
        return on(stream or NoStream())

    monkeypatch.setattr(graphs, "_sides", {})
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    for name, stand_in in {
        "current_stream": lambda: streams[0], "Stream": NoStream, "stream": on,
        "set_stream": lambda stream: streams.__setitem__(0, stream), "CUDAGraph": object,
        "graph": capturing, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return streams


def test_all_captures_of_a_device_share_a_stream_of_their_own(current):
    here, seen = current[0], []
    for _ in range(2):
        graphs.capture(lambda: seen.append(current[0]))
    assert len(seen) == 4 and len(set(seen)) == 1 and here not in seen and current == [here]


def test_a_broken_capture_leaves_the_current_stream(current):
    here, calls = current[0], []

    def second_fails() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(second_fails)
    assert current == [here] and len(calls) == 2
    calls.pop()  # A timed call has been warmed up before.
    assert timing.capture(second_fails) is None and current == [here]


@pytest.mark.gpu
def test_a_broken_capture_leaves_the_current_stream_of_a_gpu():
    here = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: torch.ones(1, device="cuda").item())
    assert torch.cuda.current_stream() == here
    assert timing.capture(lambda: torch.ones(1, device="cuda").item()) is None
    assert torch.cuda.current_stream() == here
