"""A model's learned weights with their optimiser, and the average of a model's weights."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .settings import OPTIMIZERS, Training


class Learner:
    """A model's learned weights, their gradients over a step and their optimiser.

    With several processes, each holds the same weights, and gradients are averaged. If the model is
    sharded, each process holds a part and torch does the communication.

    Args:
        model: its parameters that require a gradient are trained.
        settings: give the optimiser, betas, weight decay, clipping and precision.
        lr: learning rate; None takes that of the settings.
        decays: whether weight decay applies to a weight.

    Attributes:
        weights: the learned weights by name.
        optimizer: the optimiser, from torch.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Training,
        *,
        lr: float | None = None,
        decays: Callable[[Tensor], bool] = lambda weight: True,
    ) -> None:
        self.settings = settings
        self.weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        groups = [
            {"params": [w for w in self.weights.values() if decays(w) == decay], "weight_decay": by}
            for decay, by in ((True, settings.weight_decay), (False, 0.0))
        ]
        self.optimizer = OPTIMIZERS[settings.optimizer](
            [group for group in groups if group["params"]],
            lr=settings.lr if lr is None else lr,
            betas=settings.betas,
        )
        self.scaler = self._new_scaler()
        self._idle = False

    def _new_scaler(self) -> torch.amp.GradScaler:
        device = next(iter(self.weights.values())).device.type
        return torch.amp.GradScaler(device, enabled=self.settings.precision == "float16")

    def zero_grad(self) -> None:
        self._idle = False
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Discard a step's gradients, and replace the scaler, which would not unscale twice."""
        self.zero_grad()
        before, self.scaler = self.scaler.state_dict(), self._new_scaler()
        if before:
            self.scaler.load_state_dict(before)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def no_gradient(self) -> None:
        """Set gradients to zero; they need no loss scale."""
        self._idle = True
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight)

    def gather(self) -> Tensor:
        """Average gradients over the processes and clip them.

        They are multiplied by clip / (norm + 1e-6) if that is below 1.

        Returns:
            Their norm before clipping.
        """
        grads = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        processes.average(grad for grad in grads if not processes.is_sharded(grad))
        if not self._idle:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip or math.inf)
        return processes.whole(norm)

    def step(self, lr: float | None = None) -> None:
        """Update the weights; ``lr`` None leaves the learning rate as it is."""
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        if self._idle:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Disable gradients for these weights within a ``with`` block."""
        for weight in self.weights.values():
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self.weights.values():
                weight.requires_grad_(True)

    def moments(self, weight: Tensor) -> dict[str, Tensor]:
        """The optimiser's state for a weight; empty before its first step."""
        return self.optimizer.state.get(weight, {})

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state by weight name, whole even for a sharded model."""
        moments = {
            name: {key: processes.whole(value) for key, value in self.moments(weight).items()}
            for name, weight in self.weights.items()
        }
        return {"moments": moments, "scaler": self.scaler.state_dict()}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a state is of other weights, before anything is loaded."""
        here = self.weights.keys()
        if other := sorted(here ^ state["moments"].keys()):
            raise ValueError(
                f"resuming: {len(other)} weights are learned in one of the two runs only, such as "
                f"{other[0]} ({'now' if other[0] in here else 'then'}); take the same models and "
                "freeze the same parts"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load moments and counts; learning rates and the like stay as the settings have them."""
        for name, weight in self.weights.items():
            self.optimizer.state[weight] = {
                key: processes.as_part_of(weight, value) if value.ndim else value.clone()
                for key, value in state["moments"][name].items()
            }
        if state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))


class Average:
    """A copy of a model, in eval mode, that keeps a moving average of its learned weights.

    Args:
        model: the model to follow.
        decay: decay of the average at each update.
        shared: a part that is not trained and that the copy shares with the model.
    """

    def __init__(self, model: nn.Module, decay: float, shared: nn.Module | None = None) -> None:
        memo = {} if shared is None else {id(shared): shared}
        self.model, self.decay = copy.deepcopy(model, memo), decay
        self.model.eval().requires_grad_(False)
        self._own: list[Tensor] = []
        self._followed: list[Tensor] = []

    def begin(self, learner: Learner) -> None:
        """Set the weights to follow, after both models were sharded, which replaces weights."""
        own = dict(self.model.named_parameters())
        self._own = [own[name] for name in learner.weights]
        self._followed = list(learner.weights.values())

    @torch.no_grad()
    def follow(self) -> None:
        """Update the average once."""
        torch._foreach_mul_(self._own, self.decay)
        torch._foreach_add_(self._own, self._followed, alpha=1 - self.decay)
