"""The manifest: what a cache is, and everything that its tokens depend on.

`manifest.json` is written once, before the first shard. Its fingerprint is the hash of `covers`,
the list of all that changes tokens; a run whose list differs is refused with the names of what
differs, so tokens of two tokenizers never meet in one folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ... import images as pictures
from ... import switch
from ...tokenizer.model import ENCODE_OPS
from ..store import Place, place
from .differences import differences
from .views import parse_views, rules

FORMAT = "vfmtok_fast token cache"
VERSION = 1
NAME = "manifest.json"
BAD_TOKEN = 0xFFFF
# What torch.compile and DistributedDataParallel put before or into the names of weights.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<![^.])_orig_mod\.")


class Tokenizer(Protocol):
    """What a cache needs of a tokenizer; `vfmtok_fast.VFMTok` has it.

    `config` is a dataclass with image_size (pixels), num_regions (T, tokens per view) and
    codebook_size; `encode` takes floating-point [B, 3, image_size, image_size] in [-1, 1] and
    returns integer [B, T].
    """

    config: Any

    def encode(self, images: torch.Tensor) -> torch.Tensor: ...

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...

    def parameters(self) -> Any: ...


class FingerprintMismatch(FileExistsError):
    """The folder holds a cache that was made by another tokenizer or with other settings."""


def _covered(name: str, meaning: str, *default: Any) -> Any:
    """A property: an entry of `covers`, KeyError where it is missing and has no default."""

    def value(self: Manifest) -> Any:
        return self.covers.get(name, *default) if default else self.covers[name]

    return property(value, doc=meaning)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Args:
        covers: everything that changes tokens, as plain JSON values.
        shard_size: pictures per shard.
        images: number of pictures in the index.
        classes: the class folders; label i is classes[i].
        index_sha256: checksum of the index's content.
    """

    covers: dict[str, Any]
    shard_size: int
    images: int
    classes: list[str]
    index_sha256: str

    @property
    def fingerprint(self) -> str:
        """Hash of `covers`, in hexadecimal."""
        return hashlib.sha256(canonical(self.covers)).hexdigest()

    views = _covered("views", "Names of the V views, in the order in which shards hold them.")
    num_tokens = _covered("num_tokens", "T, tokens per view.")
    codebook_size = _covered("codebook_size", "Tokens are below this.")
    image_size = _covered("image_size", "Side of the square that is encoded, in pixels.")
    batch_size = _covered(
        "batch_size", "Views per call of `encode`; the last batch of a shard is padded to it."
    )
    seed = _covered("seed", "Seed of the random crops; 0 where there are none.", 0)

    @property
    def heif(self) -> bool:
        """Whether there are pictures that another package than Pillow decodes."""
        return "heif_decoder_version" in self.covers

    def places_of(self, views: Iterable[str] | None, out: object) -> list[int]:
        """Where a shard has some views, or all for None; ValueError for one it does not have."""
        names = self.views if views is None else [str(view) for view in parse_views(views)]
        if lacking := [name for name in names if name not in self.views]:
            raise ValueError(f"{out}: has the views {', '.join(self.views)}, not {lacking[0]!r}")
        return [self.views.index(name) for name in names]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Global indices of the pictures in a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.images))

    def write(self, out: Place, name: str = NAME) -> None:
        """Write manifest.json into `out`, atomically; raises CacheWriteError."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "covers": self.covers,
            "views": self.views,
            "shard_size": self.shard_size,
            "counts": {"images": self.images, "shards": self.shards, "classes": len(self.classes)},
            "classes": self.classes,
            "index_sha256": self.index_sha256,
        }
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (out / name).put(text.encode())


def read_manifest(out: str | os.PathLike | Place, name: str = NAME) -> Manifest:
    """Read and check a cache's manifest; `name` is for one that is on its way.

    Raises:
        FileNotFoundError: `out` is no token cache.
        ValueError: the manifest is damaged, of another version, or not ours.
    """
    path = place(out) / name
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{out}: no token cache here ({NAME} is missing); make one with vfmtok-fast cache"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or cache anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a token cache")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {content.get('version')}, this program reads {VERSION}"
        )
    try:
        manifest = Manifest(
            covers=content["covers"],
            shard_size=content["shard_size"],
            images=content["counts"]["images"],
            classes=content["classes"],
            index_sha256=content["index_sha256"],
        )
        said = content["fingerprint"], content["counts"]["shards"], content["views"]
        sound = (manifest.fingerprint, manifest.shards, manifest.views) == said
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: damaged (entry {error}); restore it, or cache anew") from error
    if not sound:
        raise ValueError(
            f"{path}: damaged (the fingerprint does not fit what it covers); "
            "restore it, or cache anew"
        )
    return manifest


def describe(
    tokenizer: Tokenizer, views: Iterable[str], batch_size: int, seed: int = 0, heif: bool = False
) -> dict[str, Any]:
    """List everything that changes tokens.

    The batch size is among it: matrix products round differently in another batch shape, which
    flips codes that are nearly tied.

    Args:
        tokenizer: see `Tokenizer`.
        views: names of the views.
        batch_size: views per call of `encode`.
        seed: of the random crops; counts only where there are any.
        heif: whether there are pictures that another package than Pillow decodes.

    Returns:
        Plain JSON values; every entry is explained by its name.

    Raises:
        ValueError: the codebook does not fit 16-bit tokens. TypeError: not a tokenizer.
    """
    config = getattr(tokenizer, "config", None)
    if not hasattr(config, "codebook_size") or not hasattr(tokenizer, "encode"):
        raise TypeError(
            "cache: tokenizer must be a VFMTok, or have its encode, config and parameters, "
            f"got {type(tokenizer).__name__}"
        )
    if not 0 < config.codebook_size <= BAD_TOKEN:
        raise ValueError(
            f"cache: codebook_size must be 1 to {BAD_TOKEN} (tokens are stored in 16 bits, "
            f"{BAD_TOKEN} marks a bad picture), got {config.codebook_size}"
        )
    parsed = parse_views(views)
    covers = {
        "weights_sha256": weights_checksum(tokenizer.state_dict()),
        # Without options that are not taken: caches of before there were such go on.
        "config": {k: v for k, v in dataclasses.asdict(config).items() if v is not None},
        "codebook_size": config.codebook_size,
        "num_tokens": config.num_regions,
        # A VFMTok's precision; what it is called here is older than that.
        "dtype": (precision := _precision(tokenizer)),
        **_fast_ops(precision),
        "views": [str(view) for view in parsed],
        **rules(parsed, seed),
        "image_size": config.image_size,
        "interpolation": pictures.INTERPOLATION,
        "decoder": pictures.DECODER,
        "decoder_version": pictures.DECODER_VERSION,
        "batch_size": batch_size,
        **({"heif_decoder_version": pictures.heif_version()} if heif else {}),
    }
    # Through JSON once, so that tuples are lists as they are when read back.
    return json.loads(canonical(covers))


def _precision(tokenizer: Tokenizer) -> str:
    named = getattr(tokenizer, "precision", None)
    if isinstance(named, str):
        return named
    first = next(iter(tokenizer.parameters()), None)
    return str(torch.float32 if first is None else first.dtype).removeprefix("torch.")


def _fast_ops(precision: str) -> dict[str, list[str]]:
    """In half precision, the enabled ops: they round differently, and tokens differ by that."""
    ops = sorted(switch.policy().ops & ENCODE_OPS)
    return {"fast_ops": ops} if precision in ("float16", "bfloat16", "mixed") and ops else {}


def weights_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in sorted order of the names.

    Args:
        state: tensors of any dtype, shape and device.

    Returns:
        Hexadecimal digest; equal for equal weights wherever they lie.
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


def check_same(found: Manifest, covers: dict[str, Any], shard_size: int, out: Place) -> None:
    """Refuse to add tokens to a cache that was made otherwise.

    Raises:
        FingerprintMismatch: one line that names every differing key with both values.
    """
    differing = differences(
        {**found.covers, "shard_size": found.shard_size}, {**covers, "shard_size": shard_size}
    )
    if differing:
        raise FingerprintMismatch(
            f"{out}: holds a cache made otherwise: {differing}; "
            "use the same settings, or another folder"
        )


def canonical(values: Any) -> bytes:
    """As JSON: of equal values the same bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
