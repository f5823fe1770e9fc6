"""What the machine can do, asked in one place: fast bfloat16 and a compiler for torch.compile."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch


@cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX), several times faster than float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler and Python's headers, and Triton for a GPU."""
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    triton = device_type != "cuda" or importlib.util.find_spec("triton") is not None
    return headers and compiler and triton


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where ``precision`` asks for autocast, or is "auto" on hardware that multiplies it; else None."""
    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if on_gpu or (device.type == "cpu" and has_fast_bf16()) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
