"""What the machine can do, asked in one place: bfloat16, a compiler for torch.compile, the peak of a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from nanodit.errors import ConfigError

# Instructions that multiply bfloat16 on a CPU, by torch's question for their flag, fastest first. Only those are here
# that tests/benchmarks/bf16.py found faster than float32 (docs/measurements.md). ARM's flag `bf16`, of Apple's chips
# from the M2 on too, is not: nobody has run the benchmark there. Flags decide, and no probe, which would decide
# differently on a busy machine.
FAST_BF16 = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}


@cache
def cpu_bf16() -> str:
    """Return with which instructions of ``FAST_BF16`` this CPU multiplies bfloat16 matrices, "none" without any."""
    return next((name for name, asked in FAST_BF16.items() if getattr(torch.cpu, asked)()), "none")


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32."""
    return cpu_bf16() != "none"


@cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler and Python's headers, and Triton for a GPU."""
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    triton = device_type != "cuda" or importlib.util.find_spec("triton") is not None
    return headers and compiler and triton


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return the context in which matrices multiply in ``dtype``, or as they are for None; the meta device has none."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def autocast_dtype(precision: str, device: torch.device, fast_bf16: bool | None = None) -> torch.dtype | None:
    """Return bfloat16 where ``precision`` asks for autocast, or is "auto" on hardware that multiplies it; else None.

    ``fast_bf16`` says whether a CPU counts as such hardware (default: what it can).
    """
    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fast = has_fast_bf16() if fast_bf16 is None else fast_bf16
        precision = "bf16" if on_gpu or (device.type == "cpu" and fast) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


# Dense bfloat16 matrix products with float32 accumulation at the boost clock, in 1e12 FLOP/s, by the name that torch
# gives (less "NVIDIA "). GeForce: appendices of NVIDIA's whitepapers "Ampere GA102", "Ada", "RTX Blackwell"; for cards
# that these leave out, 512 FLOP per multiprocessor and cycle, which is what those listed come to. Others: data sheets,
# half of what they quote with sparsity. Laptops, whose clock depends on the maker, have names of their own.
PEAK_TFLOPS = {
    "GeForce RTX 3060": 25.5, "GeForce RTX 3060 Ti": 32.4, "GeForce RTX 3070": 40.6, "GeForce RTX 3070 Ti": 43.5,
    "GeForce RTX 3080": 59.5, "GeForce RTX 3080 Ti": 68.2, "GeForce RTX 3090": 71.2, "GeForce RTX 3090 Ti": 80.0,
    "GeForce RTX 4060": 30.2, "GeForce RTX 4060 Ti": 44.1, "GeForce RTX 4070": 58.3, "GeForce RTX 4070 SUPER": 71.0,
    "GeForce RTX 4070 Ti": 80.2, "GeForce RTX 4070 Ti SUPER": 88.2, "GeForce RTX 4080": 97.5,
    "GeForce RTX 4080 SUPER": 104.4, "GeForce RTX 4090": 165.2,
    "GeForce RTX 5060": 38.4, "GeForce RTX 5060 Ti": 47.4, "GeForce RTX 5070": 61.7, "GeForce RTX 5070 Ti": 87.9,
    "GeForce RTX 5080": 112.6, "GeForce RTX 5090": 209.5,
    "RTX A6000": 154.8, "A10": 125.0, "A40": 149.7, "L4": 121.0, "L40S": 362.0,
    "A100-SXM4-40GB": 312.0, "A100-SXM4-80GB": 312.0, "A100-PCIE-40GB": 312.0, "A100 80GB PCIe": 312.0,
    "H100 80GB HBM3": 989.4, "H100 PCIe": 756.5, "H100 NVL": 835.5, "H200": 989.4,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Return the FLOP/s that a GPU could reach in autocast to ``dtype``; None on a CPU, and where no table says it."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    tera = PEAK_TFLOPS.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    return None if tera is None else tera * 1e12


def pick_device(name: str) -> torch.device:
    """Return the device of a config, ``auto`` being the GPU where torch sees one; :class:`ConfigError` without it."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda: torch sees no GPU here; install torch with CUDA or ROCm, or set the device to cpu "
            "(Apple's GPUs are not used)"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
