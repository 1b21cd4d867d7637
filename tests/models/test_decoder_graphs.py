"""Steps of the decoder as CUDA graphs: what is captured, and when it is captured anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from generators import CLASSES, CONFIG, SETTINGS, make, make_rar
from torch import nn

import vfmtok_fast
from vfmtok_fast import GPT, graphs
from vfmtok_fast.generator import Decoder, Sampling
from vfmtok_fast.generator import decoder as decoding_loop
from vfmtok_fast.generator.decoder import STEP_OPS


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


class Graph:
    """A stand-in for a CUDA graph: calls made during capture run at replay."""

    made = 0

    def __init__(self):
        Graph.made += 1
        self.steps: list[Callable[[], None]] = []

    def replay(self) -> None:
        for step in self.steps:
            step()


@pytest.fixture
def replaying(monkeypatch) -> Callable[[Decoder], Decoder]:
    """``replaying(decoder)`` makes a decoder take the GPU code path on the CPU."""
    recording: list[Graph] = []

    @contextlib.contextmanager
    def record(graph: Graph, **options):
        recording.append(graph)
        yield
        recording.pop()

    def stream(*args) -> SimpleNamespace:
        return SimpleNamespace(device_index=0, wait_stream=lambda other: None)

    Graph.made = 0
    monkeypatch.setattr(graphs, "_sides", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    for name in ("synchronize", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda which: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def take(decoder: Decoder) -> Decoder:
        advance = decoder._advance

        def advanced(*step) -> None:
            *same, at = step
            if recording:
                recording[-1].steps.append(lambda: advance(*step))
            elif isinstance(at, int):
                decoder._replay(*same)
            else:
                advance(*step)

        decoder._advance = advanced
        return decoder

    return take


@pytest.mark.parametrize("span", [1, 5, 99], ids="{} places at a time".format)
def test_a_rar_captures_its_start_too(span, replaying, monkeypatch):
    """Beside a GPT's graphs there is one of the place that predicts no code."""
    model = make_rar()
    settings = {"seed": 2, "cfg_scale": 2.0, "cfg_power": 1.5, "cfg_interval": 4}
    want = model.generate(CLASSES[:3] % 5, **settings)
    each = model.condition_size * 6 * model.config.dim * 4
    monkeypatch.setattr(decoding_loop, "CONDITION_BYTES", span * each)
    decoder = replaying(model.decoder(3, guided=True))
    assert len(decoder.conditions) == min(span, 17)
    for _ in range(2):
        assert torch.equal(decoder.generate(CLASSES[:3] % 5, **settings), want)
        assert Graph.made == len(decoder.graphs) == 4


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_graphs_make_the_same_codes_and_are_captured_once(model, settings, replaying):
    decoder = replaying(model.decoder(3, guided=True))
    # One for the first step; with an interval, one for the guided steps and one for the rest.
    kinds = 1 + len({Sampling(**settings).guided(step) for step in range(1, CONFIG.block_size)})
    for B in (3, 2, 3):
        want = model.generate(CLASSES[:B], **settings)
        assert torch.equal(decoder.generate(CLASSES[:B], **settings), want), B
        assert Graph.made == len(decoder.graphs) == kinds
    # The same graphs serve other images, classes and seeds.
    ids, classes = torch.tensor([7, 2**40]), CLASSES[4:6]
    for seed in (settings.get("seed", 0), 2**32, 2**64 - 1):
        other = {**settings, "seed": seed}
        want = model.generate(classes, image_ids=ids, **other)
        assert torch.equal(decoder.generate(classes, image_ids=ids, **other), want)
    assert Graph.made == kinds


def test_weights_that_are_computed_are_read_anew(replaying):
    """A parametrization computes a weight at each call; its parameters keep their addresses."""
    model, fresh = make(), make()
    layer = torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attention.qkv)
    decoder = replaying(model.decoder(2))
    decoder.generate(CLASSES[:2], seed=1)
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(2 * torch.rand_like(layer.weight))
    fresh.blocks[0].attention.qkv.weight = nn.Parameter(layer.weight.detach().clone())
    want = fresh.generate(CLASSES[:2], seed=1)
    for _ in range(2):
        assert torch.equal(decoder.generate(CLASSES[:2], seed=1), want)


def test_graphs_follow_what_is_baked_into_them(replaying):
    model = make()
    decoder = replaying(model.decoder(2, guided=True))

    def captures(**settings) -> int:
        before = Graph.made
        got = decoder.generate(CLASSES[:2], **settings)
        assert torch.equal(got, model.generate(CLASSES[:2], **settings))
        assert len(decoder.graphs) <= 3
        return Graph.made - before

    guided = {"seed": 1, "cfg_scale": 2.0, "cfg_interval": 4}
    assert captures(**guided) == 3 and captures(**guided) == 0
    assert captures(**{**guided, "seed": 2}) == 0
    assert captures(**{**guided, "temperature": 0.9}) == 3  # Settings of a draw are baked in,
    assert captures(seed=2) == 2 and captures(seed=3) == 0
    with vfmtok_fast.enable(STEP_OPS):  # and the dispatch policy,
        assert captures(seed=2) == 2 and captures(seed=2) == 0
        vfmtok_fast.switch.new_generation()  # and kernel settings,
        assert captures(seed=2) == 2 and captures(seed=2) == 0
    assert captures(seed=2) == 2
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before  # settings of torch that choose kernels
    try:
        assert captures(seed=2) == 2 and captures(seed=2) == 0
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert captures(seed=2) == 2
    with torch.no_grad():
        model.head.weight.mul_(-1)  # but not the values of weights,
    assert captures(seed=2) == 0
    model.head.weight = nn.Parameter(model.head.weight.detach().flip(0).clone())  # only addresses.
    assert captures(seed=2) == 2
    # After an error no incomplete graph is left.
    with pytest.raises(KeyError):
        decoder.generate(CLASSES[:2], seed=2, progress=lambda done, total: {}[done])
    assert captures(seed=2) == 0
    decoder.end()
    assert not decoder.graphs and captures(seed=2) == 2
