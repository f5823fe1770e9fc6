"""The samplers: Euler and Heun in x-form with classifier-free guidance, for training, evaluation and command line.

No clamp anywhere: a step is a mean of the state and the predicted image, so an oracle stays exact at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from train.conditioning import Conditions
from train.flow import FlowConfig, shift, to_x
from train.model import NanoDiT

Method = Literal["euler", "heun"]
Denoiser = Callable[[Tensor, Tensor], Tensor]  # z (B, 3, H, W), t (B,) -> predicted image (B, 3, H, W)


def sampling_times(steps: int, s: float) -> np.ndarray:
    """Return the grid from 1 to 0, float64 (steps + 1,): uniform in unshifted time, moved by the shift ``s``."""
    return shift(np.linspace(1.0, 0.0, steps + 1), s)


def step_towards(x_hat: Tensor, z: Tensor, t: float, t_next: float) -> Tensor:
    """Move from t to t_next straight to ``x_hat``: ``x_hat + (t'/t) (z - x_hat)``; exact for a true x_hat."""
    return x_hat if t_next == 0 else x_hat + (t_next / t) * (z - x_hat)


def integrate(
    denoise: Denoiser, noise: Tensor, times: np.ndarray, method: Method, on_step: Callable | None = None
) -> Tensor:
    """Integrate from noise at times[0] = 1 to the image at times[-1] = 0.

    ``on_step(t, z)`` sees the state after every step. Heun (the trapezoidal rule on v) costs two evaluations a step
    except for the last one, which is Euler's because the velocity at t = 0 is not defined by the prediction.
    """
    z = noise
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x_hat = denoise(z, torch.full((len(z),), t, device=z.device))
        z_next = step_towards(x_hat, z, t, t_next)
        if method == "heun" and t_next > 0:
            x_next = denoise(z_next, torch.full((len(z),), t_next, device=z.device))
            mean_velocity = ((z - x_hat) / t + (z_next - x_next) / t_next) / 2
            z_next = z + (t_next - t) * mean_velocity
        z = z_next
        if on_step is not None:
            on_step(t_next, z)
    return z


def guided_denoiser(
    model: NanoDiT, conditions: Conditions, height: int, width: int, flow: FlowConfig, guidance: float
) -> Denoiser:
    """Return the denoiser ``a + g (b - a)`` of the unconditional a and the conditional b, combined on x.

    At g = 1 the unconditional half is not computed. The context's keys and values are computed once, here.
    Source: Ho & Salimans, arXiv 2207.12598; on x instead of v, which is equal since z and t are shared.
    """
    conditional = model.encode_context(conditions, height, width, cache=True)
    unconditional = None
    if guidance != 1:
        unconditional = model.encode_context(conditions.keeping(()), height, width, cache=True)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        x = to_x(model(z, t, conditional), z, t, flow.prediction)
        if unconditional is None:
            return x
        base = to_x(model(z, t, unconditional), z, t, flow.prediction)
        return base + guidance * (x - base)

    return denoise


@torch.no_grad()
def sample(
    model: NanoDiT,
    conditions: Conditions,
    noise: Tensor,
    *,
    flow: FlowConfig,
    steps: int = 20,
    method: Method = "heun",
    guidance: float = 1.0,
) -> Tensor:
    """Generate images of one size from ``noise`` (B, 3, H, W) at t = 1; returns float32 (B, 3, H, W), about [-1, 1].

    The conditions may be on the CPU; everything runs where the model is, in evaluation mode.
    """
    height, width = noise.shape[2:]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        denoise = guided_denoiser(model, conditions.to(device), height, width, flow, guidance)
        times = sampling_times(steps, flow.shift_of(height, width))
        return integrate(denoise, noise.to(device).float(), times, method)
    finally:
        model.train(training)


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in [-1, 1] into pixels uint8 (B, H, W, 3); what lies outside is clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
