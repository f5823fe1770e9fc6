"""One Muon step on a CPU: the batched form of train/method/optim.py against torch.optim.Muon and against itself written
out.

    PYTHONPATH=. python tests/benchmarks/muon.py

Interleaved in one process, one thread, process time, medians; the ratios are what counts, more than 1 where ours is
faster. torch's takes the matrices one at a time and computes in bfloat16, whatever the machine does best. ``apart`` is
the largest relative distance between our bfloat16 updates and torch's.
"""

from __future__ import annotations

import statistics
import time
from unittest.mock import patch

import torch
from torch import Tensor, nn

from train.method import optim
from train.method.optim import NS_COEFFICIENTS, Muon, OptimizerConfig, parameter_groups
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import build_model

REPEATS = 5
LR = 1e-3
SIZES = {"quickstart": (192, 6, 3), "baseline": (384, 12, 6)}  # hidden_size, depth, num_heads


def written_out(g_kab: Tensor) -> Tensor:
    """The formula term by term, each product a matrix of its own."""
    tall = g_kab.shape[1] > g_kab.shape[2]
    x = g_kab.transpose(1, 2) if tall else g_kab
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    a, b, c = NS_COEFFICIENTS
    for _ in range(OptimizerConfig().muon_ns_steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def matrices(hidden_size: int, depth: int, num_heads: int) -> dict[str, nn.Parameter]:
    """A model's Muon group, with gradients."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    model = build_model(config, Features(64, {"text": 64, "cls": 64, "patches": 64, "pose": 3}))
    group = parameter_groups(model)["muon"]
    for parameter in group.values():
        parameter.grad = torch.randn_like(parameter)
    return group


def seconds(step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'model':<12}{'':<14}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}{'written out':>13}{'ratio':>7}{'apart':>9}")
    for name, size in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            group, other = matrices(*size), matrices(*size)
            ours = Muon(group, OptimizerConfig(), dtype)
            ours.lr = LR
            theirs = torch.optim.Muon(
                list(other.values()), lr=LR, weight_decay=0.0, nesterov=True, adjust_lr_fn="match_rms_adamw"
            )
            before = {key: value.detach().clone() for key, value in group.items()}
            ours.step()
            theirs.step()
            apart = max(
                float(((group[key] - other[key]).norm() / (other[key] - value).norm()).detach())
                for key, value in before.items()
            )
            times = []
            for _ in range(REPEATS):
                row = [seconds(ours.step), seconds(theirs.step)]
                with patch.object(optim, "orthogonalize", written_out):
                    row.append(seconds(ours.step))
                times.append(row)
            a, b, c = (1e3 * statistics.median(column) for column in zip(*times))
            ratios = [statistics.median(row[i] / row[0] for row in times) for i in (1, 2)]
            dtype_name = str(dtype).removeprefix("torch.")
            print(
                f"{name:<12}{dtype_name:<14}{a:>9.0f}{b:>10.0f}{ratios[0]:>7.2f}{c:>13.0f}{ratios[1]:>7.2f}{apart:>9.1e}"
            )


if __name__ == "__main__":
    main()
