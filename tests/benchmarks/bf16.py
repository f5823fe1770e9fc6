"""Bfloat16 beside float32 on this CPU, at the widths of the quickstart and of production: the table that decides which
instructions train.hardware counts as fast.

    python -m tests.benchmarks.bf16 [--threads N] [--rounds N]

Three things for which ``train.precision: auto`` chooses: a product of matrices as a block has it, a micro-step (forward
and backward of one micro-batch of random images, uncompiled and compiled), and Muon's step on all matrices. Both types
take turns in one process; medians of the rounds, and of the rounds' ratios, more than 1 where bfloat16 is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from train.hardware import autocast, cpu_bf16
from train.method.optim import Muon, OptimizerConfig, parameter_groups
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.modalities import MODALITIES, Features
from train.model.network import NanoDiT, build_model

TYPES = (torch.float32, torch.bfloat16)
# hidden_size, depth, num_heads, patch_size; pixels of a side, images, tokens of text, DINO patches of a side, width of
# features. Of production two of its 18 blocks, and half of its side, so that it takes seconds.
SIZES = {"quickstart": (192, 6, 3, 8, 64, 32, 64, 8, 64), "production": (768, 2, 12, 32, 512, 2, 224, 32, 1024)}


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def row(name: str, what: str, steps: list[Callable[[], object]], rounds: int) -> None:
    """Time both types' step in turns, after one round for warming up and compiling, and print a row."""
    times = [[timed(step) for step in steps] for _ in range(rounds + 1)][1:]
    fp32, bf16 = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(one / other for one, other in times)
    print(f"| {name} | {what} | {fp32:.3g} | {bf16:.3g} | {ratio:.2f} |", flush=True)


def conditions(images: int, text: int, side: int, width: int) -> Conditions:
    """Return random conditions of every kind, all kept."""
    return Conditions(
        torch.ones(images, len(MODALITIES), dtype=torch.bool),
        {
            "text": torch.randn(images, text, width), "text_mask": torch.ones(images, text, dtype=torch.bool),
            "cls": torch.randn(images, width), "patches": torch.randn(images, side, side, width),
            "pose": torch.rand(images, 133, 3),
        },
    )  # fmt: skip


def micro_step(model: NanoDiT, given: Conditions, z: Tensor, dtype: torch.dtype) -> None:
    with autocast(z.device, None if dtype == torch.float32 else dtype):
        output = model(z, torch.full((len(z),), 0.5), given)
    output.square().mean().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, bfloat16: {cpu_bf16()}")
    print("| width of | what | float32 ms | bfloat16 ms | ratio |\n|---|---|---|---|---|")
    for name, (hidden, depth, heads, patch, pixels, images, text, side, width) in SIZES.items():
        torch.manual_seed(0)
        tokens = images * (pixels // patch) ** 2
        a, b = torch.randn(tokens, hidden), torch.randn(hidden, 4 * hidden)
        products = [partial(torch.mm, a.to(dtype), b.to(dtype)) for dtype in TYPES]
        row(name, f"product, {tokens} x {hidden} x {4 * hidden}", products, 4 * options.rounds)
        config = ModelConfig(hidden_size=hidden, depth=depth, num_heads=heads, patch_size=patch)
        model = build_model(config, Features(pixels, {"text": width, "cls": width, "patches": width, "pose": 3}))
        given, z = conditions(images, text, side, width), torch.randn(images, 3, pixels, pixels)
        steps = [partial(micro_step, model, given, z, dtype) for dtype in TYPES]
        row(name, f"micro-step, {images} images, {depth} blocks", steps, options.rounds)
        model.compile_blocks(dynamic=True)
        row(name, "the same, compiled", steps, options.rounds)
        group = parameter_groups(model)["muon"]
        for parameter in group.values():
            parameter.grad = torch.randn_like(parameter)
        muons = [Muon(group, OptimizerConfig(), dtype) for dtype in TYPES]
        row(name, "Muon's step", [muon.step for muon in muons], options.rounds)


if __name__ == "__main__":
    main()
