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
from ..hub import HubModel
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
        reconstruction: [B, 3, S, S], as large as the images that came in and comparable with them;
            about [-1, 1], not clamped.
        semantic: predicted features [B, 576, backbone dim], or None.
        features: the foundation model's last map, its target, [B, 576, backbone dim], no gradient;
            576 is the grid's square, whatever size the foundation model read.
        codes: int64 [B, R].
        queries: what they were found for, unit vectors [B, R, codebook dim].
        codebook_loss, commit_loss, entropy_loss: scalars, weights included.
    """

    reconstruction: Tensor
    semantic: Tensor | None
    features: Tensor
    codes: Tensor
    queries: Tensor
    codebook_loss: Tensor
    commit_loss: Tensor
    entropy_loss: Tensor


# What the pixel decoder's maps may take: 14 pictures of 336 pixels in half precision.
_PIECE_BYTES = 2**31
# Pictures of a call that is recorded. An H200's host takes 24 ms to launch an encode and 70 ms a
# decode of 64, whose kernels take 52 and 54 ms; more of them would keep more memory than 2 GiB.
_REPLAYED = 64
# What `probe_features` gives.
PROBED = ("semantic-class", "regions", "codes")
# Ops of the two ways, which must be enabled for it: their kernels wait for nothing on the host.
ENCODE_OPS = frozenset(["add_norm", "deformable_sample", "linear", "nearest_code", "patch_embed"])
DECODE_OPS = frozenset(["add_norm", "group_norm_silu", "linear", "residual_block", "upsample_conv"])


class VFMTok(HubModel, library_name="vfmtok_fast", tags=["vfmtok"]):
    """The tokenizer, with random weights; see `from_official` and `from_pretrained` for others.

    Shapes in the docstrings are those of the default config: 336 stands for ``image_size``, at
    which images come and go whatever size the backbone reads, 576 for ``feature_grid`` squared, 256
    for ``num_regions``.

    Args:
        config: a `VFMTokConfig`, or its fields as a mapping.

    Raises:
        ValueError: a backbone whose map the decoder cannot serve.
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
        # Whether float32 products may take TF32 on a GPU, see `set_precision`.
        self.tf32 = False
        self._graphs = {what: Replayed(what) for what in ("encode", "decode")}

    @property
    def dtype(self) -> torch.dtype:
        """Of all that follows the backbone; images in it need no conversion. See `precision`."""
        return self.quantizer.codebook.dtype

    @property
    def precision(self) -> str:
        """One of float32, tf32, float16, bfloat16, mixed; after casts by hand also another."""
        return precision_of(self)

    def set_precision(self, precision: str) -> Self:
        """Choose in what `encode` and `decode` compute; returns the model itself.

        Args:
            precision: "float32" is exact and the default. "tf32" lets a GPU round float32 products
                to 10 bits, in `encode` and `decode`, whatever the process has set, and attend in
                float16, which has as many bits and ends at 65,504. "float16" and "bfloat16" cast
                all weights. "mixed" casts those of the backbone's products to float16 and leaves
                all else, the stream between them too, in float32, on a GPU as in "tf32".

        Raises:
            ValueError: no such precision, weights that were rounded already, or "mixed" with a
                backbone that is no plain ViT.
        """
        set_precision(self, precision)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are, and inputs must be."""
        return self.quantizer.codebook.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images.

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
        """Images as for `encode` to what precedes quantisation.

        Returns:
            Unit queries [B, 256, 12] and the foundation model's last map [B, 576, 1024].
        """
        check_images("VFMTok", images, self.config.image_size, self.device)
        with computing(self.device, self.tf32):
            maps = self.backbone(images)
            return self.quantizer.queries(self.region_encoder(maps)), maps[-1]

    @torch.no_grad()
    def probe_features(self, images: Tensor, which: str = "semantic-class") -> Tensor:
        """One vector an image, for linear probes and nearest neighbours.

        Args:
            images: as for `encode`.
            which: "semantic-class", the class token of the token decoder's pass towards the
                foundation model's features, which the authors probe, [B, 512]; "regions", the mean
                of the region features before quantisation, [B, 512]; "codes", the codebook vectors
                of the 256 codes side by side, [B, 256 * 12].

        Returns:
            [B, D] in the model's dtype.

        Raises:
            TypeError, ValueError: images as `encode` refuses them, or no such features.

        Source: the class token is what the release's issue 2 says was probed.
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
        """Codes to images.

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
        """Codes to 8-bit pictures, resized and rounded as the release does for evaluation.

        Args:
            codes: as for `decode`.
            size: side of the pictures in pixels.

        Returns:
            uint8 [B, size, size, 3].
        """
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"decode_to_uint8: size must be at least 1 and whole, got {size}")
        images = F.interpolate(self.decode(codes).float(), size=(size, size), mode="bicubic")
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def forward(self, images: Tensor, *, semantic: bool | None = None) -> VFMTokOutput:
        """Reconstruct images, with every term that the training losses need.

        The codebook receives its gradient through ``codebook_loss``, the encoder straight through
        the quantiser; the backbone is frozen. Region encoder and quantizer are out of autocast's
        reach: the authors keep float32 in the encoder's attention, and search codes in half
        precision, which gives 3 % of the queries another code.

        Args:
            images: as for `encode`; at least one, or the losses would be NaN.
            semantic: predict the foundation model's features; None does in training mode only.
        """
        check_images("VFMTok", images, self.config.image_size, self.device)
        if images.shape[0] == 0:
            raise ValueError("VFMTok: images must hold at least one picture, got none")
        maps = self.backbone(images)
        with torch.autocast(self.device.type, enabled=False):
            regions = self.region_encoder([level.to(self.dtype) for level in maps])
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
        """Where each region looks; see `RegionEncoder.sampling_points`."""
        check_images("VFMTok", images, self.config.image_size, self.device)
        return self.region_encoder.sampling_points(self.backbone(images))

    def _codes(self, images: Tensor) -> Tensor:
        queries = self.quantizer.queries(self.region_encoder(self.backbone(images)))
        return self.quantizer.nearest(queries)

    def _replayed(self, what: str, fn: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """``fn(given)``; of few pictures on a GPU, with the ops enabled, as a CUDA graph."""
        if (
            self.device.type != "cuda"
            or not 0 < len(given) <= _REPLAYED
            or not switch.policy().ops >= (ENCODE_OPS if what == "encode" else DECODE_OPS)
            or self.training
            or torch.is_autocast_enabled("cuda")
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
            or (what == "encode" and not self.backbone.is_plain)  # takes longest to ask
        ):
            return fn(given)
        return self._graphs[what](fn, self, given)

    def _pictures(self, codes: Tensor) -> Tensor:
        return self._decode_vectors(self.quantizer.lookup(codes.long()))

    def _decode_vectors(self, vectors: Tensor) -> Tensor:
        maps = self.token_decoder.pixel_map(self.token_decoder.regions(vectors))
        # A few pictures at a time: their maps are large, and no faster for being many.
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

        None for ``tokenizer`` or ``backbone`` downloads what is published.
        """
        if tokenizer is None:
            tokenizer = fetch_official("tokenizer", "tokenizer=")
        check_there(tokenizer, "tokenizer")
        check_there(backbone, "backbone")
        return load_tokenizer(cls(config), tokenizer, backbone)
