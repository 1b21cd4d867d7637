"""What both trainers share: a learner, its average, random numbers per step, and a state."""

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
# For float16. If gradients are infinite even at this scale, the scale is not the cause.
SMALLEST_SCALE = 2.0**-14
# How to continue a run whose settings have changed.
ACCEPT = "to resume anyway: --accept-changes, or changed=True"


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite; no weight has been updated."""


class Trainer:
    """Trains a model; `TokenizerTrainer` and `GPTTrainer` define the losses.

    Args:
        model: on the device to train on.
        settings: how to train.
        frozen: name of a part of the model that is not trained and not stored in a state.
        sharded: each of several processes holds a part of each weight (FSDP2).

    Attributes:
        model: the model that is trained.
        learner: its weights and their optimiser.
        steps, images: number of each that the model was trained on.
        clock: time spent in each stage of the steps.
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
        """The learners, keyed by the name of their gradient norm."""
        return {"grad_norm": self.learner}

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The parts that are compiled one by one and, in a sharded model, gathered one by one."""
        raise NotImplementedError

    def decays(self, weight: Tensor) -> bool:
        """Whether weight decay applies to a weight."""
        return True

    @contextlib.contextmanager
    def _step(self, number: int) -> Iterator[None]:
        """Set the random numbers and the TF32 mode of a step.

        Random numbers differ between steps and between processes. The previous state is restored
        afterwards.
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
        """Return the terms of a step, averaged over the processes.

        With float16, gradients may be infinite: the scale was too large and will be reduced.
        """
        values = torch.stack([value.double() for value in sums.values()])
        processes.average([values])  # a NaN in one process stops all
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
        """Whether a term is the norm of gradients whose scale can still be reduced."""
        if self.settings.precision != "float16" or name not in self.learners:
            return False
        return self.learners[name].scaler.get_scale() > SMALLEST_SCALE

    def left_out(self, terms: Mapping[str, list[float]]) -> dict[str, int]:
        """With float16, how many steps were skipped because their gradients were infinite."""
        if self.settings.precision != "float16":
            return {}
        return {"left_out": sum(not math.isfinite(norm) for norm in terms["grad_norm"])}

    def report(self) -> dict[str, float]:
        """Values to report beside the terms of the steps, counted since the last call."""
        return {}

    def rates(self, images_per_second: float) -> dict[str, float]:
        """The training speed, in the units that users expect."""
        return {"images_per_second": images_per_second}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step depends on, except the frozen parts, which come with the models.

        For a sharded model, all processes must call this.
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
        """Continue from a state.

        Args:
            state: from `state_dict`.
            changed: accept settings that differ from those of the state; the new ones apply.

        Raises:
            ValueError: the model or the settings differ; the message names everything that differs.
        """
        there, here = dict(state["settings"]), dataclasses.asdict(self.settings)
        configs = dict(state["config"]), dataclasses.asdict(self.model.config)
        for config, settings in zip(configs, (there, here), strict=True):
            # Dropout rates are in the model's config but do not change any of its weights.
            for name in list(config):
                if name.endswith("dropout") or name == "drop_path":
                    settings[name] = config.pop(name)
        if problems := differences(*configs):
            raise ValueError(f"resuming: the model differs: {problems}")
        if (problems := differences(there, here)) and not changed:
            raise ValueError(f"resuming: settings have changed: {problems}; {ACCEPT}")
        self._check_names(state["model"])
        self._check_learned(state)
        self._load_learned(self.model, state["model"])
        self._load_learned(self.ema, state["ema"])
        self.learner.load_state_dict(state["optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    def averaged(self) -> nn.Module:
        """The `ema` model, as returned by `whole`."""
        return self.whole(self.ema)

    def whole(self, model: nn.Module) -> nn.Module:
        """The model; if it is sharded, a whole copy, for which all processes must call this."""
        if not self.sharded:
            return model
        weights = {key: processes.whole(value) for key, value in model.state_dict().items()}
        copy = type(model)(model.config)
        copy.load_state_dict(weights)
        return copy.to(self.device).eval()

    def _learned(self, model: nn.Module) -> dict[str, Tensor]:
        return {key: processes.whole(value) for key, value in self._named(model).items()}

    def _check_learned(self, state: Mapping[str, Any]) -> None:
        """Require that a state is of the weights that are learned now."""
        self.learner.check(state["optimizer"])

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        if other := sorted(self._named(self.model).keys() ^ tensors.keys()):
            raise ValueError(
                f"resuming: the run is from another version, whose weights have other names: "
                f"{', '.join(other[:4])}{' ...' if len(other) > 4 else ''}; start a new run"
            )

    def _load_learned(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in self._named(model).items():
                value.copy_(processes.as_part_of(value, tensors[key]))

    def _named(self, model: nn.Module) -> dict[str, Tensor]:
        frozen = () if self._frozen is None else (f"{self._frozen}.",)
        return {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}


def add(sums: Sums, terms: Mapping[str, Tensor], share: float) -> None:
    """Add a micro-batch's terms, weighted by its share of the batch."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + share * value.detach()
