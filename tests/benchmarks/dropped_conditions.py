"""What dropped conditions and routing save of a forward pass: FLOPs counted on the meta device, nothing is computed.

    python tests/benchmarks/dropped_conditions.py [--context-patches 256]

NanoDiT 768 / 18 / 12 with 1024 image tokens (512 pixels, patch 16), 256 text tokens, 64 x 64 DINO patches pooled to
``--context-patches`` (0: all 4096), 133 joints; routing as by default, half of the tokens in blocks 1 to 16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanodit.rng import generator
from train.loop.flops import META  # with what it tells torch's counter of our attention
from train.method.dropout import PRESETS, ConditioningConfig, deal
from train.model.conditions import Conditions, Subset, subset_name
from train.model.config import ModelConfig
from train.model.modalities import MODALITIES, Features
from train.model.network import build_model
from train.model.tread import TreadConfig

SIDE, PATCH, TEXT, GRID, WIDTH = 512, 16, 256, 64, 1024
TOKENS = (SIDE // PATCH) ** 2
BATCH, STEPS = 32, 100  # images in a micro-batch, and steps for the mean over micro-batches as they are dealt


class Counter:
    """Counts the forward of one image, in 1e9 floating-point operations."""

    def __init__(self, context_patches: int | None) -> None:
        config = ModelConfig(hidden_size=768, depth=18, num_heads=12, patch_size=PATCH, context_patches=context_patches)
        self.tread = TreadConfig(enabled=True)
        with torch.device("meta"):
            self.model = build_model(
                config, Features(SIDE, {"text": WIDTH, "cls": WIDTH, "patches": WIDTH, "pose": 3}), self.tread
            )
        self._known: dict[tuple[Subset, bool], tuple[int, float]] = {}

    def __call__(self, subset: Subset, routed: bool = False) -> tuple[int, float]:
        """Return the number of context tokens and the operations."""
        if (subset, routed) not in self._known:
            conditions = self._conditions(subset)
            with META, FlopCounterMode(display=False) as counter:
                keep_ids = torch.zeros(1, self.tread.kept(TOKENS), dtype=torch.int64) if routed else None
                self.model(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1), conditions, keep_ids)
            tokens = self.model.encode_context(conditions, SIDE, SIDE).tokens.shape[0]
            self._known[subset, routed] = tokens, counter.get_total_flops() / 1e9
        return self._known[subset, routed]

    def micro_batch(self, subsets: Sequence[Subset], routed: bool) -> float:
        """Return the operations of a micro-batch; what a mixed part embeds in vain, a few thousandths, is left out."""
        return sum(self(subset, routed)[1] for subset in subsets)

    def _conditions(self, subset: Subset) -> Conditions:
        zeros = {
            "text": torch.zeros(1, TEXT, WIDTH, device="meta"), "cls": torch.zeros(1, WIDTH, device="meta"),
            "patches": torch.zeros(1, GRID, GRID, WIDTH, device="meta"), "pose": torch.zeros(1, 133, 3, device="meta"),
        }  # fmt: skip
        mask = torch.ones(1, TEXT, dtype=torch.bool, device="meta") if "text" in subset else None
        keep = torch.ones(1, len(MODALITIES), dtype=torch.bool, device="meta")
        return Conditions(keep, {}).replace(text_mask=mask, **{name: zeros[name] for name in subset})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context-patches", type=int, default=256)
    count = Counter(parser.parse_args().context_patches or None)
    everything = count(frozenset(MODALITIES))[1]
    print(f"{'kept':<24}{'context':>8}{'GFLOP':>9}{'of all':>8}{'routed':>9}{'of all':>8}")
    for subset in ConditioningConfig(preset="default").resolve():
        (tokens, dense), (_, routed) = count(subset), count(subset, routed=True)
        shares = f"{dense:>9.1f}{dense / everything:>8.0%}{routed:>9.1f}{routed / everything:>8.0%}"
        print(f"{subset_name(subset):<24}{tokens:>8}{shares}")
    print(f"\nmean of a preset, as a share of all kept: an image by itself, and in micro-batches of {BATCH}")
    print(f"{'preset':<24}{'alone':>8}{'1 a step':>10}{'8 a step':>10}{'routed':>8}")
    for preset in PRESETS:
        table = ConditioningConfig(preset=preset).resolve()
        alone = sum(share * count(subset)[1] for subset, share in table.items())
        means = [mean(count, table, *arguments) for arguments in ((1, False), (8, False), (8, True))]
        one, eight, routed = (value / everything for value in means)
        print(f"{preset:<24}{alone / everything:>8.0%}{one:>10.0%}{eight:>10.0%}{routed:>8.0%}")


def mean(count: Counter, table: dict[Subset, float], micro_batches: int, routed: bool) -> float:
    """Return the operations of an image where a step deals its subsets to so many micro-batches."""
    total, order = 0.0, list(table)
    for step in range(STEPS):
        dealt = sorted(deal(table, BATCH * micro_batches, generator("step", step)), key=order.index)
        total += sum(count.micro_batch(dealt[i : i + BATCH], routed) for i in range(0, len(dealt), BATCH))
    return total / (STEPS * BATCH * micro_batches)


if __name__ == "__main__":
    main()
