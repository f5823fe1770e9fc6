"""A micro-step, forwards and backwards, beside a plain network of the kind that came before.

    python -m tests.benchmarks.micro_step [--precision fp32|bf16] [--rounds 5]

Both 384 wide, 12 deep, 6 heads, 256 pixels in patches of 16, 4 images with captions of 280 tokens, 256 DINO patches,
133 joints, conditions dealt by the default table. The plain one has self-attention and cross-attention with LayerNorm,
an adaLN of its own in each block, captions padded to 512 tokens and masked, and as many null tokens as a dropped
condition has tokens. Routed, blocks 1 to 10 of either see half of the tokens. One thread, process time, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodit.rng import generator
from train.hardware import autocast, autocast_dtype
from train.method.dropout import ConditioningConfig, deal
from train.model.conditions import Conditions, collate
from train.model.config import ModelConfig
from train.model.context import find_spans, token_counts
from train.model.modalities import MODALITIES, Features
from train.model.network import build_model
from train.model.tread import TreadConfig, draw_keep_ids, put_back, take

IMAGES, SIDE, TEXT, PADDED, GRID, WIDTH, TOKENS = 4, 256, 280, 512, 16, 1024, 256
CPU = torch.device("cpu")


class PlainBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for _ in range(3))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.q, self.kv, self.cross_out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.modulation = nn.Linear(d, 6 * d)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Read x (b, n, d), condition (b, d), context (b, m, d), mask (b, 1, 1, m)."""
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        q, k, v = self.qkv(self.norms[0](x) * (1 + scale) + shift).chunk(3, dim=2)
        x = x + gate * self.out(self._attend(q, k, v, None))
        k, v = self.kv(context).chunk(2, dim=2)
        x = x + self.cross_out(self._attend(self.q(self.norms[1](x)), k, v, mask))
        return x + mlp_gate * self.mlp(self.norms[2](x) * (1 + mlp_scale) + mlp_shift)


class Plain(nn.Module):
    """The network with these blocks."""

    def __init__(self, d: int = 384, depth: int = 12, heads: int = 6, patch: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.embed, self.final = nn.Linear(3 * patch**2, d), nn.Linear(d, 3 * patch**2)
        self.position = nn.Parameter(torch.zeros(TOKENS, d))
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        widths = {"text": WIDTH, "cls": WIDTH, "patches": WIDTH, "pose": 3}
        self.inputs = nn.ModuleDict({name: nn.Linear(width, d) for name, width in widths.items()})
        self.null = nn.ParameterDict({name: nn.Parameter(torch.zeros(d)) for name in widths})
        self.blocks = nn.ModuleList(PlainBlock(d, heads) for _ in range(depth))

    def forward(
        self, z: Tensor, t: Tensor, features: dict[str, Tensor], keep: Tensor, mask: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        """Read features by name (b, m, width), keep (b, modalities), mask (b, 1, 1, m) of what is not padding."""
        context = [
            torch.where(keep[:, i, None, None], self.inputs[name](value), self.null[name])
            for i, (name, value) in enumerate(features.items())
        ]
        x = self.embed(F.pixel_unshuffle(z, self.patch).flatten(2).transpose(1, 2)) + self.position
        condition = self.time(torch.outer(t, torch.arange(256.0)).cos())
        joined = torch.cat(context, 1)
        for i, block in enumerate(self.blocks):
            if ids is not None and i == 1:
                passing, x = x, take(x, ids)
            x = block(x, condition, joined, mask)
            if ids is not None and i == len(self.blocks) - 2:
                x = put_back(passing, x, ids)
        return self.final(x)


def given(step: int) -> tuple[Conditions, tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Return the conditions of a micro-batch for our network and for the plain one."""
    rng = generator("micro-step", step)
    arrays = {
        "text": rng.standard_normal((IMAGES, TEXT, WIDTH), np.float32),
        "cls": rng.standard_normal((IMAGES, WIDTH), np.float32),
        "patches": rng.standard_normal((IMAGES, GRID, GRID, WIDTH), np.float32),
        "pose": rng.uniform(0.1, 1, (IMAGES, 133, 3)).astype(np.float32),
    }
    every = collate(count=IMAGES, **{name: list(value) for name, value in arrays.items()})
    subsets = deal(ConditioningConfig(preset="default").resolve(), IMAGES, generator("subsets", step))
    ours = every.keeping(subsets)
    counts = token_counts(ours, ModelConfig(), {"dino_h": GRID, "dino_w": GRID})
    ours = replace(ours, spans=find_spans(ours, tuple(MODALITIES), counts))
    keep = torch.tensor([[name in subset for name in arrays] for subset in subsets])
    features = {name: torch.from_numpy(value.reshape(IMAGES, -1, value.shape[-1])) for name, value in arrays.items()}
    features["text"] = F.pad(features["text"], (0, 0, 0, PADDED - TEXT))
    real = torch.arange(PADDED) < TEXT
    padded = real | ~keep[:, :1]  # null tokens are all seen
    mask = F.pad(padded, (0, 1 + GRID**2 + 133), value=True)[:, None, None]
    return ours, (features, keep, mask)


def seconds(function: Callable[[], Tensor], dtype: torch.dtype | None, model: nn.Module) -> float:
    model.zero_grad()
    start = time.process_time()
    with autocast(CPU, dtype):
        output = function()
    output.float().square().mean().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = autocast_dtype(arguments.precision, CPU)
    tread, features = TreadConfig(enabled=True), Features(SIDE, dict.fromkeys(MODALITIES, WIDTH) | {"pose": 3})
    ours, plain = build_model(ModelConfig(), features, tread).train(), Plain().train()
    times: dict[str, list[float]] = {"plain": [], "dense": [], "plain routed": [], "routed": []}
    for step in range(-1, arguments.rounds):
        conditions, theirs = given(step)
        z, t = torch.randn(IMAGES, 3, SIDE, SIDE), torch.rand(IMAGES)
        drawn = [draw_keep_ids(generator("keep", step, i), TOKENS, tread.kept(TOKENS)) for i in range(IMAGES)]
        keep_ids = torch.from_numpy(np.stack(drawn))
        calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "plain": (plain, lambda z=z, t=t, theirs=theirs: plain(z, t, *theirs)),
            "plain routed": (plain, lambda z=z, t=t, theirs=theirs, ids=keep_ids: plain(z, t, *theirs, ids)),
            "dense": (ours, lambda z=z, t=t, given=conditions: ours(z, t, given)),
            "routed": (ours, lambda z=z, t=t, given=conditions, ids=keep_ids: ours(z, t, given, ids)),
        }
        for name, (model, call) in calls.items():
            spent = seconds(call, dtype, model)
            if step >= 0:  # the first warms up
                times[name].append(spent)
    print(f"{dtype or torch.float32}, {arguments.rounds} micro-batches, seconds of process time (median):")
    for name, spent in times.items():
        print(f"{name:<14}{statistics.median(spent):>6.2f}")
    for name, other in (("dense", "plain"), ("routed", "plain routed"), ("routed", "plain")):
        each = [a / b for a, b in zip(times[name], times[other])]
        ratio = sum(times[name]) / sum(times[other])
        print(f"{name} / {other}: {ratio:.2f} ({', '.join(f'{one:.2f}' for one in each)})")


if __name__ == "__main__":
    main()
