"""The flow's formulas, and the agreement of the times that training draws with the times that sampling visits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanodit.rng import generator
from train.method.flow import FlowConfig, flow_loss, interpolate, resolution_shift, shift, timesteps, to_x, velocity
from train.method.sampling import sampling_times


def test_perfect_prediction_has_zero_loss_below_the_clamp():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert flow_loss(x, x, torch.full((2,), 0.01), 0.05).tolist() == [0.0, 0.0]


def test_loss_is_the_velocity_error_with_both_sides_clamped():
    torch.manual_seed(0)
    x, e, x_hat = (torch.randn(3, 3, 4, 4) for _ in range(3))
    t = torch.tensor([0.02, 0.3, 0.9])
    z = interpolate(x, e, t)
    expected = (velocity(x_hat, z, t, 0.05) - velocity(x, z, t, 0.05)).square().mean((1, 2, 3))
    torch.testing.assert_close(flow_loss(x_hat, x, t, 0.05), expected)
    torch.testing.assert_close(flow_loss(x_hat, x, t, 1.0), (x_hat - x).square().mean((1, 2, 3)))
    # above the clamp the target velocity is e - x itself
    torch.testing.assert_close(velocity(x, z, t, 0.05)[1:], (e - x)[1:], atol=1e-4, rtol=0)


def test_velocity_prediction_is_turned_into_x():
    x, e = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(to_x(e - x, interpolate(x, e, t), t, "v"), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width", "s"), [(64, 64, 1.0), (256, 256, 1.0), (512, 512, 2.0), (1024, 1024, 3.0)])
def test_resolution_shift_follows_the_side(height, width, s):
    assert resolution_shift(height, width) == pytest.approx(s)


def test_gates_quoted_unshifted_map_through_the_shift():
    assert shift(0.7, 3.0) == pytest.approx(0.875)
    assert shift(0.9, 3.0) == pytest.approx(0.964, abs=5e-4)


def test_timesteps_are_stratified_within_one_step():
    config = FlowConfig(logit_mean=0.8, logit_std=0.8, uniform_share=0.0)
    t = np.sort(timesteps(config, generator(0, "t"), np.ones(64)))
    quantiles = torch.special.ndtr((torch.logit(torch.from_numpy(t).double()) - 0.8) / 0.8).numpy()
    # one time in each of 64 equally likely strata
    np.testing.assert_array_equal(np.floor(quantiles * 64 + 1e-4).clip(max=63), np.arange(64))


def test_uniform_share_is_unshifted():
    config = FlowConfig(logit_mean=8.0, logit_std=0.1, uniform_share=0.25)
    t = timesteps(config, generator(1, "t"), np.full(400, 3.0))
    uniform = np.sort(t[t < 0.999])
    assert len(uniform) == pytest.approx(100, abs=2)
    np.testing.assert_allclose(uniform, (np.arange(len(uniform)) + 0.5) / len(uniform), atol=0.02)


def test_each_image_is_shifted_by_its_own_size():
    config = FlowConfig(uniform_share=0.0)
    plain = timesteps(config, generator(2, "t"), np.ones(16))
    shifted = timesteps(config, generator(2, "t"), np.where(np.arange(16) < 8, 1.0, 3.0))
    np.testing.assert_array_equal(plain[:8], shifted[:8])
    np.testing.assert_allclose(shift(plain[8:], 3.0), shifted[8:], rtol=1e-6)


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_trap_15_training_covers_the_times_that_sampling_visits(s):
    t = np.concatenate([timesteps(FlowConfig(), generator(3, "t", i), np.full(64, s)) for i in range(50)])
    visited = sampling_times(20, s)[:-1]
    for low, high in ((0.0, shift(0.5, s)), (shift(0.5, s), shift(0.9, s)), (shift(0.9, s), 1.0)):
        share_trained = ((t >= low) & (t <= high)).mean()
        share_sampled = ((visited >= low) & (visited <= high)).mean()
        assert share_trained > share_sampled / 5, (low, high)  # the predecessor: an eighth
