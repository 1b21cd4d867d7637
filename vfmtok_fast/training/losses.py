"""The losses of the tokenizer, each with its formula and source.

Images are [B, 3, S, S] in about [-1, 1] and are never clamped. The quantizer computes the codebook,
commitment and entropy losses (`vfmtok_fast.tokenizer.quantizer`); at weight 0 it skips the entropy.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import read_tensors
from ..errors import first_line
from ..hub import check_tensors, load_checked

PIXEL = {"l2": F.mse_loss, "l1": F.l1_loss}


def semantic_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over patches of 1 - cos(predicted, target), with norms of at least 1e-6.

    Args:
        predicted, target: [B, patches, C], features of the token decoder and the foundation model.

    Source: VFMTok, arXiv 2507.08441, section 3.2.
    """
    wide = predicted if predicted.dtype == torch.float64 else predicted.float()
    return (1 - F.cosine_similarity(wide, target.to(wide.dtype), dim=-1, eps=1e-6)).mean()


def softplus_generator_loss(fake: Tensor) -> Tensor:
    """Mean of softplus(-fake) = -log sigmoid(fake), the non-saturating loss of arXiv 1406.2661."""
    return F.softplus(-fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake), from Geometric GAN, arXiv 1705.02894."""
    return -fake.mean()


def vanilla_generator_loss(fake: Tensor) -> Tensor:
    """Mean of log(1 - sigmoid(fake)) = -softplus(fake), the minimax game of arXiv 1406.2661."""
    return -F.softplus(fake).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, from Geometric GAN, arXiv 1705.02894."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean softplus(-real) + mean softplus(fake)) / 2: cross-entropy, arXiv 1406.2661.

    The non-saturating game uses the same loss; only its generator's loss differs.
    """
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


# The generator's losses, as functions of the reconstructions' logits.
GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": softplus_generator_loss,
    "non-saturating": softplus_generator_loss,
    "hinge": hinge_generator_loss,
    "vanilla": vanilla_generator_loss,
}
# The discriminator's losses, as functions of the logits of images and of their reconstructions.
DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_discriminator_loss,
    "vanilla": vanilla_discriminator_loss,
    "non-saturating": vanilla_discriminator_loss,
}


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, scale: float = 1.0
) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, at most 1e4.

    Args:
        reconstruction: the pixel and perceptual loss, a scalar with its autograd graph.
        adversarial: the generator's loss.
        last_layer: the weight whose gradients are compared.
        scale: loss scale in the backward passes of both losses, as float16 needs; it is divided out
            of the result. If these gradients overflow, those of the step do too, and the weight
            does not matter.

    Source: VQGAN, arXiv 2012.09841, section 3.1.
    """
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(scale * loss.float(), last_layer, retain_graph=True)[0].norm() / scale
        for loss in (reconstruction, adversarial)
    )
    weight = (of_reconstruction / (of_adversarial + 1e-4)).clamp(max=1e4)
    return weight if scale == 1 else weight.nan_to_num(0.0)


class LPIPS(nn.Module):
    """Learned perceptual distance: weighted squared differences of unit VGG16 features.

    Let f_l(x) be the features after the last ReLU of VGG16's stage l, scaled to unit length over
    channels. The distance is the sum over l of the mean over pixels of the sum over channels of w_l
    (f_l(x) - f_l(y))^2. The weights are frozen and random; `from_files` reads real ones.

    Args:
        dropout: rate of dropout on the squared differences, in training mode. The authors' run has
            0.5, because `train()` on their loss turned it on; the metric's own author says to use
            none.

    Source: arXiv 1801.03924, the `lpips` package's net="vgg", version 0.1.
    """

    # Channels and convolutions of VGG16's five stages.
    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        layers: list[nn.Module] = []
        self.ends, before = [], 3
        for width, count in self.STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # numbered as in torchvision
        self.weights = nn.ParameterList(torch.rand(width) for width, _ in self.STAGES)
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] between images [B, 3, H, W] in about [-1, 1], at least 16 pixels a side."""
        return self.parts(x, y).sum(dim=1)

    def parts(self, x: Tensor, y: Tensor) -> Tensor:
        """The five terms of the sum, [B, 5]."""
        if x.is_cuda:  # The layout that cuDNN's convolutions prefer and the pixel decoder returns.
            x, y = (one.contiguous(memory_format=torch.channels_last) for one in (x, y))
        terms = []
        for weight, a, b in zip(self.weights, self._read(x), self._read(y), strict=True):
            square = F.dropout((a - b).square(), self.dropout, self.training)
            terms.append((square * weight.view(-1, 1, 1)).sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(terms, dim=1)

    def _read(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                # Under autocast the features are in half precision, where their squares overflow.
                wide = x if x.dtype == torch.float64 else x.float()
                # If all features are 0, the gradient of this norm is 0; that of an explicit square
                # root is NaN.
                found.append(wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + 1e-10))
        return found

    @classmethod
    def from_files(
        cls,
        vgg16: str | Path | Mapping | None = None,
        linear: str | Path | Mapping | None = None,
        dropout: float = 0.0,
    ) -> Self:
        """Read the weights.

        Args:
            vgg16: torchvision's VGG16 file (``features.*``), a file of the `lpips` package's model
                (``net.slice*``), or the mapping in either; None downloads torchvision's file once.
            linear: the `lpips` package's ``vgg.pth`` (``lin0.model.1.weight`` to ``lin4...``) or
                the mapping in it; None takes the one in the installed package.
            dropout: see the class; the model is in eval mode only if this is 0.

        Raises:
            ValueError: entries are missing, misshapen or NaN (all are named), or the file is not a
                checkpoint.
            FileNotFoundError: there is no such file or no `lpips` package, or the download failed.
        """
        model = cls(dropout)
        content = _vgg16_of_torchvision() if vgg16 is None else vgg16
        found = _chosen(content, r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", "VGG16")
        load_checked(model.features, found, "LPIPS: VGG16")

        content = _linear_of_package() if linear is None else linear
        shapes = {str(i): (1, width, 1, 1) for i, (width, _) in enumerate(cls.STAGES)}
        found = _chosen(content, r"lin(\d)\.model\.1\.weight", "linear layers")
        check_tensors(found, shapes, "LPIPS: linear layers")
        for name, weight in found.items():
            model.weights[int(name)].data.copy_(weight.flatten())
        return model.train(dropout > 0)


def _chosen(source: str | Path | Mapping, pattern: str, what: str) -> dict[str, Tensor]:
    """Return the entries whose whole name matches a pattern, keyed by the pattern's group."""
    tensors = read_tensors(source, ("state_dict", "model"), f"LPIPS: {what}")
    matches = ((re.fullmatch(pattern, key), value) for key, value in tensors.items())
    return {match[1]: value for match, value in matches if match}


def _vgg16_of_torchvision() -> Mapping:
    # torchvision imports Triton, which importing this package should not.
    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"LPIPS: cannot download {weights.url} ({first_line(error)}); download it on a machine "
            "with a network and pass its path as vgg16 (--vgg16)"
        ) from error


def _linear_of_package() -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "LPIPS: the lpips package, which holds its linear layers, is not installed: pip "
            "install 'vfmtok-fast[train]', or pass its vgg.pth as linear (--lpips-linear)"
        )
    return Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
