"""The card and its two ceilings: what it multiplies and what it moves, and which kernels attention may use."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from train import hardware
from train.check.report import Report, Setting, constant
from train.check.timing import median_seconds

BACKENDS = (
    SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH,
)  # fmt: skip


def check(setting: Setting, report: Report) -> None:
    """Say what the machine is, and measure it against the table of peaks."""
    device = setting.device
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Triton {_triton()}"
    report.note("torch", f"{torch.__version__}, {versions}")
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free"
        report.note("card", f"{properties.name}, capability {capability}, {memory}, driver {_driver()}")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        report.note("bfloat16", "multiplied in hardware" if bf16 else "not multiplied in hardware: training is fp32")
    else:
        bf16 = f"bfloat16: {hardware.cpu_bf16()}"
        report.note("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {bf16}, {torch.get_num_threads()} threads")
    report.note("compiler", "found" if hardware.can_compile(device.type) else "none: train.compile has no effect")
    report.note("copy", f"{bandwidth(setting) / 1e9:.4g} GB/s read and written together")
    for dtype in (torch.bfloat16, torch.float32):
        report.note(f"{dtype} products", f"{flop_rate(setting, dtype) / 1e12:.4g} TFLOP/s")
    if setting.on_gpu:
        peak, table = hardware.peak_flops(device, torch.bfloat16), constant(hardware, "GPUS")
        if peak:
            measured = flop_rate(setting, torch.bfloat16) / 1e12
            report.estimate("peak of bf16", peak / 1e12, measured, "TFLOP/s", table, low=0.5, high=1.05)
        else:
            report.note("peak of bf16", f"this card is not in {table}: no MFU is logged, and plan knows no time for it")
    _attention(setting, report)


def bandwidth(setting: Setting) -> float:
    """Return the bytes a second that a copy within the device reads and writes."""
    source = torch.empty(1 << (30 if setting.on_gpu else 24), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), setting.device)


def flop_rate(setting: Setting, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large product of matrices of random numbers; those of zeros take less power."""
    side = 8192 if setting.on_gpu else 512
    a = torch.randn(side, side, device=setting.device).to(dtype)
    return 2 * side**3 / median_seconds(lambda: a @ a, setting.device)


def _triton() -> str:
    with suppress(PackageNotFoundError):
        return version("triton")
    return "none"


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    return "unknown"


def _attention(setting: Setting, report: Report) -> None:
    """Try each kernel on a call of the network's kind: with the mask of context tokens, and without any."""
    device = setting.device
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    batch, heads, queries, width = (8, 12, 1024, 64) if setting.on_gpu else (2, 2, 64, 16)
    for keys in (queries + 368, queries + 371):  # a multiple of 8, and not
        q = torch.randn(batch, heads, queries, width, device=device, dtype=dtype)
        k, v = torch.randn(2, batch, heads, keys, width, device=device, dtype=dtype)
        mask = torch.arange(keys, device=device) < keys - 40
        for name, masked in (("masked", mask.expand(batch, 1, 1, keys)), ("unmasked", None)):
            times = []
            for backend in BACKENDS:
                try:
                    with sdpa_kernel(backend):
                        call = lambda: F.scaled_dot_product_attention(q, k, v, masked)  # noqa: B023, E731
                        times.append(f"{backend.name} {median_seconds(call, device) * 1e3:.3g} ms")
                except RuntimeError:  # this kernel does not take such a call
                    times.append(f"{backend.name} cannot")
            report.note(f"attention, {keys} keys, {name}", ", ".join(times))
