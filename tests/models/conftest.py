"""What the models' tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vfmtok_fast import GPT


def _guided_logits(
    model: GPT, codes: Tensor, classes: Tensor, scale: float, interval: int
) -> Tensor:
    """Teacher-forced logits as `generate` mixes them at every step."""
    with torch.no_grad():
        conditional = model(codes, classes)
        none = torch.full_like(classes, model.config.num_classes)
        unconditional = model.predict(model.embed(none, codes[:, :-1].long()))
    mixed = unconditional + scale * (conditional - unconditional)
    step = torch.arange(codes.shape[1])[:, None]
    return torch.where((interval > -1) & (step > interval + 1), conditional, mixed)


@pytest.fixture(scope="session")
def guided_logits() -> Callable[..., Tensor]:
    """``guided_logits(gpt, codes, classes, scale, interval)``, an oracle without `generate`."""
    return _guided_logits
