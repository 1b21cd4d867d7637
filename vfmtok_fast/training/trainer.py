"""What both trainers have: a learner, its average, a step's random numbers, and a state."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.format.differences import differences
from ..tf32 import computing
from . import processes
from .clock import Clock
from .learner import Average, Learner
from .settings import Training

Sums = dict[str, Tensor]
# Of float16. Where gradients are infinite even then it is not the scale's fault.
SMALLEST_SCALE = 2.0**-14
# What to do about a run that is another one now.
ACCEPT = "to resume anyway: --accept-changes, or changed=True"


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite; no weight has moved."""


class Trainer:
    """Trains a model; `TokenizerTrainer` and `GPTTrainer` say by which losses.

    Args:
        model: on the device to train on.
        settings: how.
        frozen: a part of the model that does not learn, and which no state holds.
        sharded: among several processes each holds a part of each weight (FSDP2).

    Attributes:
        model: what is trained.
        learner: its weights and their optimiser.
        steps, images: how many of each it was trained on.
        clock: where the time of the steps has gone.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Training,
        *,
        frozen: str | None = None,
        sharded: bool = False,
    ) -> None:
        self.model, self.settings, self.sharded = model, settings, sharded
        self.device: torch.device = model.device
        self.tf32 = settings.precision != "float32"
        self.clock = Clock(self.device)
        self.steps = self.images = 0
        self._frozen = frozen
        processes.share_first(self._learned(model).values())
        shared = None if frozen is None else getattr(model, frozen)
        self.average = Average(model, settings.ema, shared)
        if sharded:
            whole = [] if shared is None else list(shared.parameters())
            for one in (model, self.average.model):
                processes.shard(one, self.layers(one), whole)
        for layer in self.layers(model) if settings.compile else ():
            layer.compile()
        self.learner = Learner(model, settings, decays=self.decays)
        self.average.begin(self.learner)

    @property
    def ema(self) -> nn.Module:
        """A model with the averaged weights, in eval mode."""
        return self.average.model

    @property
    def learners(self) -> dict[str, Learner]:
        """What learns, by the name of its gradients' norm."""
        return {"grad_norm": self.learner}

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """What is compiled on its own, and of a sharded model brought together on its own."""
        raise NotImplementedError

    def decays(self, weight: Tensor) -> bool:
        """Whether weight decay acts on a weight."""
        return True

    @contextlib.contextmanager
    def _step(self, number: int) -> Iterator[None]:
        """What a step computes in: its random numbers, and TF32 or not.

        Random numbers are a step's own, on each process others; afterwards all is as it was.
        """
        text = f"vfmtok_fast training {self.settings.seed} {number} {processes.rank()}"
        digest = hashlib.sha256(text.encode()).digest()
        devices = [self.device.index] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), computing(self.device, self.tf32):
            torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            yield

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.autocast
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _finite(self, sums: Sums, number: int) -> dict[str, float]:
        """The terms of a step, averaged over the processes.

        Of float16 gradients may be infinite: then the scale was too large, and goes down.
        """
        values = torch.stack([value.double() for value in sums.values()])
        processes.average([values])  # a NaN of one process stops all
        terms = dict(zip(sums, values.tolist(), strict=True))
        wrong = [
            f"{name} ({value})"
            for name, value in terms.items()
            if not math.isfinite(value) and not self._scaled(name)
        ]
        if wrong:
            for learner in self.learners.values():
                learner.forget()
            raise NotFinite(f"step {number}: not finite: {', '.join(wrong)}")
        return terms

    def _scaled(self, name: str) -> bool:
        """Whether a term is the norm of gradients whose scale can still go down."""
        if self.settings.precision != "float16" or name not in self.learners:
            return False
        return self.learners[name].scaler.get_scale() > SMALLEST_SCALE

    def left_out(self, terms: Mapping[str, list[float]]) -> dict[str, int]:
        """Of float16, how many of some steps moved nothing, for their gradients were infinite."""
        if self.settings.precision != "float16":
            return {}
        return {"left_out": sum(not math.isfinite(norm) for norm in terms["grad_norm"])}

    def report(self) -> dict[str, float]:
        """What is told beside the terms of the steps; counts what came since the last time."""
        return {}

    def rates(self, images_per_second: float) -> dict[str, float]:
        """How fast it goes, in the units that people ask for."""
        return {"images_per_second": images_per_second}

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on, but for the frozen parts, which come with the models.

        Of a sharded model all processes must ask.
        """
        return {
            "settings": dataclasses.asdict(self.settings),
            "config": dataclasses.asdict(self.model.config),
            "steps": self.steps,
            "images": self.images,
            "model": self._learned(self.model),
            "ema": self._learned(self.ema),
            "optimizer": self.learner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, changed: bool = False) -> None:
        """Go on where a state was taken.

        Args:
            state: from `state_dict`.
            changed: settings may be others than those of the state, and count.

        Raises:
            ValueError: another model or changed settings; the line names all that differ.
        """
        there, here = dict(state["settings"]), dataclasses.asdict(self.settings)
        configs = dict(state["config"]), dataclasses.asdict(self.model.config)
        for config, settings in zip(configs, (there, here), strict=True):
            # Rates of dropout stand in the model's config, and change none of its weights.
            for name in [name for name in config if _is_rate(name)]:
                settings[name] = config.pop(name)
        if problems := differences(*configs):
            raise ValueError(f"resuming: the model differs: {problems}")
        if (problems := differences(there, here)) and not changed:
            raise ValueError(f"resuming: settings have changed: {problems}; {ACCEPT}")
        self._load_learned(self.model, state["model"])
        self._load_learned(self.ema, state["ema"])
        self.learner.load_state_dict(state["optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    def averaged(self) -> nn.Module:
        """`ema`, as `whole` gives it."""
        return self.whole(self.ema)

    def whole(self, model: nn.Module) -> nn.Module:
        """A model; of a sharded one a whole copy, for which all processes must ask."""
        if not self.sharded:
            return model
        weights = {key: processes.whole(value) for key, value in model.state_dict().items()}
        copy = type(model)(model.config)
        copy.load_state_dict(weights)
        return copy.to(self.device).eval()

    def _learned(self, model: nn.Module) -> dict[str, Tensor]:
        return {key: processes.whole(value) for key, value in self._named(model).items()}

    def _load_learned(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        own = self._named(model)
        if other := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(
                f"resuming: the run is from another version, whose weights have other names: "
                f"{', '.join(other[:4])}{' ...' if len(other) > 4 else ''}; start a new run"
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(processes.as_part_of(value, tensors[key]))

    def _named(self, model: nn.Module) -> dict[str, Tensor]:
        frozen = () if self._frozen is None else (f"{self._frozen}.",)
        return {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}


def _is_rate(field: str) -> bool:
    """Whether a field of a model's config is a rate of dropout."""
    return field.endswith("dropout") or field == "drop_path"


def add(sums: Sums, terms: Mapping[str, Tensor], share: float) -> None:
    """Add a micro-batch's terms by its share of the batch."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + share * value.detach()
