"""The fingerprint of a tokenizer and its settings: everything that a cache's tokens depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, Protocol

import torch

from ... import images as pictures
from ... import switch
from ...tokenizer.model import ENCODE_OPS
from .manifest import BAD_TOKEN, canonical
from .views import parse_views, rules

# What torch.compile and DistributedDataParallel add to weight names, in front or inside.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<![^.])_orig_mod\.")


class Tokenizer(Protocol):
    """The interface that a cache needs from a tokenizer; `vfmtok_fast.VFMTok` provides it.

    `config` is a dataclass with image_size (pixels), num_regions (T, tokens per view) and
    codebook_size; `encode` takes floating-point [B, 3, image_size, image_size] in [-1, 1] and
    returns integer [B, T].
    """

    config: Any

    def encode(self, images: torch.Tensor) -> torch.Tensor: ...

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...

    def parameters(self) -> Any: ...


def describe(
    tokenizer: Tokenizer, views: Iterable[str], batch_size: int, seed: int = 0, heif: bool = False
) -> dict[str, Any]:
    """List everything that changes tokens.

    This includes the batch size: matrix products round differently for another batch shape, which
    flips codes that are nearly tied.

    Args:
        tokenizer: see `Tokenizer`.
        views: names of the views.
        batch_size: views per call of `encode`.
        seed: seed of the random crops; listed only if there are any.
        heif: whether any image is decoded by a package other than Pillow.

    Returns:
        Plain JSON values; the name of each entry explains it.

    Raises:
        ValueError: the codebook does not fit 16-bit tokens. TypeError: not a tokenizer.
    """
    check_tokenizer(tokenizer)
    config = tokenizer.config
    if not 0 < config.codebook_size <= BAD_TOKEN:
        raise ValueError(
            f"cache: codebook_size must be 1 to {BAD_TOKEN} (tokens are stored in 16 bits, "
            f"{BAD_TOKEN} marks a bad picture), got {config.codebook_size}"
        )
    parsed = parse_views(views)
    covers = {
        "weights_sha256": weights_checksum(tokenizer.state_dict()),
        # Unset options are omitted, so that caches made before an option existed can be resumed.
        "config": {k: v for k, v in dataclasses.asdict(config).items() if v is not None},
        "codebook_size": config.codebook_size,
        "num_tokens": config.num_regions,
        # The precision of a VFMTok; the key is older than that name.
        "dtype": _precision(tokenizer),
        **({"fast_ops": ops} if (ops := fast_ops(tokenizer, ENCODE_OPS)) else {}),
        "views": [str(view) for view in parsed],
        **rules(parsed, seed),
        "image_size": config.image_size,
        "interpolation": pictures.INTERPOLATION,
        "decoder": pictures.DECODER,
        "decoder_version": pictures.DECODER_VERSION,
        "batch_size": batch_size,
        **({"heif_decoder_version": pictures.heif_version()} if heif else {}),
    }
    # A round trip through JSON turns tuples into lists, as they are when read back.
    return json.loads(canonical(covers))


def check_tokenizer(tokenizer: object) -> None:
    """Require `encode` and `config.codebook_size` of a `Tokenizer`."""
    config = getattr(tokenizer, "config", None)
    if not hasattr(config, "codebook_size") or not hasattr(tokenizer, "encode"):
        raise TypeError(
            "cache: tokenizer must be a VFMTok, or have its encode, config and parameters, "
            f"got {type(tokenizer).__name__}"
        )


def first_parameter(model: Any) -> torch.Tensor:
    """Return a model's first parameter, which says on what device and in what dtype it computes."""
    return next(iter(model.parameters()), torch.empty(0, dtype=torch.float32, device="cpu"))


def _precision(model: Any) -> str:
    named = getattr(model, "precision", None)
    if isinstance(named, str):
        return named
    return str(first_parameter(model).dtype).removeprefix("torch.")


def fast_ops(model: Any, ops: Set[str]) -> list[str]:
    """Return which of ``ops`` are enabled if the model is in half precision, else none.

    In half precision, enabled ops round differently and change results.

    Args:
        model: a `Tokenizer`, or another module with parameters.
        ops: the ops that its results depend on.
    """
    half = _precision(model) in ("float16", "bfloat16", "mixed")
    return sorted(switch.policy().ops & ops) if half else []


def weights_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of a state dict's names, dtypes, shapes and bytes, sorted by name.

    Args:
        state: tensors of any dtype, shape and device.

    Returns:
        Hexadecimal digest; equal for equal weights on any device.
    """
    digest = hashlib.sha256()
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
