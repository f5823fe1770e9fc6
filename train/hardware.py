"""What the machine can do, asked in one place: bfloat16, a compiler for torch.compile, the peak of a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nanodit.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16"]  # of what draws and evaluates

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


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute as the caller does for ``fp32``; with TF32's matrix products for ``tf32``; under autocast for ``bf16``.

    TF32 is of NVIDIA's GPUs from Ampere on: products round their factors to 10 bits of mantissa. Elsewhere ``tf32`` is
    ``fp32``.
    """
    if precision == "bf16":
        with autocast(device, torch.bfloat16):
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def matmul_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which matrices of ``dtype`` multiply now; the meta device stands for a GPU."""
    kind = "cuda" if device.type == "meta" else device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def for_matmul(x: torch.Tensor) -> torch.Tensor:
    """Cast what several layers multiply to the dtype that each of them would cast it to."""
    return x.to(matmul_dtype(x.device, x.dtype))


def autocast_dtype(precision: str, device: torch.device, fast_bf16: bool | None = None) -> torch.dtype | None:
    """Return bfloat16 where ``precision`` asks for autocast, or is "auto" on hardware that multiplies it; else None.

    ``fast_bf16`` says whether a CPU counts as such hardware (default: what it can).
    """
    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fast = has_fast_bf16() if fast_bf16 is None else fast_bf16
        precision = "bf16" if on_gpu or (device.type == "cpu" and fast) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


class Gpu(NamedTuple):
    """What a data sheet promises: dense bfloat16 products in 1e12 FLOP/s, and the memory's bandwidth in GB/s (1e9)."""

    tflops: float
    bandwidth: float


# By the name that torch gives, less "NVIDIA ". Products accumulate in float32, at the boost clock. GeForce: appendices
# of NVIDIA's whitepapers "Ampere GA102", "Ada", "RTX Blackwell"; for cards that these leave out, 512 FLOP per
# multiprocessor and cycle, which is what those listed come to. Others: data sheets, half of what they quote with
# sparsity. Bandwidth: data sheets; of GDDR it is the width of the bus times the rate of a pin. B200: of an HGX board,
# whose memory has 7.7 TB/s. RTX PRO 6000: 188 multiprocessors, four times its FP32 rate. The sheets of A30, RTX A5000,
# H200 NVL (which is taken to multiply as the H100 NVL) and GH200 were not at hand: multiprocessors, clock and memory as
# in tests/train/test_hardware.py; the GH200 that is named for the 480 GB of its CPU has 96 GB of HBM3. Laptops, whose
# clock depends on the maker, have names of their own, and so have the other editions of the PRO 6000.
GPUS = {
    "GeForce RTX 3060": Gpu(25.5, 360), "GeForce RTX 3060 Ti": Gpu(32.4, 448), "GeForce RTX 3070": Gpu(40.6, 448),
    "GeForce RTX 3070 Ti": Gpu(43.5, 608), "GeForce RTX 3080": Gpu(59.5, 760), "GeForce RTX 3080 Ti": Gpu(68.2, 912),
    "GeForce RTX 3090": Gpu(71.2, 936), "GeForce RTX 3090 Ti": Gpu(80.0, 1008),
    "GeForce RTX 4060": Gpu(30.2, 272), "GeForce RTX 4060 Ti": Gpu(44.1, 288), "GeForce RTX 4070": Gpu(58.3, 504),
    "GeForce RTX 4070 SUPER": Gpu(71.0, 504), "GeForce RTX 4070 Ti": Gpu(80.2, 504),
    "GeForce RTX 4070 Ti SUPER": Gpu(88.2, 672), "GeForce RTX 4080": Gpu(97.5, 717),
    "GeForce RTX 4080 SUPER": Gpu(104.4, 736), "GeForce RTX 4090 D": Gpu(147.1, 1008),
    "GeForce RTX 4090": Gpu(165.2, 1008),
    "GeForce RTX 5060": Gpu(38.4, 448), "GeForce RTX 5060 Ti": Gpu(47.4, 448), "GeForce RTX 5070": Gpu(61.7, 672),
    "GeForce RTX 5070 Ti": Gpu(87.9, 896), "GeForce RTX 5080": Gpu(112.6, 960), "GeForce RTX 5090": Gpu(209.5, 1792),
    "RTX A5000": Gpu(111.1, 768), "RTX A6000": Gpu(154.8, 768), "RTX 6000 Ada Generation": Gpu(364.2, 960),
    "RTX PRO 6000 Blackwell Workstation Edition": Gpu(503.8, 1792),
    "A10": Gpu(125.0, 600), "A30": Gpu(165.0, 933), "A40": Gpu(149.7, 696),
    "L4": Gpu(121.0, 300), "L40": Gpu(181.0, 864), "L40S": Gpu(362.0, 864),
    "A100-SXM4-40GB": Gpu(312.0, 1555), "A100-SXM4-80GB": Gpu(312.0, 2039), "A100-PCIE-40GB": Gpu(312.0, 1555),
    "A100 80GB PCIe": Gpu(312.0, 1935),
    "H100 80GB HBM3": Gpu(989.4, 3350), "H100 PCIe": Gpu(756.5, 2039), "H100 NVL": Gpu(835.5, 3938),
    "H200": Gpu(989.4, 4800), "H200 NVL": Gpu(835.5, 4800), "GH200 480GB": Gpu(989.4, 4000),
    "GH200 144G HBM3e": Gpu(989.4, 4900), "B200": Gpu(2250.0, 7700),
}  # fmt: skip


def gpu_named(name: str) -> Gpu | None:
    """Return what is known of a GPU by the name that torch gives it; None where no table says it."""
    return GPUS.get(name.removeprefix("NVIDIA "))


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Return the FLOP/s that a GPU could reach in autocast to ``dtype``; None on a CPU, and where no table says it."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.tflops * 1e12


def pick_device(name: str) -> torch.device:
    """Return the device of a config, ``auto`` being the GPU where torch sees one; :class:`ConfigError` without it."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda: torch sees no GPU here; install torch with CUDA or ROCm, or set the device to cpu "
            "(Apple's GPUs are not used)"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
