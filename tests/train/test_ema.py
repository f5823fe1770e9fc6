"""The average forgets the first weights, matches every parameter and never aliases them."""

from __future__ import annotations

import pytest
import torch

from tests.train.test_model import make_model
from train.ema import EMA, ema_decay


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
    model = make_model()
    ema = EMA(model, 100, decay=0.5)
    start = {name: value.clone() for name, value in ema.state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert ema.update(model, 1) == 0.5
    for name, value in ema.state.items():
        torch.testing.assert_close(value, start[name] + 0.5)


def test_trap_27_average_and_weights_never_alias():
    model, copy = make_model(), make_model()
    ema = EMA(model, 100)
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
    ema = EMA(model, 100)
    renamed = torch.nn.Module()
    renamed._orig_mod = model
    with pytest.raises(ValueError, match="_orig_mod"):
        ema.update(renamed, 1)
    with pytest.raises(ValueError, match="differ"):
        ema.load(dict(list(ema.state.items())[1:]))
