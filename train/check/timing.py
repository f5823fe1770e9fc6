"""Seconds on a device that computes while the host goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, what the device still computes included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def median_seconds(
    function: Callable[[], object], device: torch.device, *, warm_up: int = 2, repeats: int = 5
) -> float:
    """Return the median of some calls after a few that do not count."""
    for _ in range(warm_up):
        function()
    return statistics.median(seconds_of(function, device) for _ in range(repeats))
