"""Load the authors' files into our models.

The authors publish ``yexiguafu/VFMTok`` on the Hugging Face hub; `OFFICIAL_FILES` lists its files.
DINOv2 publishes its own file. Loading is strict: every key must be present, known and of the right
shape.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import first_line
from .functional import resize_positions
from .hub import check_tensors, read_safetensors, unwrapped, weights_in

Model = TypeVar("Model", bound=nn.Module)

OFFICIAL_REPO = "yexiguafu/VFMTok"
OFFICIAL_FILES = {
    "tokenizer": "DINOv2/tokenizer/vfmtok-tokenizer.pt",
    "GPT-B": "DINOv2/GPT-B/GPT-B-300e.pt",
    "GPT-L": "DINOv2/GPT-L/GPT-L-300e.pt",
    "GPT-XL": "DINOv2/GPT-XL/GPT-XL-200e.pt",
    "GPT-XXL": "DINOv2/GPT-XXL/GPT-XXL-200e.pt",
    "GPT-2B": "DINOv2/GPT-2B/GPT-2B-200e.pt",
    "GPT-3B": "DINOv2/GPT-3B/GPT-3B-200e.pt",
}
DINOV2_FILE = "dinov2_vitl14_reg4_pretrain.pth"
DINOV2_URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2_FILE}"

# First bytes of files from torch.save, now and before torch 1.6.
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Training scripts store their command line, a Namespace and paths, which run no code. Paths from
# another operating system, or from Python 3.13 or later, are read as this Python's pure paths.
HARMLESS = [
    argparse.Namespace,
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for kind, names in (
            (PurePosixPath, ("PosixPath", "PurePosixPath")),
            (PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
    ),
]

SAVED_ALONE = "have it saved with the weights alone, torch.save(model.state_dict(), FILE)"

BACKBONE_PREFIX = "encode_transformer.backbone.pretrained_encoder."

# From our names to the authors', applied in this order.
TOKENIZER_NAMES = (
    (r"^quantizer\.codebook$", "slot_quantize.embedding.weight"),
    (r"^quantizer\.proj\.", "pre_slots_quant."),
    (r"^token_decoder\.proj\.", "post_slots_quant."),
    (r"^region_encoder\.regions$", "encode_transformer.carrier_tokens"),
    (r"^region_encoder\.position$", "encode_transformer.slots_pos"),
    (r"^region_encoder\.input_norm\.", "encode_transformer.norm_pre1."),
    (r"^region_encoder\.level_norms\.", "encode_transformer.norm_layers."),
    (r"^region_encoder\.projectors\.(\d+)\.", r"encode_transformer.projectors.\1.mlp."),
    (r"^region_encoder\.layers\.", "encode_transformer.transformer.layers."),
    (r"\.cross_attention\.offsets\.", ".cross_attn.sampling_offsets."),
    (r"\.cross_attention\.weights\.", ".cross_attn.attention_weights."),
    (r"\.cross_attention\.value\.", ".cross_attn.value_proj."),
    (r"\.cross_attention\.out\.", ".cross_attn.output_proj."),
    (r"\.self_attention\.(q|k|v|out)\.", r".self_attn.\1_proj."),
    (r"(encode_transformer.*)\.cross_norm\.", r"\1.norm1."),
    (r"(encode_transformer.*)\.self_norm\.", r"\1.norm3."),
    (r"(encode_transformer.*)\.ffn_norm\.", r"\1.norm2."),
    (r"(encode_transformer.*)\.up\.", r"\1.linear1."),
    (r"(encode_transformer.*)\.down\.", r"\1.linear2."),
    (r"^token_decoder\.region_position$", "decode_transformer.slot_position_embedding"),
    (r"^token_decoder\.position$", "decode_transformer.position_embedding"),
    (r"^token_decoder\.class_token$", "decode_transformer.cls_token"),
    (r"^token_decoder\.pixel_mask$", "decode_transformer.mask_embedding"),
    (r"^token_decoder\.feature_mask$", "decode_transformer.mask_dino"),
    (r"^token_decoder\.registers$", "decode_transformer.register_tokens"),
    (r"^token_decoder\.pixel_norm\.", "decode_transformer.norm_post1."),
    (r"^token_decoder\.feature_norm\.", "decode_transformer.norm_post2."),
    (r"^token_decoder\.feature_head\.", "decode_transformer.proj."),
    (r"^token_decoder\.layers\.", "decode_transformer.transformer.layers."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.attention\.(q|k|v|out)\.", r".attn1.\1_proj."),
    (r"(decode_transformer.*)\.ffn_norm\.", r"\1.norm2."),
    (r"\.gate_up\.", ".ffnet.w12."),
    (r"(decode_transformer.*)\.down\.", r"\1.ffnet.w3."),
    (r"^pixel_decoder\.middle\.1\.out\.", "decoder.mid.1.proj_out."),
    (r"^pixel_decoder\.middle\.", "decoder.mid."),
    (r"^pixel_decoder\.levels\.(\d+)\.blocks\.", r"decoder.conv_blocks.\1.res."),
    (r"^pixel_decoder\.levels\.(\d+)\.upsample\.", r"decoder.conv_blocks.\1.upsample.conv."),
    (r"^pixel_decoder\.", "decoder."),
    (r"\.shortcut\.", ".nin_shortcut."),
)
GPT_NAMES = (
    (r"^class_embedding\.", "cls_embedding.embedding_table."),
    (r"^token_embedding\.", "tok_embeddings."),
    (r"^blocks\.", "layers."),
    (r"\.attention\.qkv\.", ".attention.wqkv."),
    (r"\.attention\.out\.", ".attention.wo."),
    (r"\.ffn\.gate\.", ".feed_forward.w1."),
    (r"\.ffn\.up\.", ".feed_forward.w3."),
    (r"\.ffn\.down\.", ".feed_forward.w2."),
    (r"^head\.", "output."),
)
RAR_NAMES = (
    (r"^embedding\.", "embeddings."),
    (r"^start$", "cls_token"),
    (r"^position$", "pos_embed"),
    (r"^target_position$", "target_aware_pos_embed"),
    (r"^time$", "timesteps_embeddings"),
    (r"^head_condition\.", "adaln_before_head.adaLN_modulation.1."),
    (r"^head\.", "lm_head."),
    (r"\.condition\.", ".adaLN_modulation.1."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.qkv\.", ".attn.qkv."),
    (r"\.query_norm\.", ".attn.q_norm."),
    (r"\.key_norm\.", ".attn.k_norm."),
    (r"\.out\.", ".attn.proj."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.up\.", ".mlp.fc1."),
    (r"\.down\.", ".mlp.fc2."),
)
# Entries of the authors' files that the models do not use.
TOKENIZER_UNUSED = ("slot_quantize.codebook_used",)
DINOV2_UNUSED = ("mask_token",)
# Keys that may hold the weights in a RAR file; the released ones hold them plainly.
RAR_WRAPPERS = ("ema", "model", "state_dict", "module")
# Rows of RAR's tables of positions beyond one per code; only two are read.
RAR_MORE_POSITIONS = 1024
# How many codes ``codebook_used`` records.
CODES_RECORDED = 65_536


def official_name(ours: str, names: tuple[tuple[str, str], ...]) -> str:
    """Translate one of our state-dict keys by `TOKENIZER_NAMES`, `GPT_NAMES` or `RAR_NAMES`."""
    for pattern, replacement in names:
        ours = re.sub(pattern, replacement, ours)
    return ours


def load_tokenizer(
    model: Model, tokenizer: str | Path | Mapping, backbone: str | Path | Mapping | None = None
) -> Model:
    """Fill a `VFMTok` from the authors' tokenizer file and the backbone's own file.

    Args:
        model: as built from the config; returned in eval mode.
        tokenizer: ``vfmtok-tokenizer.pt``, or the mapping in it: ``{"ema" | "model" | "state_dict":
            {...}}`` or plain.
        backbone: ``dinov2_vitl14_reg4_pretrain.pth`` or the mapping in it; for another timm model,
            a file with timm's own names. None takes the
            ``encode_transformer.backbone.pretrained_encoder.*`` entries of ``tokenizer`` if it has
            any, else downloads the published file.

    Raises:
        ValueError: entries are missing, extra, misshapen or NaN (all are named), or the file is not
            a checkpoint or would run code.
        FileNotFoundError: there is no such file, or the download failed.
    """
    tensors = read_tensors(tokenizer, ("ema", "model", "state_dict"), "tokenizer")
    inside = {
        key.removeprefix(BACKBONE_PREFIX): value
        for key, value in tensors.items()
        if key.startswith(BACKBONE_PREFIX)
    }
    tensors = {key: value for key, value in tensors.items() if not key.startswith(BACKBONE_PREFIX)}
    keys = {
        official_name(key, TOKENIZER_NAMES): key
        for key in model.state_dict()
        if not key.startswith("backbone.")
    }
    state = _translate(tensors, model.state_dict(), keys, TOKENIZER_UNUSED, "tokenizer")
    if backbone is None and inside:
        backbone = inside
    load_backbone(model, backbone)
    model.load_state_dict(model.state_dict() | state)
    return model.eval()


def official_tokenizer(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a `VFMTok` under the authors' names, without the backbone.

    The record of used codes, which their code requires, is included but empty.
    ``torch.save({"ema": ...})`` makes a file that `load_tokenizer` and their code can read.
    """
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    named = {official_name(key, TOKENIZER_NAMES): value for key, value in weights.items()}
    return named | {name: torch.zeros(CODES_RECORDED) for name in TOKENIZER_UNUSED}


def load_backbone(model: Model, backbone: str | Path | Mapping | None = None) -> Model:
    """Fill only the foundation model of a `VFMTok`, for instance to train the rest from scratch.

    Args:
        model: as built from the config; returned.
        backbone: as for `load_tokenizer`; None downloads the published file.

    Raises:
        As for `load_tokenizer`.
    """
    if backbone is None:
        tensors = _fetch_backbone(model)
    else:
        tensors = read_tensors(backbone, ("model", "state_dict", "teacher"), "backbone")
    model.backbone.vit.load_state_dict(_backbone_state(model, tensors))
    return model


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split a `GPT`'s feed-forward weights into the two factors that the authors store.

    The results are views of the same memory.
    """
    parts = {}
    for key, value in state.items():
        if ".gate_up." not in key:
            parts[key] = value
            continue
        for name, half in zip(("gate", "up"), value.chunk(2), strict=True):
            parts[key.replace("gate_up", name)] = half
    return parts


def load_gpt(model: Model, checkpoint: str | Path | Mapping) -> Model:
    """Fill a `GPT` from one of the authors' GPT files. Raises the same errors as `load_tokenizer`.

    Args:
        model: as built from the config; returned in eval mode.
        checkpoint: a ``.pt`` file, or the mapping in it: ``{"ema" | "module" | "state_dict" |
            "model": {...}}`` or plain.
    """
    tensors = read_tensors(checkpoint, ("ema", "module", "state_dict", "model"), "GPT checkpoint")
    own = _split(model.state_dict())
    keys = {official_name(key, GPT_NAMES): key for key in own}
    state = _translate(tensors, own, keys, (), "GPT checkpoint")
    for key in [key for key in state if ".ffn.gate." in key]:
        halves = state.pop(key), state.pop(key.replace(".gate.", ".up."))
        state[key.replace(".gate.", ".gate_up.")] = torch.cat(halves)
    model.load_state_dict(state, strict=True)
    return model.eval()


def official_gpt(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a `GPT` under the authors' names; save like `official_tokenizer`'s."""
    weights = _split(model.state_dict())
    return {official_name(key, GPT_NAMES): value for key, value in weights.items()}


def rar_fields(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the fields of `RARConfig` that the shapes of a RAR's weights tell.

    Raises:
        ValueError: one of the entries that tell them is missing.
    """
    dimensions = {
        "embeddings.weight": 2,
        "lm_head.weight": 2,
        "pos_embed": 3,
        "blocks.0.attn.q_norm.weight": 1,
        "blocks.0.mlp.fc1.weight": 2,
    }
    for name, count in dimensions.items():
        if name not in tensors or tensors[name].ndim != count:
            raise ValueError(f"RAR checkpoint: it holds no RAR: no {name} of {count} dimensions")
    (rows, dim), codes = tensors["embeddings.weight"].shape, len(tensors["lm_head.weight"])
    return {
        "num_layers": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": dim // max(1, len(tensors["blocks.0.attn.q_norm.weight"])),
        "dim": dim,
        "mlp_dim": len(tensors["blocks.0.mlp.fc1.weight"]),
        "vocab_size": codes,
        "block_size": tensors["pos_embed"].shape[1] - RAR_MORE_POSITIONS,
        # Beside codes and classes there are a mask and "no class".
        "num_classes": rows - codes - 2,
    }


def load_rar(model: Model, checkpoint: str | Path | Mapping) -> Model:
    """Fill a `RAR` from one of the authors' RAR files. Raises the same errors as `load_tokenizer`.

    Args:
        model: as built from the config; returned in eval mode.
        checkpoint: a ``.safetensors`` or ``.pt`` file, or the mapping in it.
    """
    tensors = read_tensors(checkpoint, RAR_WRAPPERS, "RAR checkpoint")
    own = model.state_dict()
    keys = {official_name(key, RAR_NAMES): key for key in own}
    model.load_state_dict(_translate(tensors, own, keys, (), "RAR checkpoint"))
    return model.eval()


def read_tensors(
    source: str | Path | Mapping, wrappers: tuple[str, ...], what: str
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, taken out of any wrapper, by their plain names.

    Args:
        source: a ``.pt``, ``.pth`` or ``.safetensors`` file, or a mapping.
        wrappers: keys that may hold the tensors; the first that does is used.
        what: how errors name the source.
    """
    content = (
        source
        if isinstance(source, Mapping)
        else _read_file(Path(os.path.expanduser(source)), what)
    )
    for wrapper in wrappers:
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and inner:
            content = inner
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{what}: expected a mapping of tensors, or one under {', '.join(wrappers)}, "
            f"got {type(content).__name__}{' (empty)' if isinstance(content, Mapping) else ''}"
        )
    wrong = [
        str(key)
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if wrong:
        raise ValueError(
            f"{what}: expected only named tensors, or them under {', '.join(wrappers)}, "
            f"got other entries: {', '.join(wrong)}"
        )
    return unwrapped(content, what)


def check_there(source: str | Path | Mapping | None, what: str) -> None:
    """Refuse a missing file before a model is built, which takes seconds."""
    if source is None or isinstance(source, Mapping):
        return
    path = Path(os.path.expanduser(source))
    if not path.is_file() and not weights_in(path):
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{what}: {path} {kind}, expected a checkpoint file")


def _read_file(path: Path, what: str) -> object:
    check_there(path, what)
    if found := weights_in(path):
        return read_safetensors(found, what)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return read_safetensors(path, what)
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY_MAGIC))
    except OSError as error:
        raise OSError(f"{what}: {path} cannot be read ({error.strerror})") from error
    # On other bytes the unpickler may fail in any way. The usual case is a web page saved in place
    # of the file.
    if not head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        raise ValueError(f"{what}: {path} is not a torch checkpoint, it begins with {head[:12]!r}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if cause := re.search(r"GLOBAL (\w[\w.]*)", str(error)):
            raise ValueError(
                f"{what}: {path} was refused: it refers to {cause[1]}, and reading that could run "
                f"code; {SAVED_ALONE}"
            ) from error
        if "Unsupported operand" in str(error):
            raise ValueError(
                f"{what}: {path} is not a torch checkpoint of pickle protocol 2, torch.save's own, "
                f"or it is damaged; {SAVED_ALONE}"
            ) from error
        raise ValueError(f"{what}: {path} is not a complete torch checkpoint") from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        reason = first_line(error).split(". ")[0]
        raise ValueError(f"{what}: {path} is not a complete torch checkpoint ({reason})") from error


def _translate(
    theirs: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    keys: Mapping[str, str],
    unused: tuple[str, ...],
    what: str,
    **shapes: tuple[int, ...],
) -> dict[str, Tensor]:
    """Rename ``theirs`` by ``keys`` (their name to ours), after naming everything that misfits.

    ``shapes`` gives the shapes of entries whose shape differs from that in ``own``.
    """
    expected = {key: tuple(own[ours].shape) for key, ours in keys.items()} | shapes
    check_tensors(theirs, expected, what, unused)
    return {ours: theirs[key] for key, ours in keys.items()}


def _backbone_state(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert backbone tensors with DINOv2's or timm's names to those of ``model.backbone.vit``."""
    config, vit = model.config.backbone, model.backbone.vit
    own = vit.state_dict()
    if config.timm_name is not None:
        # Heads and pooling are not part of the features.
        heads = ("head.", "attn_pool.", "fc_norm.")
        tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(heads)}
        # timm's own conversion, which resizes the position table and knows other projects' names.
        convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                tensors = convert(tensors, vit)
            except (AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"backbone does not fit {config.timm_name} ({first_line(error)})"
                ) from error
        return _translate(tensors, own, {key: key for key in own}, (), "backbone")

    keys = {{"reg_token": "register_tokens"}.get(key, key): key for key in own}
    positions = (1, 1 + config.pretrain_grid**2, config.dim)
    state = _translate(tensors, own, keys, DINOV2_UNUSED, "backbone", pos_embed=positions)
    # timm adds positions to patches only, so the class token includes its own position.
    table = state["pos_embed"].float()
    state["cls_token"] = state["cls_token"] + table[:, :1]
    state["pos_embed"] = resize_positions(
        table[:, 1:], model.config.feature_grid, antialias=config.antialias_positions
    )
    return state


def fetch_official(name: str, flag: str) -> Path:
    """Download one of `OFFICIAL_FILES` from the hub, or find it in the hub's cache.

    Args:
        name: a key of `OFFICIAL_FILES`.
        flag: the flag for passing a local file instead, named in the error.

    Raises:
        FileNotFoundError: the hub cannot be reached or does not have the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file = OFFICIAL_FILES[name]
    try:
        return Path(hf_hub_download(OFFICIAL_REPO, file))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"cannot download {file} from the Hugging Face repo {OFFICIAL_REPO}; "
            f"download it on a machine with a network and pass its path with {flag}"
        ) from error


def _fetch_backbone(model: nn.Module) -> dict[str, Tensor]:
    config = model.config.backbone
    if config.timm_name is not None:
        import timm

        try:
            return timm.create_model(config.timm_name, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"cannot download timm's weights of {config.timm_name}; download its "
                "model.safetensors on a machine with a network and pass its path as backbone "
                "(--backbone)"
            ) from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / DINOV2_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(DINOV2_URL, str(path))
        except OSError as error:
            raise FileNotFoundError(
                f"the tokenizer file holds no backbone and {DINOV2_URL} cannot be downloaded; "
                f"download {DINOV2_FILE} on a machine with a network and pass its path as "
                "backbone (--backbone)"
            ) from error
    return read_tensors(path, ("model", "state_dict"), "backbone")
