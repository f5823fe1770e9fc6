"""The learning rate of each step: warm-up, then a cosine, or a plateau and a decay at the end."""

from __future__ import annotations

import math
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
