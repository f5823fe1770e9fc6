"""Samplers: exact with an oracle after every step, and of the stated order on a closed-form Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prep.errors import ConfigError
from train.conditioning import collate
from train.flow import FlowConfig, to_x
from train.model import Features, ModelConfig, build_model
from train.sample import integrate, sample, sampling_times, self_guided_denoiser, to_uint8, trajectory_keep_ids
from train.tread import TreadConfig


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


@pytest.fixture
def routed_model(model_and_conditions):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, depth=3, num_heads=2, patch_size=8, bottleneck=16)
    tread = TreadConfig(enabled=True)
    model = build_model(config, Features(32, 16, 8, True), tread)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, model_and_conditions[1], trajectory_keep_ids(tread, [("a", 0), ("a", 1), ("b", 0)], 12)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_self_guidance_leads_from_the_routed_to_the_dense_network(routed_model, prediction):
    model, conditions, keep_ids = routed_model
    flow = FlowConfig(prediction=prediction)
    z, t = torch.randn(3, 3, 32, 24), torch.rand(3)
    dense, routed = (to_x(model(z, t, conditions, ids), z, t, prediction) for ids in (None, keep_ids))
    denoise = self_guided_denoiser(model, conditions, 32, 24, flow, 3.0, keep_ids)
    torch.testing.assert_close(denoise(z, t), routed + 3 * (dense - routed), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dense, routed, atol=1e-3)
    arguments = {"flow": flow, "steps": 3, "method": "euler"}
    drawn = sample(model, conditions, z, self_guidance=3.0, keep_ids=keep_ids, **arguments)
    expected = integrate(denoise, z, sampling_times(3, 1.0), "euler").detach()
    torch.testing.assert_close(drawn, expected)
    plain = sample(model, conditions, z, **arguments)
    near = sample(model, conditions, z, self_guidance=1 + 1e-7, keep_ids=keep_ids, **arguments)
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=1e-4)


def test_self_guidance_tokens_belong_to_the_sample_and_the_seed():
    tread = TreadConfig(enabled=True, keep=0.25)
    a0, a1, b0 = trajectory_keep_ids(tread, [("a", 0), ("a", 1), ("b", 0)], 64)
    assert torch.equal(a0, trajectory_keep_ids(tread, [("a", 0)], 64)[0])
    assert len({tuple(ids.tolist()) for ids in (a0, a1, b0)}) == 3
    assert a0.shape == (16,)


def test_self_guidance_is_refused_where_it_means_nothing(model_and_conditions, routed_model):
    model, conditions = model_and_conditions
    arguments = {"flow": FlowConfig(), "steps": 1, "self_guidance": 3.0, "keep_ids": routed_model[2]}
    with pytest.raises(ConfigError, match="trained without routing"):
        sample(model, conditions, torch.randn(3, 3, 32, 24), **arguments)
    with pytest.raises(ConfigError, match="takes the place of guidance, which is 2"):
        sample(routed_model[0], conditions, torch.randn(3, 3, 32, 24), guidance=2.0, **arguments)
