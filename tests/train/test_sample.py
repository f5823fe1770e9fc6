"""Samplers: exact with an oracle after every step, and of the stated order on a closed-form Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.conditioning import collate
from train.flow import FlowConfig
from train.model import Features, ModelConfig, build_model
from train.sample import integrate, sample, sampling_times, to_uint8


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_trap_16_an_oracle_stays_on_the_path_at_every_step(method, s, steps):
    torch.manual_seed(0)
    x, e = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    seen = []

    def on_step(t, z):
        torch.testing.assert_close(z, (1 - t) * x + t * e, atol=1e-4, rtol=0)
        seen.append(t)

    result = integrate(lambda z, t: x, e, sampling_times(steps, s), method, on_step)
    torch.testing.assert_close(result, x, atol=1e-6, rtol=0)
    assert len(seen) == steps
    assert seen[-1] == 0


def gaussian_error(method: str, steps: int, sigma: float = 0.5, end: float = 0.05) -> float:
    """Error of the sampler at t = end against the exact flow of data ~ N(0, sigma^2), where all is linear in z."""

    def denoise(z, t):  # E[x | z]
        t = t.view(-1, 1, 1, 1)
        return z * ((1 - t) * sigma**2 / ((1 - t) ** 2 * sigma**2 + t**2))

    e = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    times = np.linspace(1, end, steps + 1)
    exact = np.sqrt((1 - end) ** 2 * sigma**2 + end**2)
    state = integrate(lambda z, t: denoise(z, t.double()), e, times, method)
    return abs(state.item() - exact)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    errors = [gaussian_error(method, steps) for steps in (16, 32, 64)]
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(measured, order, atol=0.25)


@pytest.fixture
def model_and_conditions():
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(hidden_size=32, depth=2, num_heads=2, patch_size=8, bottleneck=16), Features(32, 16, 8, True)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    conditions = collate(
        text=[rng.standard_normal((5, 16)) for _ in range(3)],
        cls=[rng.standard_normal(8) for _ in range(3)],
        patches=[rng.standard_normal((4, 4, 8)) for _ in range(3)],
        pose=[rng.random((133, 3)) for _ in range(3)],
        count=3,
    )
    return model, conditions


def test_guidance_one_is_the_conditional_model_and_zero_the_unconditional(model_and_conditions):
    model, conditions = model_and_conditions
    e = torch.randn(3, 3, 32, 24)
    arguments = {"flow": FlowConfig(), "steps": 3}
    nothing = sample(model, conditions.keeping(()), e, **arguments)
    torch.testing.assert_close(sample(model, conditions, e, guidance=0.0, **arguments), nothing, atol=1e-5, rtol=1e-5)
    at_one, near_one = (sample(model, conditions, e, guidance=g, **arguments) for g in (1.0, 1.0 + 1e-7))
    torch.testing.assert_close(at_one, near_one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(at_one, nothing, atol=1e-3)


def test_an_image_does_not_depend_on_its_batch(model_and_conditions):
    model, conditions = model_and_conditions
    e = torch.randn(3, 3, 32, 32)
    together = sample(model, conditions, e, flow=FlowConfig(), steps=3, guidance=2.0)
    alone = sample(model, conditions.select(slice(1, 2)), e[1:2], flow=FlowConfig(), steps=3, guidance=2.0)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_sampling_leaves_the_training_mode_alone(model_and_conditions):
    model, conditions = model_and_conditions
    model.train()
    sample(model, conditions, torch.randn(3, 3, 32, 32), flow=FlowConfig(), steps=1)
    assert model.training


def test_pixels_are_rounded_and_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
