"""Models that get their memory late: to_empty, the meta device, load_state_dict(assign=True)."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from vfmtok_fast import GPT, BackboneConfig, GPTConfig, VFMTok, VFMTokConfig

GENERATOR = GPTConfig(
    num_layers=1, num_heads=2, dim=32, vocab_size=64, block_size=16, num_classes=4
)
# Rotary positions, which timm keeps in buffers that no file holds.
ROTARY = BackboneConfig(timm_name="eva02_tiny_patch14_224")


@pytest.fixture(params=["VFMTok", "rotary", "GPT"])
def built(request, tiny: VFMTokConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    if request.param == "GPT":
        model = GPT(GENERATOR)
        torch.nn.init.normal_(model.head.weight)
        return model.eval()
    config = dataclasses.replace(tiny, image_size=64, grid=4)
    if request.param == "rotary":
        config = dataclasses.replace(config, backbone=ROTARY)
    model = VFMTok(config).eval()
    # Unlike at initialisation, where every region looks along the same star.
    for layer in model.region_encoder.layers:
        torch.nn.init.normal_(layer.cross_attention.offsets.weight, std=0.1)
        torch.nn.init.normal_(layer.cross_attention.weights.weight, std=0.1)
    return model


def answer(model: torch.nn.Module) -> torch.Tensor:
    """Return codes, which depend on every buffer."""
    model.eval()
    if isinstance(model, GPT):
        return model.generate(torch.arange(4), seed=1)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return model.encode(images.to(model.quantizer.codebook.dtype))


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


def constants(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    held = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in held}


def soil(model: torch.nn.Module) -> torch.nn.Module:
    """`to_empty` often returns zeroed or reused memory, but any values are possible."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def test_to_empty(built: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **to: torch.full_like(x, 77, **{"device": None} | to)
    )
    state, expected = copy.deepcopy(built.state_dict()), answer(built)
    before = {name: value.clone() for name, value in constants(built).items()}
    assert before
    emptied = soil(built.to_empty(device="cpu"))
    emptied.load_state_dict(state)
    after = constants(emptied)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(answer(emptied), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta(built: torch.nn.Module, assign: bool, request):
    state, expected = built.state_dict(), answer(built)
    empty = on_meta(built)
    assert all(parameter.is_meta for parameter in empty.parameters())
    if "rotary" in request.node.callspec.id:
        # This is timm's own buffer, computed when the model is built.
        with pytest.raises(ValueError, match="backbone.vit.* on the meta device") as error:
            if not assign:
                empty.to_empty(device="cpu")
            empty.load_state_dict(state, assign=assign)
        assert "\n" not in str(error.value)
        return
    if not assign:
        soil(empty.to_empty(device="cpu"))
    empty.load_state_dict(state, assign=assign)
    assert torch.equal(answer(empty), expected)
    frozen = {name: p.requires_grad for name, p in built.named_parameters()}
    assert {name: p.requires_grad for name, p in empty.named_parameters()} == frozen


def test_there_and_back_over_meta(built: torch.nn.Module):
    state, expected = copy.deepcopy(built.state_dict()), answer(built)
    moved = soil(built.to("meta").to_empty(device="cpu"))
    moved.load_state_dict(state)
    assert torch.equal(answer(moved), expected)
    moved = moved.to("meta")
    moved.load_state_dict(state, assign=True)
    assert torch.equal(answer(moved), expected)


def test_a_part_at_a_time(built: torch.nn.Module):
    """Weights may come in several files: no error before the last one."""
    built = built.to("meta")
    state = on_cpu = type(built)(built.config).state_dict()
    names = sorted(on_cpu)
    for part in (names[::2], names[1::2]):
        built.load_state_dict({name: state[name] for name in part}, strict=False, assign=True)
    answer(built)


def test_assigned_half_precision_is_a_cast(built: torch.nn.Module):
    """Two models whose weights and settings agree must not differ in what no file holds."""
    cast = copy.deepcopy(built).bfloat16()
    built.load_state_dict({k: v.bfloat16() for k, v in built.state_dict().items()}, assign=True)
    for name, value in constants(cast).items():
        other = built.get_buffer(name)
        assert other.dtype == value.dtype and torch.equal(other, value), name
    assert torch.equal(answer(built), answer(cast))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_back_loses_no_digits(built: torch.nn.Module, half: torch.dtype):
    """What no state dict holds could not be restored, and a float32 model would not be exact."""
    state, expected = copy.deepcopy(built.state_dict()), answer(built)
    before = {name: value.clone() for name, value in constants(built).items()}
    back = pickle.loads(pickle.dumps(copy.deepcopy(built.to(half)))).float()
    assert all(torch.equal(value, before[name]) for name, value in constants(back).items())
    back.load_state_dict(state)
    assert torch.equal(answer(back), expected)


def test_a_constant_that_somebody_changed_stays_so(built: torch.nn.Module):
    built.bfloat16()
    name, value = next(iter(constants(built).items()))
    value.add_(1)
    changed = value.clone()
    assert torch.equal(constants(built.float())[name], changed.float())


def test_moves_change_constants_as_before(built: torch.nn.Module):
    before = {name: value.clone() for name, value in constants(built).items()}
    wide = built.double()
    for name, value in constants(wide).items():
        assert torch.equal(value.double(), before[name].double())
    half = wide.bfloat16()
    for name, value in constants(half).items():
        assert torch.equal(value, before[name].to(value.dtype))
    answer(half)
    shared = type(built)(built.config).share_memory()
    assert all(value.is_shared() for value in shared.buffers())


def test_copies(built: torch.nn.Module):
    expected = answer(built)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        state = copy.deepcopy(twin.state_dict())
        soil(twin.to_empty(device="cpu")).load_state_dict(state)
        assert torch.equal(answer(twin), expected)
