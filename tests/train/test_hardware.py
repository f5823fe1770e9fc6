"""What follows from what the machine can do."""

from __future__ import annotations

import pytest
import torch

from train import hardware
from train.hardware import autocast_dtype, can_compile

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, None)])
def test_precision_auto_follows_the_hardware(monkeypatch, fast, expected):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda: fast)
    assert autocast_dtype("auto", CPU) is expected
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) is torch.bfloat16


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    can_compile.cache_clear()
    assert can_compile("cpu") is False
    can_compile.cache_clear()
