"""Rectified flow in pixel space: the one definition that training, sampling and evaluation share.

Convention: t = 1 is noise, ``z = (1 - t) x + t e``, ``v = e - x``; pixels x in [-1, 1], e standard normal.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nanodit.config import Config


class FlowConfig(Config):
    """What the network predicts and at which times it is trained."""

    prediction: Literal["x", "v"] = "x"
    logit_mean: float = 0.8
    logit_std: float = Field(default=0.8, gt=0)
    uniform_share: float = Field(default=0.1, ge=0, le=1)
    shift: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    t_min: float = Field(default=0.05, gt=0, le=1)

    def shift_of(self, height: int, width: int) -> float:
        """Return s of :func:`shift` for images of this size in pixels."""
        return resolution_shift(height, width) if self.shift == "auto" else float(self.shift)


def resolution_shift(height: int, width: int) -> float:
    """Return ``s = clip(sqrt(H W) / 256, 1, 3)``: larger images keep more signal at equal t, so t moves to noise."""
    return min(max(math.sqrt(height * width) / 256, 1.0), 3.0)


def shift(t, s):
    """Map times in [0, 1] by ``s t / (1 + (s - 1) t)``. Source: Esser et al., arXiv 2403.03206, eq. 23."""
    return s * t / (1 + (s - 1) * t)


def timesteps(config: FlowConfig, generator: np.random.Generator, shifts: np.ndarray) -> np.ndarray:
    """Draw the times of one optimiser step: logit-normal, shifted, then a share replaced by unshifted uniform.

    ``shifts`` (count,) holds each image's s. Both laws are stratified over the step and permuted, so that every step
    sees the whole range whatever bucket or condition an image has. Returns float32 (count,) in (0, 1).
    """
    count = len(shifts)
    # one stratified point an image; float64 keeps (rank + u) / count strictly inside (0, 1)
    quantile = (generator.permutation(count) + generator.random(count)) / count
    normal = torch.special.ndtri(torch.from_numpy(np.clip(quantile, 1e-12, 1 - 1e-12))).numpy()
    t = 1 / (1 + np.exp(-(config.logit_mean + config.logit_std * normal)))
    t = shift(t, shifts)
    # an independent stratification decides who is uniform; within the share its quantile is the uniform time itself
    lottery = (generator.permutation(count) + generator.random(count)) / count
    uniform = lottery < config.uniform_share
    t[uniform] = lottery[uniform] / config.uniform_share
    return t.astype(np.float32)


def _per_image(t: Tensor) -> Tensor:
    return t.float().view(-1, 1, 1, 1)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return ``z = (1 - t) x + t e`` for x and noise (B, 3, H, W) and t (B,), in float32."""
    t = _per_image(t)
    return (1 - t) * x + t * noise


def to_x(output: Tensor, z: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Turn the network's output (B, 3, H, W) into the predicted image: itself, or ``z - t v`` for a velocity."""
    output = output.float()
    return output if prediction == "x" else z - _per_image(t) * output


def velocity(x_hat: Tensor, z: Tensor, t: Tensor, t_min: float = 0.05) -> Tensor:
    """Return the predicted velocity ``(z - x_hat) / max(t, t_min)``, (B, 3, H, W)."""
    return (z - x_hat) / _per_image(t).clamp_min(t_min)


def flow_loss(x_hat: Tensor, x: Tensor, t: Tensor, t_min: float) -> Tensor:
    """Return the velocity loss of each image, ``mean (x_hat - x)^2 / max(t, t_min)^2``, float32 (B,).

    With a ``t_min`` of 1 it is the plain error of the pixels. The clamp belongs to the loss and so to both sides:
    clamping the predicted velocity alone would be biased below ``t_min``. Source: Li & He, arXiv 2511.13720
    (x-prediction with velocity loss).
    """
    error = (x_hat.float() - x.float()).square().flatten(1).mean(1)
    return error / t.float().clamp_min(t_min).square()
