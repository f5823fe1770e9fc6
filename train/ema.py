"""The exponential moving average of the weights, which sampling and validation use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ema_decay(step: int, total_steps: int, decay: float | None) -> float:
    """Return the decay of the update after the ``step``-th optimiser step (1-based).

    ``decay`` None is the power warm-up ``min(1 - (1 + step)^(-2/3), 1 - 10 / total_steps)``: the average always spans a
    fraction of the run, so that the first weights are forgotten in short runs too. A number is a fixed decay.
    """
    if decay is not None:
        return decay
    return max(0.0, min(1 - (1 + step) ** (-2 / 3), 1 - 10 / total_steps))


class EMA:
    """Averages every parameter in float32; buffers there are none."""

    def __init__(self, model: nn.Module, total_steps: int, decay: float | None = None) -> None:
        self.total_steps, self.decay = total_steps, decay
        self.state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> float:
        """Average in the weights after the ``step``-th optimiser step (1-based) and return the decay used."""
        parameters = self._matched(model)
        decay = ema_decay(step, self.total_steps, self.decay)
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
        """The model's parameters in the average's order; all must match, or the average would go stale silently."""
        parameters = dict(model.named_parameters())
        if parameters.keys() != self.state.keys():
            raise ValueError(f"EMA and model differ in {sorted(parameters.keys() ^ self.state.keys())[:3]}")
        return [parameters[name].detach() for name in self.state]
