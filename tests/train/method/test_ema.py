"""The averages: their decays, that every parameter is matched and none aliased, and the power profiles' widths."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.train.model.test_network import make_model
from train.config import TrainSection
from train.method.ema import (
    EMA,
    UNIFORM,
    EmaConfig,
    PowerAverages,
    ema_decay,
    gamma_of,
    power_decay,
)

DECAY = partial(ema_decay, total_steps=100, decay=None)


@pytest.mark.parametrize("steps", [100, 700, 5000])
def test_trap_19_early_weights_are_forgotten(steps):
    weight_of_start, weight_of_first_tenth = 1.0, 0.0
    for step in range(1, steps + 1):
        decay = ema_decay(step, steps, None)
        weight_of_start *= decay
        weight_of_first_tenth = weight_of_first_tenth * decay + (1 - decay) * (step <= steps / 10)
    assert weight_of_start + weight_of_first_tenth < 0.01


def test_fixed_decay_is_kept():
    assert ema_decay(3, 100, 0.5) == 0.5
    assert [ema_decay(step, 1000, 0.9999, 500) for step in (1, 500, 501, 1000)] == [0, 0, 0.9999, 0.9999]
    with pytest.raises(ValidationError, match="ema_warmup belongs to a fixed ema_decay"):
        TrainSection(ema_warmup=500)
    model = make_model()
    ema = EMA(model, partial(ema_decay, total_steps=100, decay=0.5))
    start = {name: value.clone() for name, value in ema.state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert ema.update(model, 1) == 0.5
    for name, value in ema.state.items():
        torch.testing.assert_close(value, start[name] + 0.5)


def test_trap_27_average_and_weights_never_alias():
    model, copy = make_model(), make_model()
    ema = EMA(model, DECAY)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for value in ema.state.values():
        value.add_(1.0)
    ema.copy_to(copy)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert all(value.abs().sum() > 0 for value in ema.state.values())


def test_trap_21_a_renamed_parameter_is_an_error():
    model = make_model()
    ema = EMA(model, DECAY)
    renamed = torch.nn.Module()
    renamed._orig_mod = model
    with pytest.raises(ValueError, match="_orig_mod"):
        ema.update(renamed, 1)
    with pytest.raises(ValueError, match="differ"):
        ema.load(dict(list(ema.state.items())[1:]))


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of the profile ``s^gamma`` on [0, 1]: arXiv 2312.02696, section 3.1."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_and_exponents_are_the_papers(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)  # arXiv 2312.02696, section 3.1
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 50.0])
def test_a_width_is_the_standard_deviation_of_its_profile(gamma):
    s = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = s**gamma / (s**gamma).sum()
    deviation = np.sqrt((p * s**2).sum() - (p * s).sum() ** 2)
    assert sigma_rel_of(gamma) == pytest.approx(deviation, rel=1e-6)
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, abs=1e-6)
    assert sigma_rel_of(0.0) == pytest.approx(UNIFORM)


def test_a_power_average_weighs_the_steps_by_their_power():
    """The recursion over decays against the sum over all steps; the mean of linear drift is the profile's mean."""
    gamma, steps = gamma_of(0.1), 1000
    average = -5.0  # the initial weights, which count for nothing
    for step in range(1, steps + 1):
        decay = power_decay(step, gamma)
        average = decay * average + (1 - decay) * step
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert average == pytest.approx((np.diff(edges) * np.arange(1, steps + 1)).sum(), rel=1e-12)
    assert average / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / steps)


def test_power_averages_follow_their_decays_and_come_back_whole():
    torch.manual_seed(0)
    model = make_model()
    power = PowerAverages(model, EmaConfig(snapshots=8))
    expected = {width: {} for width in (0.05, 0.1)}
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        power.update(model, step)
        for width, state in expected.items():
            decay = (1 - 1 / step) ** (gamma_of(width) + 1)
            for name, parameter in model.named_parameters():
                state[name] = decay * state.get(name, 0) + (1 - decay) * parameter.detach().double()
    for width, state in expected.items():
        for name, value in state.items():
            torch.testing.assert_close(power.averages[width].state[name].double(), value, rtol=0, atol=2e-6)
    restored = PowerAverages(make_model(), EmaConfig(snapshots=8))
    restored.load(power.tensors())
    assert all(torch.equal(value, restored.tensors()[name]) for name, value in power.tensors().items())
    with pytest.raises(ValueError, match=r"are of sigma_rel \[0.05, 0.1\], expected \[0.05, 0.2\]"):
        PowerAverages(model, EmaConfig(snapshots=8, sigma_rel=[0.05, 0.2])).load(power.tensors())


def test_without_snapshots_there_are_no_power_averages():
    power = PowerAverages(make_model(), EmaConfig())
    assert power.tensors() == {}
    power.load({})
    with pytest.raises(ValueError, match="expected"):
        power.load({"0.05/w": torch.zeros(1)})


@pytest.mark.parametrize("wrong", [{"snapshots": 7}, {"sigma_rel": [0.1, 0.1]}, {"sigma_rel": [0.1, 0.3]}])
def test_what_could_fit_nothing_is_refused(wrong):
    with pytest.raises(ValidationError):
        EmaConfig(**wrong)
