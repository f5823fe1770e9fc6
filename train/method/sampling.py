"""The samplers: Euler, Heun and DPM-Solver++(2M) in x-form, and guidance; of training, evaluation and command line.

No clamp anywhere: a step is a mean of the state and a predicted image, so an oracle stays exact at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from nanodit.errors import ConfigError
from nanodit.rng import generator
from train.hardware import Precision, computing_in
from train.method.flow import FlowConfig, shift, to_x
from train.model.conditions import Conditions, Subset, subset_name
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT
from train.model.tread import TreadConfig, draw_keep_ids

SELF_GUIDANCE = 3.0  # the usual scale
SELF = "self"  # its name beside those of the conditions
_MARGIN = (-1e-9, 1e-9)  # an interval's ends belong to it however the grid's times were rounded
INTERVAL = (0.0, 0.9)  # unshifted t; at nearly pure noise guidance distorts and helps nothing (arXiv 2404.07724)
_SCALES = {name: modality.guidance or name for name, modality in MODALITIES.items()}
_LAST = ("text", "dino")
# what one scale of guidance stands for, in the order in which the chain adds it: a pose is kept longest
GROUPS: Mapping[str, Subset] = {
    group: frozenset(name for name, scale in _SCALES.items() if scale == group)
    for group in (*(scale for scale in dict.fromkeys(_SCALES.values()) if scale not in _LAST), *_LAST)
}
Method = Literal["euler", "heun", "dpm++2m"]
Grid = Literal["uniform", "cosine"]
Denoiser = Callable[[Tensor, float], Tensor]  # z (B, 3, H, W), t -> predicted image (B, 3, H, W)
OnStep = Callable[[float, Tensor], None]  # t and the state there


@dataclass(frozen=True)
class Guidance:
    """The guidance that a config asks for: ``scale`` for all conditions together, ``scales`` of their own for some, or
    ``self_scale`` of self-guidance. 1 is none."""

    scale: float = 1.0
    scales: tuple[tuple[str, float], ...] = ()
    self_scale: float = 1.0

    @classmethod
    def of(cls, value: float | Mapping[str, float]) -> Guidance:
        """Read a config's value: 2.0, ``{text: 3.0, dino: 1.5}`` or ``{self: 3.0}``; raises :class:`ConfigError`."""
        if isinstance(value, Mapping):
            scales = tuple(sorted((name, scale) for name, scale in value.items() if name != SELF and scale != 1))
            guidance = cls(scales=scales, self_scale=value.get(SELF, 1.0))
        else:
            guidance = cls(float(value))
        Sampling(**guidance.fields)
        return guidance

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of :class:`Sampling`."""
        return {"guidance": self.scale, "scales": dict(self.scales), "self_guidance": self.self_scale}

    @property
    def value(self) -> float | str:
        """The number where it is one scale for all conditions, otherwise as :meth:`__str__`: for settings."""
        return str(self) if self.scales or self.self_scale != 1 else self.scale

    def of_given(self, given: Subset) -> Guidance:
        """Return it without the scales of conditions that are not given."""
        return replace(self, scales=tuple((name, scale) for name, scale in self.scales if GROUPS[name] & given))

    def __str__(self) -> str:
        scales = [*self.scales, *([(SELF, self.self_scale)] if self.self_scale != 1 else [])]
        return ",".join(f"{name}={scale:g}" for name, scale in scales) or f"{self.scale:g}"


NO_GUIDANCE = Guidance()


def _check_guidance(value: float | dict[str, float]) -> float | dict[str, float]:
    try:
        Guidance.of(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


GuidanceValue = Annotated[float | dict[str, float], AfterValidator(_check_guidance)]  # in a config


@dataclass(frozen=True)
class Sampling:
    """How to draw: all that a picture depends on beside the model, its conditions and the noise.

    ``guidance`` leads from nothing to all conditions given, ``scales`` has a scale of its own for some of ``text``,
    ``dino`` and ``pose`` (:func:`chain`), ``self_guidance`` leads away from the routed network; at most one of the
    three, where 1 and no scales are none. They act where the unshifted t is within ``interval``, both ends included.
    ``grid`` is where the steps lie (:func:`sampling_times`). ``precision`` is what the network computes in
    (:func:`train.hardware.computing_in`); the states between the steps are float32.
    Raises :class:`ConfigError` for what makes no sense with any model.
    """

    method: Method = "heun"
    steps: int = 20
    guidance: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    self_guidance: float = 1.0
    interval: tuple[float, float] = INTERVAL
    grid: Grid = "uniform"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        choices = ("sampler", self.method, Method), ("sampling grid", self.grid, Grid)
        for name, value, known in (*choices, ("precision", self.precision, Precision)):
            if value not in get_args(known):
                raise ConfigError(f"{name} {value!r}: unknown; use one of {', '.join(get_args(known))}")
        if self.steps < 1:
            raise ConfigError(f"sampling steps {self.steps}: must be at least 1")
        if unknown := self.scales.keys() - GROUPS.keys():
            raise ConfigError(f"guidance scale of {min(unknown)!r}: unknown; use {', '.join(sorted(GROUPS))}")
        scales = {"guidance": self.guidance, "self-guidance": self.self_guidance}
        scales |= {f"guidance scale of {name}": scale for name, scale in self.scales.items()}
        for name, scale in scales.items():
            if not (math.isfinite(scale) and scale >= 0):
                raise ConfigError(f"{name} {scale}: must be a number from 0 on; 1 is no guidance")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance interval {low:g} to {high:g}: must be two times of 0 to 1, the smaller first")
        if self.scales and self.guidance != 1:
            raise ConfigError(
                f"guidance scales: take the place of guidance, which is {self.guidance:g}; set that to 1, or give none"
            )
        if self.self_guidance != 1 and (self.scales or self.guidance != 1):
            other = f"guidance, which is {self.guidance:g}" if self.guidance != 1 else "guidance, which has scales"
            raise ConfigError(f"self-guidance: takes the place of {other}; set one of them to 1")

    def chain(self, given: Iterable[str]) -> dict[Subset, float]:
        """Return the subsets of the conditions ``given`` that guidance needs, with the weight of each (:func:`chain`).

        One scale for all conditions leads straight from nothing to all of them.
        """
        return chain(given, dict.fromkeys(GROUPS, self.guidance) if self.guidance != 1 else self.scales)

    def check(self, subset: Subset, table: Mapping[Subset, float], model: NanoDiT) -> None:
        """Raise :class:`ConfigError` where the model was never trained for what drawing ``subset`` needs.

        ``table`` is the resolved dropout table of its training.
        """
        modalities = model.features.modalities
        check_trained(subset, table, modalities)
        if absent := [name for name in self.scales if not GROUPS[name] & subset]:
            raise ConfigError(
                f"guidance scale of {absent[0]}: not among the conditions, {subset_name(subset, modalities)}; "
                "it would guide to nothing"
            )
        for needed in self.chain(subset):
            check_trained(needed, table, modalities, "guidance leads from or through them")
        if self.self_guidance != 1:
            check_routed(model)

    def settings(self) -> dict[str, Any]:
        """Return the fields as JSON values, for a picture's metadata; of the precision only one that is not fp32."""
        return {
            "sampler": self.method, "steps": self.steps, "guidance": self.guidance, "scales": dict(self.scales),
            "self_guidance": self.self_guidance, "interval": list(self.interval), "grid": self.grid,
            **precision_setting(self.precision),
        }  # fmt: skip


def precision_setting(precision: Precision) -> dict[str, str]:
    """Return the precision as settings name it: not at all for fp32, in which all was drawn that does not say so."""
    return {} if precision == "fp32" else {"precision": precision}


# what `train sample` and the exported pipeline draw with: a third of the forwards of 20 steps of Heun, and nearer to
# the exact solution (docs/measurements.md)
DRAWING = Sampling("dpm++2m", 12, grid="cosine")


def check_trained(
    subset: Subset, table: Mapping[Subset, float], modalities: Iterable[str], needed: str | None = None
) -> None:
    """Refuse, by name, a subset of conditions that the dropout table never trains; ``needed`` says what for."""
    if subset not in table:
        known = ", ".join(subset_name(other, modalities) for other in table)
        raise ConfigError(
            f"conditions {subset_name(subset, modalities)}: never trained by this run's dropout table, so the result "
            f"would mean nothing{f' ({needed})' if needed else ''}; trained: {known}"
        )


def check_routed(model: NanoDiT) -> None:
    """Raise :class:`ConfigError` for self-guidance of a model without a weaker self."""
    if not model.route:
        raise ConfigError(
            "self-guidance: this model was trained without routing (tread.enabled: false), so it has no weaker self to "
            "lead away from; use guidance, or a checkpoint trained with tread"
        )


def sampling_times(steps: int, s: float, grid: Grid = "uniform") -> np.ndarray:
    """Return the grid from 1 to 0, float64 (steps + 1,), in unshifted time and then moved by the shift ``s``.

    ``uniform``: equal steps. ``cosine``: t = 1 - cos(pi u / 2) of equal steps of u, which become smaller towards the
    image. The last step is Euler's and takes the prediction at its start for the image: on the uniform grid at
    t = 1 / steps, which with few steps is most of the error (tests/benchmarks/sampling.py).
    """
    u = np.linspace(1.0, 0.0, steps + 1)
    if grid == "cosine":
        u = 1 - np.cos(np.pi / 2 * u)
        u[0] = 1.0  # the cosine is not quite 0
    return shift(u, s)


def step_towards(x_hat: Tensor, z: Tensor, t: float, t_next: float) -> Tensor:
    """Move from t to t_next straight to ``x_hat``: ``x_hat + (t'/t) (z - x_hat)``; exact for a true x_hat."""
    return x_hat if t_next == 0 else x_hat + (t_next / t) * (z - x_hat)


def log_snr(t: float) -> float:
    """Return lambda, ``log((1 - t) / t)``: the log of the ratio of signal to noise, infinite at both ends."""
    return math.log((1 - t) / t) if 0 < t < 1 else math.copysign(math.inf, 0.5 - t)


def integrate(
    denoise: Denoiser, noise: Tensor, times: np.ndarray, method: Method, on_step: OnStep | None = None
) -> Tensor:
    """Integrate from the state ``noise`` at times[0], as a rule 1, to times[-1], as a rule the image at 0.

    ``on_step(t, z)`` sees the state after every step. Heun (the trapezoidal rule on v) costs two evaluations a step
    except for the last one, which is Euler's because the velocity at t = 0 is not defined by the prediction. The others
    cost one. DPM-Solver++(2M) steps towards the prediction extrapolated linearly in lambda from the last two, which is
    of second order; it is Euler's step where lambda is infinite at an end of this interval or of the one before.
    Source of 2M: Lu et al., arXiv 2211.01095, algorithm 2, with alpha = 1 - t and sigma = t.
    """
    z, previous, h_previous = noise, None, math.inf
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x_hat = denoise(z, t)
        target = x_hat
        if method == "dpm++2m":
            h = log_snr(t_next) - log_snr(t)
            if previous is not None and math.isfinite(h):
                target = x_hat + h / (2 * h_previous) * (x_hat - previous)
            previous, h_previous = x_hat, h
        z_next = step_towards(target, z, t, t_next)
        if method == "heun" and t_next > 0:
            x_next = denoise(z_next, t_next)
            mean_velocity = ((z - x_hat) / t + (z_next - x_next) / t_next) / 2
            z_next = z + (t_next - t) * mean_velocity
        z = z_next
        if on_step is not None:
            on_step(t_next, z)
    return z


def chain(given: Iterable[str], scales: Mapping[str, float]) -> dict[Subset, float]:
    """Return the weight of the prediction under each subset that guidance of the conditions ``given`` needs.

    The chain starts from nothing and adds pose, text and dino, as far as given, in this order: subsets s_0 ... s_n.
    Guided is ``x_0 + sum_k w_k (x_k - x_k-1)``, where w_k is the scale of what s_k adds (1 where ``scales`` has none):
    x_k weighs ``w_k - w_k+1`` with w_0 = 1 and w_n+1 = 0, and what weighs 0 need not be computed. Scales of text and
    dino alone thus give dual guidance, ``a + w_t (b - a) + w_d (c - b)`` with a, b, c = nothing, text, text+dino, and
    where there is a pose, whose scale is 1, it is kept: pose, text+pose, all. Equal scales leave the two ends, which is
    classifier-free guidance. Source: Ho & Salimans, arXiv 2207.12598, and Brooks et al., arXiv 2211.09800, eq. 3; on x
    instead of v, which is equal since z and t are shared.
    """
    given = frozenset(given)
    subsets, weights = [frozenset()], [1.0]
    for name, group in GROUPS.items():
        if given & group:
            subsets.append(subsets[-1] | given & group)
            weights.append(scales.get(name, 1.0))
    shares = zip(subsets, weights, [*weights[1:], 0.0])
    return {subset: weight - following for subset, weight, following in shares if weight != following}


def guided_denoiser(
    model: NanoDiT,
    conditions: Conditions,
    height: int,
    width: int,
    flow: FlowConfig,
    sampling: Sampling,
    keep_ids: Tensor | None = None,
) -> Denoiser:
    """Return the denoiser of these conditions, guided within the interval; outside it costs a single forward.

    Self-guidance is ``r + w (x - r)`` of the routed prediction r and the dense x, both conditional: the routed network
    is the weaker one, and what both get wrong is what it leads away from (Karras et al., arXiv 2406.02507). Every
    context's keys and values are computed once, here.
    """
    encode = lambda kept: model.encode_context(kept, height, width, cache=True)  # noqa: E731
    given = frozenset(name for name in MODALITIES if bool(conditions.keeps(name).any()))
    full = encode(conditions)
    plain = [(1.0, (full,))]
    guided = [
        (weight, (full if subset == given else encode(conditions.keeping(subset)),))
        for subset, weight in sampling.chain(given).items()
    ]
    if sampling.self_guidance != 1:
        guided = [(sampling.self_guidance, (full,)), (1 - sampling.self_guidance, (full, keep_ids))]
    low, high = (shift(end, flow.shift_of(height, width)) + margin for end, margin in zip(sampling.interval, _MARGIN))

    def denoise(z: Tensor, t: float) -> Tensor:
        times = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        terms = guided if low <= t <= high else plain
        predicted = (to_x(model(z, times, *arguments).float(), z, times, flow.prediction) for _, arguments in terms)
        return sum(x if weight == 1 else weight * x for (weight, _), x in zip(terms, predicted))

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
    sampling: Sampling,
    keep_ids: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate images of one size from ``noise`` (B, 3, H, W) at t = 1; returns float32 (B, 3, H, W), about [-1, 1].

    Self-guidance needs ``keep_ids`` (B, k) of :func:`trajectory_keep_ids`: ValueError without them, and
    :class:`ConfigError` for a model that never routed. Whether training saw the conditions is :meth:`Sampling.check`'s.
    ``on_step(t, z)`` is called after every step. The conditions may be on the CPU; everything runs where the model is,
    in evaluation mode.
    """
    if sampling.self_guidance != 1:
        check_routed(model)
        if keep_ids is None:  # both networks would be the dense one
            raise ValueError("self-guidance: keep_ids of trajectory_keep_ids are missing")
    height, width = noise.shape[2:]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        keep_ids = None if keep_ids is None else keep_ids.to(device)
        times = sampling_times(sampling.steps, flow.shift_of(height, width), sampling.grid)
        with computing_in(sampling.precision, device):
            denoise = guided_denoiser(model, conditions.to(device), height, width, flow, sampling, keep_ids)
            return integrate(denoise, noise.to(device).float(), times, sampling.method, on_step)
    finally:
        model.train(training)


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in [-1, 1] into pixels uint8 (B, H, W, 3); what lies outside is clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
