"""The learning rate of each step: warm-up, then a cosine, or a plateau and a decay at the end; and a run's lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Schedule = Literal["cosine", "wsd"]


def learning_rate(
    step: int,
    total_steps: int,
    lr: float,
    lr_min: float,
    warmup: int | None = None,
    schedule: Schedule = "cosine",
    decay_share: float = 0.2,
) -> float:
    """Return the learning rate of the ``step``-th optimiser step (0-based) of ``total_steps``.

    Linear warm-up to ``lr`` over ``warmup`` steps (None: 5 % of all, at most 500). Then ``cosine``: half a period, over
    all that is left, down to ``lr_min``. Or ``wsd`` (warm-up, stable, decay): ``lr`` until the last ``decay_share`` of
    the steps, on which ``1 - sqrt(p)`` of the range is left, p from 0 to 1. Source of that shape, better there than a
    linear one, and of a fifth as its share: Hägele et al., arXiv 2405.18392, section 3.
    """
    warmup = min(500, total_steps // 20) if warmup is None else warmup
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    start = max(warmup, total_steps - round(decay_share * total_steps))
    progress = max(0.0, (step - start) / max(1, total_steps - start))
    return lr_min + (lr - lr_min) * (1 - math.sqrt(min(progress, 1.0)))


@dataclass(frozen=True)
class Course:
    """The lengths that a run was given one after another: (600, 1000) ran 600 steps and was then continued to 1,000.

    What depends on a run's length takes each part as a run of its own, so the learning rate is warmed up and brought
    down again. Source of that: Ibrahim et al., arXiv 2403.08763, section 6. No step depends on how long the run becomes
    later, so the weights stay a function of config, data, seed and this history.
    """

    totals: tuple[int, ...]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(number of steps before it, number of steps at its end) of each part."""
        return list(pairwise((0, *self.totals)))

    def part(self, step: int) -> tuple[int, int]:
        """Return the part of a step (0-based)."""
        return next((part for part in self.parts if step < part[1]), self.parts[-1])

    def within(self, step: int) -> tuple[int, int]:
        """Return a step's number (0-based) within its part, and the steps of that part."""
        first, end = self.part(step)
        return step - first, end - first

    def snapshot_steps(self, count: int) -> frozenset[int]:
        """Return the steps after which averages are stored: in each part those of a run of that length."""
        return frozenset(step for first, end in self.parts for step in snapshot_steps(end, count) if step > first)


def snapshot_steps(total_steps: int, count: int) -> frozenset[int]:
    """Return the steps, evenly spaced and ending at the last, after which a run stores its averages."""
    return frozenset(total_steps * i // count for i in range(1, count + 1)) - {0}
