"""What follows from what the machine can do."""

from __future__ import annotations

import pytest
import torch

from nanodit.errors import ConfigError
from train import hardware
from train.hardware import GPUS, autocast_dtype, can_compile, cpu_bf16, has_fast_bf16, peak_flops, pick_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, None)])
def test_precision_auto_follows_the_hardware(monkeypatch, fast, expected):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda: fast)
    assert autocast_dtype("auto", CPU) is expected
    assert autocast_dtype("auto", CPU, fast_bf16=False) is None, "a run may have begun without"
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, "amx"), ({"avx512_f": True}, "none"),
     ({"avx512_f": True, "avx512_bf16": True}, "avx512_bf16"),
     ({"architecture": "arm64", "neon": True, "bf16": True, "sve_bf16": True}, "none")],
)  # fmt: skip
def test_flags_decide_how_bfloat16_is_multiplied(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu_bf16.cache_clear()
    assert cpu_bf16() == expected
    assert has_fast_bf16() is (expected != "none")
    monkeypatch.undo()
    cpu_bf16.cache_clear()


def test_rocm_is_a_gpu_of_torch_whose_peak_is_unknown(monkeypatch):
    card = torch.device("cuda")  # the name that torch for ROCm gives to AMD's, too
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon RX 7900 XTX")
    assert pick_device("auto") == pick_device("cuda") == card
    assert autocast_dtype("auto", card) is torch.bfloat16
    assert peak_flops(card, torch.bfloat16) is None


def test_a_mac_without_cuda_computes_on_its_processor_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "neon": True, "bf16": True})
    cpu_bf16.cache_clear()
    assert pick_device("auto") == CPU
    assert autocast_dtype("auto", CPU) is None
    with pytest.raises(ConfigError, match="Apple's GPUs are not used"):
        pick_device("cuda")
    monkeypatch.undo()
    cpu_bf16.cache_clear()


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    can_compile.cache_clear()
    assert can_compile("cpu") is False
    can_compile.cache_clear()


# multiprocessors, boost clock in GHz and FLOP per multiprocessor and cycle: another way to the data sheets' numbers
SPECIFIED = {
    "GeForce RTX 3060": (28, 1.777, 512), "GeForce RTX 3080": (68, 1.710, 512), "GeForce RTX 3090": (82, 1.695, 512),
    "GeForce RTX 4060 Ti": (34, 2.535, 512), "GeForce RTX 4070 Ti SUPER": (66, 2.610, 512),
    "GeForce RTX 4090": (128, 2.520, 512), "GeForce RTX 5080": (84, 2.617, 512), "GeForce RTX 5090": (170, 2.407, 512),
    "RTX A6000": (84, 1.800, 1024), "A40": (84, 1.740, 1024), "L4": (58, 2.040, 1024), "A10": (72, 1.695, 1024),
    "A100-SXM4-80GB": (108, 1.410, 2048), "H100 80GB HBM3": (132, 1.830, 4096), "H200": (132, 1.830, 4096),
    "H100 PCIe": (114, 1.620, 4096), "GeForce RTX 4090 D": (114, 2.520, 512), "RTX A5000": (64, 1.695, 1024),
    "RTX 6000 Ada Generation": (142, 2.505, 1024), "RTX PRO 6000 Blackwell Workstation Edition": (188, 2.617, 1024),
    "A30": (56, 1.440, 2048), "L40": (142, 2.490, 512), "GH200 480GB": (132, 1.830, 4096), "B200": (148, 1.860, 8192),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_peaks_follow_from_multiprocessors_and_clock(name):
    multiprocessors, clock, per_cycle = SPECIFIED[name]
    assert GPUS[name].tflops == pytest.approx(multiprocessors * clock * per_cycle / 1e3, rel=0.005)


# bits of the memory's bus and Gbit/s of a pin
MEMORY = {
    "GeForce RTX 3060": (192, 15), "GeForce RTX 3060 Ti": (256, 14), "GeForce RTX 3070": (256, 14),
    "GeForce RTX 3070 Ti": (256, 19), "GeForce RTX 3080": (320, 19), "GeForce RTX 3080 Ti": (384, 19),
    "GeForce RTX 3090": (384, 19.5), "GeForce RTX 3090 Ti": (384, 21), "GeForce RTX 4060": (128, 17),
    "GeForce RTX 4060 Ti": (128, 18), "GeForce RTX 4070": (192, 21), "GeForce RTX 4070 SUPER": (192, 21),
    "GeForce RTX 4070 Ti": (192, 21), "GeForce RTX 4070 Ti SUPER": (256, 21), "GeForce RTX 4080": (256, 22.4),
    "GeForce RTX 4080 SUPER": (256, 23), "GeForce RTX 4090": (384, 21), "GeForce RTX 4090 D": (384, 21),
    "GeForce RTX 5060": (128, 28), "GeForce RTX 5060 Ti": (128, 28), "GeForce RTX 5070": (192, 28),
    "GeForce RTX 5070 Ti": (256, 28), "GeForce RTX 5080": (256, 30), "GeForce RTX 5090": (512, 28),
    "RTX A5000": (384, 16), "RTX A6000": (384, 16), "RTX 6000 Ada Generation": (384, 20),
    "RTX PRO 6000 Blackwell Workstation Edition": (512, 28), "A10": (384, 12.5), "A30": (3072, 2.43),
    "A40": (384, 14.5), "L4": (192, 12.5), "L40": (384, 18), "L40S": (384, 18), "A100-SXM4-40GB": (5120, 2.43),
    "A100-PCIE-40GB": (5120, 2.43), "A100-SXM4-80GB": (5120, 3.186), "A100 80GB PCIe": (5120, 3.024),
    "H100 80GB HBM3": (5120, 5.235), "H100 PCIe": (5120, 3.186), "H100 NVL": (6144, 5.1), "H200": (6144, 6.25),
    "H200 NVL": (6144, 6.25), "GH200 480GB": (6144, 5.2), "GH200 144G HBM3e": (6144, 6.4), "B200": (8192, 7.5),
}  # fmt: skip


def test_the_bandwidths_follow_from_bus_and_rate():
    assert MEMORY.keys() == GPUS.keys()
    for name, (bits, rate) in MEMORY.items():
        assert GPUS[name].bandwidth == pytest.approx(bits / 8 * rate, rel=0.01), name


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12), ("NVIDIA H200", torch.bfloat16, 989.4e12),
     ("NVIDIA H200", None, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
     ("AMD Radeon RX 7900 XTX", torch.bfloat16, None)],
)  # fmt: skip
def test_a_peak_is_known_or_absent(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == expected
    assert peak_flops(CPU, torch.bfloat16) is None
