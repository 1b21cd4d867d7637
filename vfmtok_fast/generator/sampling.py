"""Settings for sampling the codes of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..decoding import row_of
from ..functional import guided_logits
from ..ops.checks import check_int, check_number
from ..ops.sample_token import check_sampling


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; `Generator.generate` documents them."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    cfg_power: float | None = None

    @classmethod
    def of(cls, who: str, settings: Mapping[str, Any]) -> Sampling:
        """Build the settings from a user's keyword arguments."""
        known = cls.__dataclass_fields__
        if unknown := [name for name in settings if name not in known]:
            raise TypeError(
                f"{who}: unknown setting {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return cls(**settings)

    def check(self) -> None:
        """Raise a one-line error for a setting out of range."""
        check_sampling(
            "generate", cfg_scale=self.cfg_scale, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p,
        )  # fmt: skip
        if not isinstance(self.greedy, bool):
            raise TypeError(f"generate: greedy must be True or False, got {self.greedy!r}")
        check_int("generate", "seed", self.seed, 2**64)
        check_int("generate", "cfg_interval", self.cfg_interval, 2**31, -1)
        if self.cfg_power is not None:
            check_number("generate", "cfg_power", self.cfg_power)
            if not 0 < self.cfg_power < 1e9:
                raise ValueError(f"generate: cfg_power must be in (0, 1e9), got {self.cfg_power}")

    def guided(self, step: int) -> bool:
        """Whether code ``step`` is guided; step s is the release's decode step s - 1."""
        return self.cfg_scale != 1.0 and (self.cfg_interval == -1 or step - 1 <= self.cfg_interval)

    def scales(self, steps: int, device: torch.device) -> Tensor | None:
        """The guidance scales of all codes, [steps] float32; None if they are equal."""
        if self.cfg_power is None:
            return None
        share = torch.arange(steps, dtype=torch.float32, device=device) / steps
        share = share**self.cfg_power
        return 1 + (self.cfg_scale - 1) * (1 - torch.cos(math.pi * share)) / 2

    def draw(
        self, logits: Tensor, image_ids: Tensor, step: int | Tensor,
        scales: Tensor | None = None, seed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw one code per image, [B]; logit rows beyond the first B are unconditional.

        Args:
            logits: [B or 2 B, V].
            image_ids: [B].
            step: which code this is.
            scales: the result of `scales`.
            seed: overrides ``self.seed``.
        """
        B = len(image_ids)
        settings = {k: v for k, v in vars(self).items() if k not in ("cfg_interval", "cfg_power")}
        if seed is not None:
            settings["seed"] = seed
        logits, uncond = logits[:B], logits[B:] if len(logits) > B else None
        if uncond is not None and scales is not None:
            logits, uncond = guided_logits(logits, uncond, row_of(scales, step)), None
        return ops.sample_token(logits, image_ids, step, uncond_logits=uncond, **settings)
