"""Settings for sampling the codes of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import ops
from ..ops.checks import check_int
from ..ops.sample_token import check_sampling


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; `GPT.generate` documents them."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

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

    def guided(self, step: int) -> bool:
        """Whether code ``step`` is guided; step s is the release's decode step s - 1."""
        return self.cfg_scale != 1.0 and (self.cfg_interval == -1 or step - 1 <= self.cfg_interval)

    def draw(
        self, logits: Tensor, image_ids: Tensor, step: int | Tensor, seed: Tensor | None = None
    ) -> Tensor:
        """Draw one code per image, [B]; logit rows beyond the first B are unconditional.

        ``seed`` overrides ``self.seed``.
        """
        B = len(image_ids)
        settings = {k: v for k, v in vars(self).items() if k != "cfg_interval"}
        if seed is not None:
            settings["seed"] = seed
        uncond = logits[B:] if len(logits) > B else None
        return ops.sample_token(logits[:B], image_ids, step, uncond_logits=uncond, **settings)
