"""VFMTok: image to 256 codes, codes to image (arXiv 2507.08441)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import switch
from ..checkpoint import check_there, fetch_official, load_tokenizer
from ..checks import check_codes, check_images, watch_images
from ..configs import config_from_mapping
from ..graphs import Replayed
from ..hub import HubModel, unfilled
from ..ops.checks import unwrapped
from ..tf32 import computing
from .backbone import Backbone
from .config import VFMTokConfig
from .pixel_decoder import PixelDecoder
from .precision import precision_of, set_precision
from .quantizer import Quantizer
from .region_encoder import RegionEncoder
from .token_decoder import TokenDecoder


@dataclass
class VFMTokOutput:
    """What `VFMTok.forward` returns.

    Attributes:
        reconstruction: [B, 3, S, S], the same size and range as the input images: about [-1, 1],
            not clamped.
        semantic: predicted features [B, 576, backbone dim], or None.
        features: the foundation model's last map, which ``semantic`` predicts, [B, 576, backbone
            dim], without gradient. 576 is the square of the grid, whatever size the foundation
            model read.
        codes: int64 [B, R].
        queries: unit vectors [B, R, codebook dim] whose nearest codes are ``codes``.
        codebook_loss, commit_loss, entropy_loss: scalars, including their weights.
    """

    reconstruction: Tensor
    semantic: Tensor | None
    features: Tensor
    codes: Tensor
    queries: Tensor
    codebook_loss: Tensor
    commit_loss: Tensor
    entropy_loss: Tensor


# Memory limit of the pixel decoder's maps: 14 images of 336 pixels in half precision.
_PIECE_BYTES = 2**31
# The largest batch that is captured as a CUDA graph. For 64 images, an H200's host takes 24 ms to
# launch an encode and 70 ms to launch a decode, whose kernels take 52 and 54 ms. Graphs of larger
# batches would hold more than 2 GiB of memory.
_REPLAYED = 64
# The features that `probe_features` returns.
PROBED = ("semantic-class", "regions", "codes")
# Ops that must be enabled to capture `encode` and `decode`: their kernels wait for nothing on the
# host.
ENCODE_OPS = frozenset(["add_norm", "deformable_sample", "linear", "nearest_code", "patch_embed"])
DECODE_OPS = frozenset(["add_norm", "group_norm_silu", "linear", "residual_block", "upsample_conv"])


class VFMTok(HubModel, library_name="vfmtok_fast", tags=["vfmtok"]):
    """The tokenizer, with random weights; `from_official` and `from_pretrained` load trained ones.

    Shapes in the docstrings are those of the default config: 336 stands for ``image_size``, the
    size of input and output images whatever size the backbone reads, 576 for ``feature_grid``
    squared, and 256 for ``num_regions``.

    Args:
        config: a `VFMTokConfig`, or its fields as a mapping.

    Raises:
        ValueError: a backbone whose map has a size that the decoder cannot use.
    """

    shipped_as = "tokenizer"

    def __init__(self, config: VFMTokConfig | Mapping | None = None):
        super().__init__()
        config = VFMTokConfig() if config is None else config
        if isinstance(config, Mapping):
            config = config_from_mapping(VFMTokConfig, config)
        if not isinstance(config, VFMTokConfig):
            raise TypeError(
                f"VFMTok: config must be a VFMTokConfig or its fields, got {type(config).__name__}"
            )
        self.config = config
        self.backbone = Backbone(config.backbone, config.feature_grid)
        self.region_encoder = RegionEncoder(config, self.backbone.dim)
        self.quantizer = Quantizer(config)
        self.token_decoder = TokenDecoder(config, self.backbone.dim)
        self.pixel_decoder = PixelDecoder(config)
        # Whether float32 products may use TF32 on a GPU, see `set_precision`.
        self.tf32 = False
        self._graphs = {what: Replayed(what) for what in ("encode", "decode")}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything after the backbone; images in it need no conversion.

        See `precision`.
        """
        return self.quantizer.codebook.dtype

    @property
    def precision(self) -> str:
        """One of float32, tf32, float16, bfloat16, mixed; manual casts may give another."""
        return precision_of(self)

    def set_precision(self, precision: str) -> Self:
        """Choose the precision of `encode` and `decode`; returns the model itself.

        Args:
            precision: "float32" is exact and the default. "tf32" lets a GPU round float32 products
                to 10 bits in `encode` and `decode`, whatever the process has set, and run attention
                in float16, which has as many bits and a maximum of 65,504. "float16" and "bfloat16"
                cast all weights. "mixed" casts the weights of the backbone's products to float16
                and keeps everything else in float32, including the residual stream between them; on
                a GPU, float32 products then run as in "tf32".

        Raises:
            ValueError: no such precision, weights that have already been rounded, or "mixed" with a
                backbone that is no plain ViT.
        """
        set_precision(self, precision)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the weights, where inputs must be."""
        return self.quantizer.codebook.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images into codes.

        Args:
            images: [B, 3, 336, 336] floating, in [-1, 1], on the model's device.

        Returns:
            int64 [B, 256].

        Raises:
            TypeError: not a floating tensor.
            ValueError: wrong shape, device or range, or NaN.
        """
        finish = watch_images("VFMTok", images, self.config.image_size, self.device)
        with computing(self.device, self.tf32):
            codes = self._replayed("encode", self._codes, images)
        finish()
        return codes

    @torch.no_grad()
    def encode_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turn images, as for `encode`, into what precedes quantisation.

        Returns:
            Unit queries [B, 256, 12] and the foundation model's last map [B, 576, 1024].
        """
        check_images("VFMTok", images, self.config.image_size, self.device)
        with computing(self.device, self.tf32):
            maps = self.backbone(images)
            return self.quantizer.queries(self.region_encoder(maps)), maps[-1]

    @torch.no_grad()
    def probe_features(self, images: Tensor, which: str = "semantic-class") -> Tensor:
        """Return one vector per image, for linear probes and nearest neighbours.

        Args:
            images: as for `encode`.
            which: "semantic-class" is the class token of the token decoder's pass that predicts the
                foundation model's features, [B, 512]; the authors probe this one. "regions" is the
                mean of the region features before quantisation, [B, 512]. "codes" is the codebook
                vectors of the 256 codes, concatenated, [B, 256 * 12].

        Returns:
            [B, D] in the model's dtype.

        Raises:
            TypeError, ValueError: images that `encode` refuses, or no such features.

        Source: the release's issue 2 says that the class token was probed.
        """
        if which not in PROBED:
            raise ValueError(
                f"probe_features: which must be one of {', '.join(PROBED)}, got {which!r}"
            )
        check_images("VFMTok", images, self.config.image_size, self.device)
        with computing(self.device, self.tf32):
            regions = self.region_encoder(self.backbone(images))
            if which == "regions":
                return regions.mean(dim=1)
            vectors = self.quantizer.lookup(self.quantizer.nearest(self.quantizer.queries(regions)))
            if which == "codes":
                return vectors.flatten(1)
            return self.token_decoder.semantic_class(self.token_decoder.regions(vectors))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into images.

        Args:
            codes: [B, 256] integers in [0, codebook_size), on the model's device.

        Returns:
            [B, 3, 336, 336], about [-1, 1], not clamped.

        Raises:
            TypeError: not an integer tensor.
            ValueError: wrong shape, device or range.
        """
        R, K = self.config.num_regions, self.config.codebook_size
        check_codes("VFMTok", codes, R, K, self.device)
        with computing(self.device, self.tf32):
            return self._replayed("decode", self._pictures, codes)

    @torch.no_grad()
    def decode_to_uint8(self, codes: Tensor, size: int = 256) -> Tensor:
        """Turn codes into 8-bit images, resized and rounded as the release does for evaluation.

        Args:
            codes: as for `decode`.
            size: side of the images in pixels.

        Returns:
            uint8 [B, size, size, 3].
        """
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"decode_to_uint8: size must be at least 1 and whole, got {size}")
        images = F.interpolate(self.decode(codes).float(), size=(size, size), mode="bicubic")
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def forward(self, images: Tensor, *, semantic: bool | None = None) -> VFMTokOutput:
        """Reconstruct images, and return every term that the training losses need.

        The codebook receives its gradient through ``codebook_loss``, the encoder through the
        straight-through quantiser; the backbone is frozen. The region encoder and quantizer run
        without autocast. The authors keep float32 in the encoder's attention, but search codes in
        half precision, which gives 3 % of the queries another code.

        Args:
            images: as for `encode`; at least one, or the losses would be NaN.
            semantic: whether to predict the foundation model's features; None does so in training
                mode only.
        """
        check_images("VFMTok", images, self.config.image_size, self.device)
        if images.shape[0] == 0:
            raise ValueError("VFMTok: images must hold at least one picture, got none")
        maps = self.backbone(images)
        with torch.autocast(self.device.type, enabled=False):
            regions = self.region_encoder(maps)
            queries = self.quantizer.queries(regions)
            quantized = self.quantizer(queries)
        regions = self.token_decoder.regions(quantized.vectors)
        semantic = self.training if semantic is None else semantic
        return VFMTokOutput(
            reconstruction=self.pixel_decoder(self.token_decoder.pixel_map(regions)),
            semantic=self.token_decoder.features(regions) if semantic else None,
            features=maps[-1],
            codes=quantized.codes,
            queries=queries,
            codebook_loss=quantized.codebook_loss,
            commit_loss=quantized.commit_loss,
            entropy_loss=quantized.entropy_loss,
        )

    @torch.no_grad()
    def sampling_points(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each region samples; see `RegionEncoder.sampling_points`."""
        check_images("VFMTok", images, self.config.image_size, self.device)
        return self.region_encoder.sampling_points(self.backbone(images))

    def _codes(self, images: Tensor) -> Tensor:
        queries = self.quantizer.queries(self.region_encoder(self.backbone(images)))
        return self.quantizer.nearest(queries)

    def _replayed(self, what: str, fn: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """Return ``fn(given)``; small batches on a GPU, with the ops enabled, use a CUDA graph."""
        if (
            self.device.type != "cuda"
            or not 0 < len(given) <= _REPLAYED
            or not switch.policy().ops >= (ENCODE_OPS if what == "encode" else DECODE_OPS)
            or self.training
            or torch.is_autocast_enabled("cuda")
            or torch.compiler.is_compiling()
            or unwrapped(given) is not given  # vmap has no rule for a replay.
            or torch.cuda.is_current_stream_capturing()
            or (what == "encode" and not self.backbone.is_plain)  # Last: the slowest check.
        ):
            return fn(given)
        return self._graphs[what](fn, self, given)

    def _pictures(self, codes: Tensor) -> Tensor:
        regions = self.token_decoder.regions(self.quantizer.lookup(codes.long()))
        maps = self.token_decoder.pixel_map(regions)
        if torch.compiler.is_exporting():  # The number of pieces would fix the batch size.
            return self.pixel_decoder(maps)
        # A few images at a time: their maps are large, and larger batches are no faster.
        pieces = maps.split(self.pixel_decoder.fitting(_PIECE_BYTES, maps.itemsize))
        return torch.cat([self.pixel_decoder(piece) for piece in pieces])

    @classmethod
    def from_official(
        cls,
        tokenizer: str | Path | Mapping | None = None,
        backbone: str | Path | Mapping | None = None,
        config: VFMTokConfig | Mapping | None = None,
    ) -> VFMTok:
        """Load the authors' files; see `vfmtok_fast.checkpoint.load_tokenizer`.

        If ``tokenizer`` or ``backbone`` is None, the published file is downloaded.
        """
        if tokenizer is None:
            tokenizer = fetch_official("tokenizer", "tokenizer=")
        check_there(tokenizer, "tokenizer")
        check_there(backbone, "backbone")
        return load_tokenizer(unfilled(cls, config), tokenizer, backbone)
