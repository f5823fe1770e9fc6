"""The samplers: Euler and Heun in x-form with guidance, for training, evaluation and command line.

No clamp anywhere: a step is a mean of the state and the predicted image, so an oracle stays exact at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prep.errors import ConfigError
from train.conditioning import Conditions
from train.flow import FlowConfig, shift, to_x
from train.model import NanoDiT
from train.noise import generator
from train.tread import TreadConfig, draw_keep_ids

SELF_GUIDANCE = 3.0  # the usual scale
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


def self_guided_denoiser(
    model: NanoDiT, conditions: Conditions, height: int, width: int, flow: FlowConfig, scale: float, keep_ids: Tensor
) -> Denoiser:
    """Return the denoiser ``r + w (x - r)`` of the routed prediction r and the dense x, both conditional.

    The routed network is the weaker one, and what both get wrong is what guidance leads away from; half a forward more.
    Source: Karras et al., arXiv 2406.02507, with the routed network as the bad version of the dense one.
    """
    context = model.encode_context(conditions, height, width, cache=True)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        dense, routed = (to_x(model(z, t, context, ids), z, t, flow.prediction) for ids in (None, keep_ids))
        return routed + scale * (dense - routed)

    return denoise


def trajectory_keep_ids(tread: TreadConfig, samples: Iterable[tuple[str, int]], tokens: int) -> Tensor:
    """Draw the tokens that the routed network keeps, int64 (B, k): one set a (key, seed), the same at every step."""
    kept = tread.kept(tokens)
    drawn = [draw_keep_ids(generator("keep", key, seed), tokens, kept) for key, seed in samples]
    return torch.from_numpy(np.stack(drawn))


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
    self_guidance: float = 1.0,
    keep_ids: Tensor | None = None,
) -> Tensor:
    """Generate images of one size from ``noise`` (B, 3, H, W) at t = 1; returns float32 (B, 3, H, W), about [-1, 1].

    ``self_guidance`` other than 1 leads away from the routed network, which sees the tokens ``keep_ids`` (B, k) of
    :func:`trajectory_keep_ids`; :class:`ConfigError` for a model that never routed, or together with ``guidance``. The
    conditions may be on the CPU; everything runs where the model is, in evaluation mode.
    """
    if self_guidance != 1:
        check_self_guidance(model, guidance)
    height, width = noise.shape[2:]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        request = model, conditions.to(device), height, width, flow
        if self_guidance != 1:
            denoise = self_guided_denoiser(*request, self_guidance, keep_ids.to(device))
        else:
            denoise = guided_denoiser(*request, guidance)
        times = sampling_times(steps, flow.shift_of(height, width))
        return integrate(denoise, noise.to(device).float(), times, method)
    finally:
        model.train(training)


def check_self_guidance(model: NanoDiT, guidance: float) -> None:
    """Raise :class:`ConfigError` where self-guidance means nothing."""
    if not model.route:
        raise ConfigError(
            "self-guidance: this model was trained without routing (tread.enabled: false), so it has no weaker self to "
            "lead away from; use guidance, or a checkpoint trained with tread"
        )
    if guidance != 1:
        raise ConfigError(f"self-guidance: takes the place of guidance, which is {guidance:g}; set one of them to 1")


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in [-1, 1] into pixels uint8 (B, H, W, 3); what lies outside is clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
