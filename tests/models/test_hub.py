"""save_pretrained and from_pretrained: a round trip, and a one-line error for everything else."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vfmtok_fast import GPT, BackboneConfig, GPTConfig, VFMTok, VFMTokConfig, temporary
from vfmtok_fast.checkpoint import official_gpt
from vfmtok_fast.hub import unfilled

GENERATOR = GPTConfig(
    num_layers=1, num_heads=2, dim=32, vocab_size=64, block_size=16, num_classes=4
)


@pytest.fixture
def config(tiny: VFMTokConfig) -> VFMTokConfig:
    """Every part differs from the defaults, or a file that is not read would go unnoticed."""
    backbone = dataclasses.replace(tiny.backbone, num_registers=1)
    return dataclasses.replace(tiny, codebook_dim=8, backbone=backbone)


@pytest.fixture
def folder(tmp_path: Path, config: VFMTokConfig) -> Path:
    torch.manual_seed(0)
    VFMTok(config).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Same as HF_HUB_OFFLINE=1, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))


def refused(kind: type, source: str | Path, model: type = VFMTok, **options) -> str:
    with pytest.raises(kind) as error:
        model.from_pretrained(source, **options)
    message = str(error.value)
    assert message.startswith(model.__name__) and "\n" not in message, message
    return message


def test_round_trip_of_the_tokenizer(tmp_path: Path, config: VFMTokConfig):
    torch.manual_seed(1)
    model = VFMTok(config)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = VFMTok.from_pretrained(tmp_path)
    assert loaded.config == config and isinstance(loaded.config.backbone, BackboneConfig)
    assert isinstance(loaded.config.pixel_channel_mult, tuple) and not loaded.training
    saved, again = model.state_dict(), loaded.state_dict()
    assert list(saved) == list(again)
    assert all(torch.equal(value, again[key]) for key, value in saved.items())
    images = torch.rand(1, 3, 336, 336) * 2 - 1
    assert torch.equal(model.eval().encode(images), loaded.encode(images))
    # Saved twice, as when a user changes a model and saves it to the same folder.
    loaded.save_pretrained(tmp_path)
    assert VFMTok.from_pretrained(str(tmp_path)).config == config


def test_a_folder_stays_where_a_new_one_cannot_be_written(tmp_path: Path, monkeypatch):
    """A full disk must neither lose the old model nor leave an incomplete new one."""
    GPT(GENERATOR).save_pretrained(tmp_path / "old")
    names = sorted(path.name for path in (tmp_path / "old").iterdir())

    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(GPT, "_save_pretrained", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match=f"{folder}: cannot be written .*No space left"):
            GPT(GENERATOR).save_pretrained(tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    GPT.from_pretrained(tmp_path / "old")


def test_a_model_card_is_kept(tmp_path: Path):
    GPT(GENERATOR).save_pretrained(tmp_path)
    assert "vfmtok" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    GPT(GENERATOR).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_umask_gives_the_mode_of_all_files(tmp_path: Path):
    before = os.umask(0o027)
    try:
        for name in ("new", "there"):
            (tmp_path / "there").mkdir(exist_ok=True)
            GPT(GENERATOR).save_pretrained(tmp_path / name)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")}
    assert modes == dict.fromkeys(["README.md", "config.json", "model.safetensors"], 0o640)


def test_what_a_killed_save_left_is_swept_away(tmp_path: Path):
    """Beside a new folder, and inside one that was there."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "there").mkdir()
    ending = f".tmp-{temporary._machine()}-{process.pid}-0123abcd"
    other, *left = (tmp_path / f"{name}{ending}" for name in ("other", "new", "there/model"))
    for folder in (other, *left):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    for name in ("new", "there"):
        GPT(GENERATOR).save_pretrained(tmp_path / name)
        GPT.from_pretrained(tmp_path / name)
    assert other.exists() and not any(folder.exists() for folder in left)


def test_round_trip_of_the_generator(tmp_path: Path):
    GPT(GENERATOR).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == GENERATOR


@pytest.mark.parametrize("config", [None, "GPT-B", {"num_layers": 12}], ids=repr)
def test_every_way_to_give_a_config_is_saved(tmp_path: Path, config):
    """The mixin writes no config.json for defaults, a preset's name, or a partial mapping."""
    with torch.device("meta"):
        model = GPT() if config is None else GPT(config)
    model._save_pretrained = lambda folder: None
    model.save_pretrained(tmp_path)
    assert GPTConfig(**json.loads((tmp_path / "config.json").read_text())) == model.config
    assert model.config == GPTConfig()


def test_half_precision_is_kept_in_the_file(tmp_path: Path, config: VFMTokConfig):
    VFMTok(config).bfloat16().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["quantizer.codebook"].dtype == torch.bfloat16
    assert VFMTok.from_pretrained(tmp_path).quantizer.codebook.dtype == torch.float32


def test_torchs_default_dtype_rounds_no_loaded_model(tmp_path: Path, config: VFMTokConfig):
    tok = VFMTok(config).eval()
    tok.save_pretrained(tmp_path / "tok"), GPT(GENERATOR).save_pretrained(tmp_path / "gpt")
    torch.set_default_dtype(torch.bfloat16)
    try:
        same = VFMTok.from_pretrained(tmp_path / "tok")
        official = GPT.from_official(official_gpt(GPT(GENERATOR).float()), GENERATOR)
        generator = GPT.from_pretrained(tmp_path / "gpt")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert generator.dtype == official.dtype == torch.float32 and same.precision == "float32"
    for name, buffer in tok.named_buffers():
        assert torch.equal(buffer, same.get_buffer(name)), name


def test_torchs_default_device_may_have_no_values(tmp_path: Path):
    gpt = GPT(GENERATOR)
    gpt.save_pretrained(tmp_path)
    with torch.device("meta"):
        loaded = GPT.from_pretrained(tmp_path)
        official = GPT.from_official(official_gpt(gpt), GENERATOR)
    assert not official.head.weight.is_meta
    assert all(torch.equal(value, loaded.state_dict()[k]) for k, value in gpt.state_dict().items())
    assert torch.equal(loaded.rotary, gpt.rotary)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_a_truncated_normal_ends(std: float):
    """torch redraws it until all values are within its limits, which skipped draws never are."""
    state = torch.get_rng_state()
    start = torch.full((4,), 9.0)
    made = unfilled(lambda: nn.init.trunc_normal_(start, std=std))
    assert made is start and torch.all(made.abs() <= 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_draws_no_random_numbers(tmp_path: Path, config: VFMTokConfig):
    """They would change a seeded program, and take longer than reading a large model's weights."""
    tok, gpt = VFMTok(config), GPT(GENERATOR)
    tok.save_pretrained(tmp_path / "tok"), gpt.save_pretrained(tmp_path / "gpt")
    before = torch.get_rng_state()
    loaded = [VFMTok.from_pretrained(tmp_path / "tok"), GPT.from_pretrained(tmp_path / "gpt")]
    loaded.append(GPT.from_official(official_gpt(gpt), GENERATOR))
    assert torch.equal(torch.get_rng_state(), before)
    for model, again in zip((tok, gpt, gpt), loaded, strict=True):
        held = again.state_dict() | dict(again.named_buffers())
        for name, value in (*model.state_dict().items(), *model.named_buffers()):
            assert torch.equal(value, held[name]), name
    # Drawing works as before.
    assert not torch.equal(torch.randn(2), torch.zeros(2).normal_())


def test_a_given_config_takes_the_place_of_the_file(folder: Path, config: VFMTokConfig):
    (folder / "config.json").unlink()
    assert VFMTok.from_pretrained(folder, config=config).config == config


def test_weights_that_do_not_fit_are_all_named(folder: Path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["surplus"] = torch.zeros(1)
    tensors["quantizer.codebook"] = torch.zeros(64, 9)
    tensors["quantizer.proj.bias"][2] = float("nan")
    del tensors["token_decoder.class_token"]
    save_file(tensors, path)
    message = refused(ValueError, folder)
    for part in (
        "missing token_decoder.class_token",
        "unknown surplus",
        "quantizer.codebook (expected (64, 8), got (64, 9))",
        "NaN or infinity in quantizer.proj.bias",
        str(path),
    ):
        assert part in message


def test_broken_weights_file(folder: Path):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (b"", b"<html></html>", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert "is not a safetensors file" in refused(ValueError, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_without_a_file(folder: Path, name: str):
    (folder / name).unlink()
    assert f"has no {name}" in refused(FileNotFoundError, folder)


def test_config_that_does_not_fit(folder: Path):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"colour": 1, "a": 2}))
    with pytest.raises(ValueError, match="VFMTokConfig: unknown field a, colour; it has backbone"):
        VFMTok.from_pretrained(folder)
    path.write_text(json.dumps(config | {"backbone": config["backbone"] | {"depth": 2.5}}))
    with pytest.raises(ValueError, match="BackboneConfig: depth must be an integer"):
        VFMTok.from_pretrained(folder)
    for text, reason in (("{", "is not JSON"), ("[]", "must hold an object, got list")):
        path.write_text(text)
        assert reason in refused(ValueError, folder)


def test_a_generator_is_no_tokenizer(folder: Path):
    with pytest.raises(ValueError, match="GPTConfig: unknown field backbone, .*it has"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./here", "nobody/nothing", "a b", "GPT-L", "x/y/z"]
)
def test_no_folder_and_no_repo(offline: None, source: str):
    message = refused(FileNotFoundError, source)
    assert f"no folder {source}" in message and "config.json" in message
    if "/" not in source:
        # No server is asked: a name without a slash is no repo.
        assert "come with the package are emoji" in message and "from_official" in message


def test_a_runs_folder_names_its_model(tmp_path: Path):
    GPT(GENERATOR).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(FileNotFoundError, match=r"is a training run; its model is .*run/model$"):
        GPT.from_pretrained(tmp_path / "run")


def test_a_config_as_transformers_and_windows_write_it(folder: Path):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["VFMTok"], "torch_dtype": "float32", "_name_or_path": "x"}
    path.write_text("\ufeff" + json.dumps(config | {"transformers_version": "5.0"}), "utf-8")
    VFMTok.from_pretrained(folder)
    path.write_text(json.dumps(config | {"unknown": 1}))
    with pytest.raises(ValueError, match="unknown field unknown"):
        VFMTok.from_pretrained(folder)


def test_tied_weights_are_in_the_file_once(tmp_path: Path):
    """safetensors omits the second name and records it in the file's metadata."""
    model = GPT(GPTConfig(num_layers=1, num_heads=2, dim=16, vocab_size=32, block_size=4))
    model.head.weight = model.token_embedding.weight
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(again.token_embedding.weight, model.head.weight)


def test_tied_weights_in_several_files(tmp_path: Path):
    """huggingface_hub splits files like this: the omitted names are in the index."""
    model = GPT(GENERATOR)
    model.head.weight = model.token_embedding.weight
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_torch_state_dict(model.state_dict(), tmp_path, max_shard_size=5000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_metadata_takes_no_weight_of_the_file_away(tmp_path: Path):
    model = GPT(GENERATOR)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tied = {"head.weight": "token_embedding.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata=tied)
    assert torch.equal(GPT.from_pretrained(tmp_path).head.weight, model.head.weight)


@pytest.mark.parametrize("kind", ["block", "whole", "parallel"])
def test_a_folder_of_a_model_that_was_compiled_or_wrapped(tmp_path: Path, kind: str):
    model = GPT(GENERATOR)
    torch.nn.init.normal_(model.head.weight)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    if kind == "block":
        model.blocks[0] = torch.compile(model.blocks[0])
        assert "blocks.0._orig_mod.attention.qkv.weight" in model.state_dict()
        model.save_pretrained(tmp_path)
    else:
        prefix = "_orig_mod." if kind == "whole" else "module."
        model.save_pretrained(tmp_path)
        save_file(
            {prefix + key: value for key, value in expected.items()},
            tmp_path / "model.safetensors",
        )
    again = GPT.from_pretrained(tmp_path).state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(value, again[key]) for key, value in expected.items())


def test_a_folder_from_home_is_written_there(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("~/a", Path("~/b")):
        GPT(GENERATOR).save_pretrained(source)
        assert GPT.from_pretrained(source).config == GENERATOR
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
