"""Arguments that the generator refuses, and the folders it is saved to."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig

CONFIG = GPTConfig(
    num_layers=1, num_heads=2, dim=8, vocab_size=11, block_size=4, num_classes=3, ffn_multiple_of=8
)
CLASSES = torch.tensor([0, 2])
CODES = torch.zeros(2, 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(CONFIG).eval()


def refuses(error: type[Exception], message: str):
    return pytest.raises(error, match=f"^{message}[^\n]*$")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"class_ids": torch.tensor([0, -1])},
            ValueError,
            r"class_ids must be in \[0, 3\), got -1",
        ),
        (
            {"class_ids": torch.tensor([0, 3])},
            ValueError,
            r"class_ids must be in \[0, 3\), got 3",
        ),
        (
            {"class_ids": CLASSES[None]},
            ValueError,
            r"class_ids must have shape \[B\], got \(1, 2\)",
        ),
        ({"class_ids": torch.tensor(1)}, ValueError, r"class_ids must have shape \[B\], got \(\)"),
        (
            {"class_ids": CLASSES.float()},
            TypeError,
            "class_ids must hold integers, got torch.float32",
        ),
        ({"class_ids": "02"}, TypeError, "class_ids must be a torch.Tensor, got str"),
        ({"class_ids": [0.5]}, TypeError, "class_ids must hold integers, got torch.float32"),
        ({"class_ids": [0, 10**6]}, ValueError, r"class_ids must be in \[0, "),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": -0.5}, ValueError, r"top_p must be in \(0, 1\], got -0.5"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale must be finite, got nan"),
        ({"cfg_scale": "2"}, TypeError, "cfg_scale must be a number, got str"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"top_p": torch.tensor(0.5)}, TypeError, "top_p must be a number, got Tensor"),
        ({"cfg_scale": Fraction(3, 2)}, TypeError, "cfg_scale must be a number, got Fraction"),
        ({"greedy": "no"}, TypeError, "greedy must be True or False, got 'no'"),
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, "),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\), got 18446744073709551616"),
        (
            {"image_ids": torch.arange(3)},
            ValueError,
            r"image_ids must have shape \(2,\), got \(3,\)",
        ),
        ({"image_ids": torch.arange(2.0)}, TypeError, "image_ids must hold integers, got torch.fl"),
        ({"image_ids": [0, 1]}, TypeError, "image_ids must be a torch.Tensor, got list"),
        ({"cfg_interval": -2}, ValueError, r"cfg_interval must be in \[-1, 2\^31\), got -2"),
        ({"cfg_interval": 1.0}, TypeError, "cfg_interval must be an int, got float"),
        (
            {"kv_dtype": torch.float16},
            ValueError,
            "kv_dtype must be None, torch.float32 or torch.int8, got torch.float16",
        ),
        (
            {"kv_dtype": "int8"},
            ValueError,
            "kv_dtype must be None, torch.float32 or torch.int8, got int8",
        ),
    ],
)
def test_generate_refuses(model, settings, error, message):
    """`stream` refuses at once, before its first batch is requested."""
    for generate in (model.generate, model.stream):
        with refuses(error, f"generate: {message}"):
            generate(**({"class_ids": CLASSES} | settings))


@pytest.mark.parametrize("fast", [False, True])
def test_generation_is_refused_under_autocast(model, fast):
    """It would run, but codes would depend on the batch size."""
    with vfmtok_fast.enable() if fast else contextlib.nullcontext():
        with (
            torch.autocast("cpu", torch.bfloat16),
            refuses(TypeError, "decode_step: must not run under autocast"),
        ):
            model.generate(CLASSES)
        assert model.generate(CLASSES).shape == (2, 4)


@pytest.mark.parametrize(
    ("codes", "classes", "error", "message"),
    [
        (CODES[:, :3], CLASSES, ValueError, r"codes must have shape \[B, 4\], got \(2, 3\)"),
        (CODES[0], CLASSES, ValueError, r"codes must have shape \[B, 4\], got \(4,\)"),
        (CODES.float(), CLASSES, TypeError, "codes must hold integers, got torch.float32"),
        (CODES + 11, CLASSES, ValueError, r"codes must be in \[0, 11\), got 11"),
        (CODES - 1, CLASSES, ValueError, r"codes must be in \[0, 11\), got -1"),
        (CODES.tolist(), CLASSES, TypeError, "codes must be a torch.Tensor, got list"),
        (
            CODES,
            CLASSES[:1],
            ValueError,
            "codes and class_ids must have one batch size, got 2 and 1",
        ),
        (CODES, CLASSES + 1, ValueError, r"class_ids must be in \[0, 3\), got 3"),
    ],
)
def test_teacher_forcing_refuses(model, codes, classes, error, message):
    with refuses(error, f"GPT: {message}"):
        model(codes, classes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers must be .*at least 1, got 0"),
        ({"dim": 10, "num_heads": 3}, "dim / num_heads must be a multiple of 4"),
        ({"dim": 12, "num_heads": 2}, "dim / num_heads must be a multiple of 4"),
        ({"block_size": 15}, "block_size must be a square number, got 15"),
    ],
)
def test_config_refuses(fields, message):
    with refuses(ValueError, f"GPTConfig: {message}"):
        GPTConfig(**fields)


def test_unknown_presets_and_fields_are_named():
    with refuses(ValueError, "GPTConfig: unknown preset 'GPT-M'; presets are .*'GPT-L'"):
        GPT("GPT-M")
    with refuses(ValueError, "GPTConfig: unknown field depth"):
        GPT({"depth": 3})


@pytest.mark.parametrize(
    "config", [CONFIG, {"num_layers": 1, "dim": 48, "block_size": 4}], ids=["", "dict"]
)
def test_save_and_load(tmp_path, config):
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    codes = model.generate(torch.tensor([1, 2]), seed=3)
    assert torch.equal(loaded.generate(torch.tensor([1, 2]), seed=3), codes)


def test_load_is_strict(tmp_path, model):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["norm.weight"], tensors["blocks.0.attention.qkv.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with refuses(ValueError, "GPT: .*missing blocks.0.attention.qkv.weight, norm.weight"):
        GPT.from_pretrained(tmp_path)


def test_a_setting_that_does_not_exist(model: GPT):
    for name, call in (("stream", model.stream), ("decoder", model.decoder(2).generate)):
        with refuses(
            TypeError, f"{name}: unknown setting cfg; there are cfg_scale, cfg_interval, .*seed"
        ):
            call([1], cfg=2.0)
