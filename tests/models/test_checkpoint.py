"""The authors' files: every wrapper can be read, and every broken file raises a one-line error."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from vfmtok_fast import GPT, BackboneConfig, GPTConfig, VFMTok, VFMTokConfig, checkpoint
from vfmtok_fast.checkpoint import (
    BACKBONE_PREFIX,
    DINOV2_UNUSED,
    TOKENIZER_NAMES,
    TOKENIZER_UNUSED,
    official_name,
    read_tensors,
)
from vfmtok_fast.functional import resize_positions

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GPT_CONFIG = GPTConfig(
    num_layers=1, num_heads=2, dim=32, vocab_size=64, block_size=16, num_classes=4
)


@pytest.fixture(scope="module")
def backbone(tiny: VFMTokConfig) -> dict[str, Tensor]:
    """A file in DINOv2's own naming, with the position table at DINOv2's training size."""
    torch.manual_seed(0)
    state = VFMTok(tiny).backbone.vit.state_dict()
    state["register_tokens"] = torch.randn_like(state.pop("reg_token"))
    state["cls_token"] = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 32)
    state["mask_token"] = torch.randn(1, 32)
    return state


@pytest.fixture(scope="module")
def tokenizer(tiny: VFMTokConfig) -> dict[str, Tensor]:
    """A file in the authors' naming, without the backbone."""
    torch.manual_seed(1)
    state = VFMTok(tiny).state_dict()
    theirs = {
        official_name(key, TOKENIZER_NAMES): torch.randn_like(value)
        for key, value in state.items()
        if not key.startswith("backbone.")
    }
    return theirs | {"slot_quantize.codebook_used": torch.zeros(64)}


@pytest.fixture(scope="module")
def gpt() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        key: torch.randn_like(value)
        for key, value in checkpoint.official_gpt(GPT(GPT_CONFIG)).items()
    }


@pytest.fixture(scope="module")
def load(tiny: VFMTokConfig) -> Callable[..., VFMTok]:
    return lambda tokenizer, backbone=None: VFMTok.from_official(tokenizer, backbone, tiny)


def refused(kind: type, call: Callable, *args, **options) -> str:
    with pytest.raises(kind) as error:
        call(*args, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def inside(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {BACKBONE_PREFIX + key: value for key, value in backbone.items()}


def shifted(tensors: Mapping[str, Tensor], by: float = 1.0) -> dict[str, Tensor]:
    return {key: value + by for key, value in tensors.items()}


def wrong_in(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# Files that are read.


@pytest.mark.parametrize("where", ["mapping", "file", "old file", "safetensors"])
def test_values_arrive_where_they_belong(tokenizer, backbone, where: str, tmp_path: Path, load):
    first, second = tokenizer, backbone
    if where != "mapping":
        first, second = tmp_path / "t.pt", str(tmp_path / "b.pth")
        new = where == "file"
        torch.save(tokenizer, first, _use_new_zipfile_serialization=new)
        torch.save(backbone, second, _use_new_zipfile_serialization=new)
    if where == "safetensors":
        first = tmp_path / "t.safetensors"
        save_file(tokenizer, first)
    model = load(first, second)
    state = model.state_dict()
    assert not model.training
    for key, value in tokenizer.items():
        if key in TOKENIZER_UNUSED:
            continue
        (ours,) = [k for k in state if official_name(k, TOKENIZER_NAMES) == key]
        assert torch.equal(state[ours], value), key
    vit = model.backbone.vit.state_dict()
    for key in set(backbone) - {"pos_embed", "cls_token", "register_tokens", "mask_token"}:
        assert torch.equal(vit[key], backbone[key]), key
    assert torch.equal(vit["reg_token"], backbone["register_tokens"])


def test_back_to_the_authors_naming(tokenizer, backbone, load):
    model = load(tokenizer, backbone)
    theirs = checkpoint.official_tokenizer(model)
    assert theirs.keys() == tokenizer.keys()
    for key, value in theirs.items():
        if key == "slot_quantize.codebook_used":
            # It has the size of the authors' file, because their code loads it strictly.
            full = json.loads((GOLDEN / "tokenizer_full.keys.json").read_text())
            assert list(value.shape) == full[key] and not value.any()
        else:
            assert torch.equal(value, tokenizer[key]), key


def test_a_backbone_alone(tokenizer, backbone, load, tiny: VFMTokConfig):
    loaded, fresh = load(tokenizer, backbone).state_dict(), VFMTok(tiny)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    assert checkpoint.load_backbone(fresh, backbone) is fresh
    for key, value in fresh.state_dict().items():
        expected = loaded if key.startswith("backbone.") else before
        assert torch.equal(value, expected[key]), key


def test_positions_of_the_backbone(tokenizer, backbone, load):
    """The class token gets the class position, the others are resized, registers get none."""
    vit = load(tokenizer, backbone).backbone.vit
    table = backbone["pos_embed"]
    assert torch.equal(vit.cls_token, backbone["cls_token"] + table[:, :1])
    assert torch.equal(vit.pos_embed, resize_positions(table[:, 1:], 24))
    assert torch.equal(vit.reg_token, backbone["register_tokens"])


def test_backbone_inside_the_tokenizer_file(tokenizer, backbone, load):
    expected = load(tokenizer, backbone).state_dict()
    together = load({"model": tokenizer | inside(backbone)}).state_dict()
    assert all(torch.equal(value, together[key]) for key, value in expected.items())
    # A separate backbone takes precedence over the one inside.
    again = load(tokenizer | inside(shifted(backbone)), backbone).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in expected.items())


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict", None])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."],
)
def test_tokenizer_wrappers(tokenizer, wrapper: str | None, prefix: str):
    content = {prefix + key: value for key, value in tokenizer.items()}
    if wrapper:
        content = {wrapper: content, "args": argparse.Namespace(lr=1e-4), "step": 5}
    found = read_tensors(content, ("ema", "model", "state_dict"), "tokenizer")
    assert found.keys() == tokenizer.keys()


@pytest.mark.parametrize("empty", [None, {}], ids=repr)
def test_precedence(tokenizer, backbone, gpt, empty, load):
    """The order is ema, model, state_dict; for a GPT ema, module, state_dict, model."""

    def bias(content: dict) -> float:
        return float(load(content, backbone).state_dict()["quantizer.proj.bias"][0])

    base = float(tokenizer["pre_slots_quant.bias"][0])
    content = {"state_dict": shifted(tokenizer, 2), "model": shifted(tokenizer, 1)}
    assert bias(content) == pytest.approx(base + 1)
    assert bias({**content, "ema": tokenizer}) == pytest.approx(base)
    # Training without EMA may leave an empty entry.
    assert bias({**content, "ema": empty}) == pytest.approx(base + 1)

    content, order = {}, ["model", "state_dict", "module", "ema"]
    for i, wrapper in enumerate(order):
        content[wrapper] = shifted(gpt, i)
        loaded = GPT.from_official(content, GPT_CONFIG).state_dict()["norm.weight"]
        assert torch.equal(loaded, gpt["norm.weight"] + i), wrapper
    assert torch.equal(
        GPT.from_official(gpt, GPT_CONFIG).state_dict()["norm.weight"], gpt["norm.weight"]
    )


def test_a_namespace_in_the_file_is_read_over(tokenizer, backbone, tmp_path: Path, load):
    """Paths in it are read too: of this system, of another, of a later Python."""
    args = argparse.Namespace(lr=1e-4, name="x", sizes=[1, 2], out=Path("/runs/1"))
    load(wrong_in(tmp_path / "t.pt", {"ema": tokenizer, "args": args}), backbone)
    file = tmp_path / "t.pt"
    for name in (b"pathlib\nPurePosixPath", b"pathlib\nWindowsPath"):
        data = file.read_bytes()
        assert data.count(b"pathlib\nPosixPath") == 1
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "o.pt", "w") as new:
            for member in old.namelist():
                content = old.read(member).replace(b"pathlib\nPosixPath", name)
                new.writestr(member, content)
        load(tmp_path / "o.pt", backbone)


def test_words_of_compiled_blocks_and_averages_are_left_out(tokenizer):
    """This covers torch.compile on single blocks, and torch's AveragedModel."""
    names = {key: "module." + key.replace("layers.0.", "layers.0._orig_mod.") for key in tokenizer}
    content = {names[key]: value for key, value in tokenizer.items()}
    found = read_tensors({**content, "n_averaged": torch.tensor(7)}, (), "tokenizer")
    assert found.keys() == tokenizer.keys() and names != {key: key for key in names}


@pytest.mark.parametrize(
    ("count", "prefix"),
    [
        ("n_averaged", "module."),
        ("module.n_averaged", "module.module."),
        ("_orig_mod.n_averaged", "_orig_mod.module."),
        ("_orig_mod.module.n_averaged", "_orig_mod.module.module._orig_mod."),
    ],
)
def test_an_average_that_was_wrapped_itself(tokenizer, count: str, prefix: str):
    content = {count: torch.tensor(7)} | {prefix + key: tokenizer[key] for key in tokenizer}
    assert read_tensors(content, (), "tokenizer").keys() == tokenizer.keys()


def test_two_names_of_one_weight_are_refused(tokenizer):
    """Nobody knows which of the two counts."""
    name = "decode_transformer.transformer.layers.0.norm1.weight"
    other = name.replace("layers.0.", "layers.0._orig_mod.")
    content = tokenizer | {other: tokenizer[name] + 1}
    message = refused(ValueError, read_tensors, content, (), "tokenizer")
    assert message == f"tokenizer: two entries for one weight: {name} and {other}"


def test_sharded_safetensors(gpt, tmp_path: Path):
    """A folder with an index, as transformers and FSDP's tools write large models."""
    names = sorted(gpt)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: gpt[name] for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = GPT.from_official(source, GPT_CONFIG).state_dict()
        assert torch.equal(loaded["norm.weight"], gpt["norm.weight"])
    (tmp_path / "model-2.safetensors").unlink()
    message = refused(FileNotFoundError, GPT.from_official, tmp_path, GPT_CONFIG)
    assert "names model-2.safetensors, which is not in its folder" in message


def test_a_weight_in_two_parts_is_refused(gpt, tmp_path: Path):
    for file in ("1.safetensors", "2.safetensors"):
        save_file(gpt, tmp_path / file)
    index = {"weight_map": dict(zip(gpt, ["1.safetensors", "2.safetensors"] * 99, strict=False))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(ValueError, GPT.from_official, tmp_path, GPT_CONFIG)
    assert "more than one of its files holds " in message and "norm.weight" in message


@pytest.mark.parametrize("files", [["a"], None, {"a": 3}, {}, "a"], ids=repr)
def test_an_index_that_names_no_files(tmp_path: Path, files: object):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": files}))
    message = refused(ValueError, GPT.from_official, tmp_path, GPT_CONFIG)
    assert message == (
        f"GPT checkpoint: {path} must hold weight_map, an object of weights and their files"
    )


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "no.safetensors", ".."])
def test_an_index_names_files_beside_it_only(gpt, tmp_path: Path, name: str):
    save_file(gpt, tmp_path / "x.safetensors")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    message = refused(FileNotFoundError, GPT.from_official, tmp_path / "in", GPT_CONFIG)
    assert message == f"GPT checkpoint: {path} names {name}, which is not in its folder"


def test_a_path_from_home(gpt, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(gpt, tmp_path / "gpt.safetensors")
    loaded = GPT.from_official("~/gpt.safetensors", GPT_CONFIG)
    loaded.save_pretrained(tmp_path / "gpt")
    again = GPT.from_pretrained("~/gpt")
    assert torch.equal(again.norm.weight, gpt["norm.weight"])


@pytest.mark.parametrize("case", ["tokenizer_small", "tokenizer_full", "gpt_small", "gpt_b"])
def test_names_are_one_to_one(case: str):
    """Entries of the authors' release and of our models correspond one to one."""
    shapes = json.loads((GOLDEN / f"{case}.keys.json").read_text())
    small = {"dim": 128, "decoder_mlp_dim": 256, "pixel_channels": 32, "codebook_size": 1024}
    small |= {"encoder_depth": 2, "decoder_depth": 2}
    with torch.device("meta"):
        if case == "tokenizer_small":
            backbone = BackboneConfig(dim=96, depth=24, num_heads=4)
            model = VFMTok(VFMTokConfig(**small, backbone=backbone))
        elif case == "tokenizer_full":
            model = VFMTok(VFMTokConfig())
        elif case == "gpt_small":
            sizes = {"vocab_size": 512, "block_size": 64, "num_classes": 10}
            model = GPT(GPTConfig(num_layers=3, num_heads=4, dim=128, **sizes))
        else:
            model = GPT("GPT-B")
    state = model.state_dict()
    named = (
        checkpoint.official_gpt(model)
        if case.startswith("gpt")
        else checkpoint.official_tokenizer(model)
    )
    theirs = [key for key in named if key not in TOKENIZER_UNUSED]
    for key in theirs:
        assert list(named[key].shape) == shapes[key], key
    if case.startswith("tokenizer"):
        vit = [key.removeprefix("backbone.vit.") for key in state if key.startswith("backbone.")]
        vit = ["register_tokens" if key == "reg_token" else key for key in vit]
        theirs += [BACKBONE_PREFIX + key for key in vit]
    unused = {*TOKENIZER_UNUSED, *(BACKBONE_PREFIX + key for key in DINOV2_UNUSED)}
    assert len(set(theirs)) == len(theirs)
    assert set(shapes) - unused == set(theirs)


# Files that are refused.


def test_everything_that_does_not_fit_is_named_at_once(tokenizer, backbone, load):
    bad = dict(tokenizer)
    del bad["pre_slots_quant.weight"], bad["decode_transformer.mask_dino"]
    bad["surplus.weight"] = torch.zeros(2)
    bad["slot_quantize.embedding.weight"] = torch.zeros(64, 8)
    bad["decoder.conv_in.bias"] = tokenizer["decoder.conv_in.bias"].clone()
    bad["decoder.conv_in.bias"][0] = float("nan")
    bad["post_slots_quant.bias"] = tokenizer["post_slots_quant.bias"] + float("inf")
    message = refused(ValueError, load, bad, backbone)
    assert message == (
        "tokenizer does not fit the model: "
        "missing decode_transformer.mask_dino, pre_slots_quant.weight; "
        "unknown surplus.weight; "
        "misshapen slot_quantize.embedding.weight (expected (64, 12), got (64, 8)); "
        "NaN or infinity in post_slots_quant.bias, decoder.conv_in.bias"
    )


def test_backbone_that_does_not_fit(tokenizer, backbone, load):
    bad = dict(backbone)
    del bad["norm.bias"]
    bad["blocks.7.norm1.weight"] = torch.zeros(32)
    bad["pos_embed"] = torch.zeros(1, 1 + 576, 32)
    bad["cls_token"] = torch.full((1, 1, 32), float("nan"))
    expected = (
        "backbone does not fit the model: missing norm.bias; unknown blocks.7.norm1.weight; "
        "misshapen pos_embed (expected (1, 1370, 32), got (1, 577, 32)); "
        "NaN or infinity in cls_token"
    )
    assert refused(ValueError, load, tokenizer, bad) == expected
    assert refused(ValueError, load, tokenizer | inside(bad)) == expected
    assert "missing" in refused(ValueError, load, tokenizer, tokenizer)


def test_gpt_that_does_not_fit(gpt):
    bad = {k: v for k, v in gpt.items() if k != "norm.weight"} | {"freqs_cis": torch.zeros(1)}
    message = refused(ValueError, GPT.from_official, {"module": bad}, GPT_CONFIG)
    assert message == (
        "GPT checkpoint does not fit the model: missing norm.weight; unknown freqs_cis"
    )


@pytest.mark.parametrize(
    "content",
    [{}, {"ema": {}}, {"model": None}, [1], torch.zeros(2), {1: torch.zeros(1)}, {"a": 1}, "x"],
    ids=repr,
)
def test_no_mapping_of_tensors(content: object, tmp_path: Path, load):
    path = wrong_in(tmp_path / "x.pt", content)
    assert refused(ValueError, load, path).startswith("tokenizer: expected ")
    if isinstance(content, Mapping):
        assert refused(ValueError, load, content).startswith("tokenizer: expected ")


class Trap:
    """Unpickled without precautions, it creates a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code(tokenizer, tmp_path: Path, new: bool, load):
    sprung = tmp_path / "sprung"
    path = tmp_path / "evil.pt"
    torch.save({"model": tokenizer, "x": Trap(sprung)}, path, _use_new_zipfile_serialization=new)
    message = refused(ValueError, load, path)
    assert f"{path} was refused: it refers to posix.mkdir" in message
    assert not sprung.exists()
    # The trap works: only our loader avoids it.
    torch.load(path, weights_only=False)
    assert sprung.exists()


def test_a_refusal_says_what_to_do(tokenizer, tmp_path: Path, load):
    path = wrong_in(tmp_path / "t.pt", {"model": tokenizer, "best": argparse.Action})
    message = refused(ValueError, load, path)
    assert message == (
        f"tokenizer: {path} was refused: it refers to argparse.Action, and reading that could run "
        "code; have it saved with the weights alone, torch.save(model.state_dict(), FILE)"
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [4, 5])
def test_another_pickle_protocol_is_named(tokenizer, tmp_path: Path, protocol: int, load):
    """The file is intact, but weights_only reads only torch.save's default protocol."""
    path = tmp_path / "t.pt"
    torch.save({"model": tokenizer}, path, pickle_protocol=protocol)
    message = refused(ValueError, load, path)
    assert f"{path} is not a torch checkpoint of pickle protocol 2" in message
    assert "torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncated_files(tokenizer, tmp_path: Path, new: bool, load):
    path = tmp_path / "t.pt"
    torch.save(tokenizer, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for part in (0.002, 0.02, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(whole[: int(part * len(whole))])
        assert f"{path} is not a complete " in refused(ValueError, load, path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html>\n<html>Not found</html>",
        b"version https://git-lfs",
        b"\x80\x02]q",
        b"PK",
    ],
    ids=["empty", "html", "lfs", "pickle", "short"],
)
def test_other_files(data: bytes, tmp_path: Path, load):
    path = tmp_path / "t.pt"
    path.write_bytes(data)
    assert f"tokenizer: {path} is not a torch checkpoint" in refused(ValueError, load, path)
    path = path.with_suffix(".safetensors")
    path.write_bytes(data)
    assert f"tokenizer: {path} is not a safetensors file" in refused(ValueError, load, path)


def test_no_file(tokenizer, tmp_path: Path, load):
    message = refused(FileNotFoundError, load, tmp_path / "none.pt")
    assert message == f"tokenizer: {tmp_path}/none.pt does not exist, expected a checkpoint file"
    assert f"{tmp_path} is a folder" in refused(FileNotFoundError, load, tmp_path)
    message = refused(FileNotFoundError, load, tokenizer, tmp_path / "none.pth")
    assert message.startswith("backbone: ")
    message = refused(FileNotFoundError, GPT.from_official, tmp_path / "g.pt", "GPT-B")
    assert message.startswith("GPT checkpoint: ")


# Without a network.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Same as HF_HUB_OFFLINE=1, with empty caches."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

    def no_network(url: str, *args, **options) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


def test_offline_the_error_names_file_source_and_flag(offline: None, tokenizer, load):
    message = refused(FileNotFoundError, checkpoint.fetch_official, "GPT-L", "--gpt")
    for part in ("DINOv2/GPT-L/GPT-L-300e.pt", "yexiguafu/VFMTok", "--gpt"):
        assert part in message
    message = refused(FileNotFoundError, load, tokenizer)
    for part in ("dinov2_vitl14_reg4_pretrain.pth", "dl.fbaipublicfiles.com", "--backbone"):
        assert part in message


def test_backbone_file_that_lies_in_the_cache(
    offline: None, tokenizer, backbone, tmp_path: Path, load
):
    path = tmp_path / "torch" / "checkpoints" / checkpoint.DINOV2_FILE
    path.parent.mkdir(parents=True)
    torch.save(backbone, path)
    expected = load(tokenizer, backbone).state_dict()
    found = load(tokenizer).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
