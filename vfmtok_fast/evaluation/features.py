"""Features for FID, sFID, IS, precision and recall, from the Inception network of 2015.

The network is torch-fidelity's, which resizes and pools like TensorFlow's graph. The user names the
file with its weights; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import read_tensors
from ..hub import check_tensors
from ..tf32 import computing
from .metrics import Moments

# The published conversion of the graph; torch-fidelity and pytorch-fid offer the same weights.
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"
# Of the features of mixed_6/conv, channels x 17 x 17, sFID takes the first channels.
SPATIAL_CHANNELS = 7


class Inception:
    """InceptionV3 with the outputs that ADM compares.

    Args:
        weights: a file such as `PUBLISHED`. None: seeded random weights, whose metrics only test
            the arithmetic and mean nothing else.
        device: device to compute on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights are those of another network, or torch-fidelity is not installed.
    """

    # Number of features of each kind.
    sizes: ClassVar = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        network = _untrained_network()
        if weights is None:
            self.described = {"weights": "random weights", "seed": 0}
        else:
            path = Path(os.path.expanduser(weights))
            _load(network, path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.described = {"weights": path.name, "sha256": digest}
        self.network = network.eval().requires_grad_(False).to(self.device)
        self._spatial: Tensor | None = None
        # mixed_6/conv of the graph, after its ReLU.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output

    @torch.no_grad()
    def __call__(self, pictures: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Compute the features of images.

        Args:
            pictures: uint8 [B, H, W, 3], any size; resized to 299 as in the graph.

        Returns:
            pool_3 float32 [B, 2048]; the first 7 channels of mixed_6/conv float32 [B, 17 * 17 * 7],
            channels last, as in published statistics.
        """
        planes = torch.as_tensor(pictures).permute(0, 3, 1, 2).to(self.device)
        with computing(self.device, tf32=False):
            (pool,) = self.network(planes)
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._spatial = None
        return pool, spatial

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """Map pool_3 [N, 2048] to logits without bias [N, 1008], as IS takes them."""
        with computing(self.device, tf32=False):
            return pool.to(self.device) @ self.network.fc.weight.T


def _untrained_network() -> nn.Module:
    """The network with weights that only seed 0 determines, scaled so that no layer dies out."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("FID and its like need Inception: pip install 'vfmtok-fast[eval]'")
    # Imported here because it imports torchvision, which imports Triton.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            """Load nothing: the constructor requires a file and reads it as a pickle."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network("inception", ["2048"], feature_extractor_weights_path=nothing)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network


def _load(network: nn.Module, path: Path) -> None:
    """Load the weights strictly, but ignore the batch norm counters that some files have."""
    tensors = read_tensors(path, (), "Inception")
    needed, counters = {}, []
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            counters.append(name)
        else:
            needed[name] = tuple(value.shape)
    try:
        check_tensors(tensors, needed, "Inception", counters)
    except ValueError as error:
        raise ValueError(f"{error}; expected the weights of {PUBLISHED}") from error
    kept = {name: tensors[name].float() for name in needed}
    nn.Module.load_state_dict(network, kept, strict=False)


class Activations:
    """Features of images that arrive in batches, and hashes that identify the images.

    Attributes:
        moments: moments of the "pool" and the "spatial" features.
        hashes: a hash of each image, to compare sets of images.
    """

    def __init__(self, inception: Inception):
        self.inception = inception
        self.moments = {"pool": Moments(), "spatial": Moments()}
        self.hashes: set[bytes] = set()
        self._digest = hashlib.sha256()
        self._pool: list[Tensor] = []

    def add(self, pictures: np.ndarray) -> None:
        """Add images, uint8 [B, H, W, 3]."""
        pictures = np.ascontiguousarray(pictures)
        for picture in pictures:
            self._digest.update(picture)
            self.hashes.add(hashlib.sha256(picture).digest())
        pool, spatial = self.inception(pictures)
        self.moments["pool"].add(pool)
        self.moments["spatial"].add(spatial)
        self._pool.append(pool.cpu())

    @property
    def pool(self) -> Tensor:
        """pool_3 of all images, float32 [N, 2048] on the CPU."""
        return torch.cat(self._pool)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of all images in order."""
        return self._digest.hexdigest()
