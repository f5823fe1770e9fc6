"""Moving averages of the weights: the EMA that validation uses, and the power averages that others are made of later.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3: the
average of profile ``p(s) ~ s^gamma`` over the training time s keeps its shape at every length of the run, and averages
of two gammas, stored now and then, span those of other gammas (:mod:`train.checkpoint.posthoc`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from nanodit.config import Config
from train.model.network import TRAINING_ONLY

UNIFORM = 12**-0.5  # sigma_rel of the plain mean of all steps (gamma 0): the widest profile that still favours the end


class EmaConfig(Config):
    """What is stored for averages that are chosen after training."""

    snapshots: int = Field(default=0, ge=0)  # times over the run at which both averages are stored; 0: never
    # widths of the two averages, as the standard deviation of their profile over the length of the run
    sigma_rel: list[Annotated[float, Field(gt=0, lt=UNIFORM)]] = Field(default=[0.05, 0.1], min_length=2, max_length=2)

    @field_validator("snapshots")
    @classmethod
    def _check_snapshots(cls, value: int) -> int:
        if 0 < value < 8:
            raise ValueError("must be 0 (none) or at least 8: fewer fit no other profile well")
        return value

    @field_validator("sigma_rel")
    @classmethod
    def _check_widths(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("must be two different widths")
        return value


def ema_decay(step: int, total_steps: int, decay: float | None, warmup: int = 0) -> float:
    """Return the decay of the update after the ``step``-th optimiser step (1-based).

    ``decay`` None is the power warm-up ``min(1 - (1 + step)^(-2/3), 1 - 10 / total_steps)``: the average always spans a
    fraction of the run, so that the first weights are forgotten in short runs too. A number is a fixed decay after the
    first ``warmup`` steps, at whose end the average is the weights of that step.
    """
    if decay is not None:
        return 0.0 if step <= warmup else decay
    return max(0.0, min(1 - (1 + step) ** (-2 / 3), 1 - 10 / total_steps))


def power_decay(step: int, gamma: float) -> float:
    """Return the decay ``(1 - 1/step)^(gamma + 1)`` of a power average's ``step``-th update (1-based).

    The first update takes the weights as they are, so nothing of the initial ones is in the average. Source: arXiv
    2312.02696, equation 4.
    """
    return (1 - 1 / step) ** (gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """Return the gamma >= 0 whose profile has this width, 0 < ``sigma_rel`` <= 12^-.5 (the plain mean).

    The profile ``s^gamma`` on [0, 1] has the standard deviation ``((gamma + 1) / (gamma + 3))^.5 / (gamma + 2)``; this
    is the largest root of the cubic that it is once squared. Source: arXiv 2312.02696, section 3.1 and appendix C.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def averaged(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that sampling uses, by name: all but those of a head that only training has."""
    return {name: value for name, value in model.named_parameters() if not name.startswith(TRAINING_ONLY)}


class EMA:
    """Averages every parameter that sampling uses, in float32; buffers there are none.

    ``decay_of`` maps a 1-based step to the decay.
    """

    def __init__(self, model: nn.Module, decay_of: Callable[[int], float]) -> None:
        self.decay_of = decay_of
        self.state = {name: parameter.detach().clone() for name, parameter in averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> float:
        """Average in the weights after the ``step``-th optimiser step (1-based) and return the decay used."""
        parameters = self._matched(model)
        decay = self.decay_of(step)
        torch._foreach_lerp_(list(self.state.values()), parameters, 1 - decay)
        return decay

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the average into another model's parameters."""
        torch._foreach_copy_(self._matched(model), list(self.state.values()))

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a saved average; raises ValueError when a tensor is missing, foreign or misshaped."""
        if state.keys() != self.state.keys():
            raise ValueError(f"EMA state and model differ in {sorted(state.keys() ^ self.state.keys())[:3]}")
        for name, value in state.items():
            if value.shape != self.state[name].shape:
                raise ValueError(f"EMA {name} is {tuple(value.shape)}, expected {tuple(self.state[name].shape)}")
            self.state[name].copy_(value)

    def _matched(self, model: nn.Module) -> list[Tensor]:
        """Return the model's parameters in the average's order; all must match, or it would silently go stale."""
        parameters = averaged(model)
        if parameters.keys() != self.state.keys():
            raise ValueError(f"EMA and model differ in {sorted(parameters.keys() ^ self.state.keys())[:3]}")
        return [parameters[name].detach() for name in self.state]


class PowerAverages:
    """The power averages of a run, one per ``ema.sigma_rel``; none at all where no snapshots are wanted."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        widths = config.sigma_rel if config.snapshots else []
        self.averages = {width: EMA(model, partial(power_decay, gamma=gamma_of(width))) for width in widths}

    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights after the ``step``-th optimiser step (1-based)."""
        for average in self.averages.values():
            average.update(model, step)

    def tensors(self) -> dict[str, Tensor]:
        """Return all averages as a flat dict ``SIGMA_REL/NAME``, for safetensors; empty where there are none."""
        return join_averages({width: average.state for width, average in self.averages.items()})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned; raises ValueError when a tensor is missing, foreign or misshaped."""
        saved = split_averages(tensors)
        if saved.keys() != self.averages.keys():
            raise ValueError(f"power averages are of sigma_rel {sorted(saved)}, expected {sorted(self.averages)}")
        for width, average in self.averages.items():
            average.load(saved[width])


def join_averages(averages: dict[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten {sigma_rel: {name: tensor}} to {"SIGMA_REL/NAME": tensor}."""
    return {f"{width}/{name}": value for width, state in averages.items() for name, value in state.items()}


def split_averages(tensors: dict[str, Tensor]) -> dict[float, dict[str, Tensor]]:
    """Undo :func:`join_averages`."""
    averages: dict[float, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        width, _, name = key.partition("/")
        averages.setdefault(float(width), {})[name] = value
    return averages
