"""Conditioning dropout: which conditions the images of a step keep, and how often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from nanodit.config import Config
from nanodit.errors import ConfigError
from train.model.conditions import Subset, parse_subset, subset_name
from train.model.modalities import MODALITIES

# which conditions are kept -> probability; the rest is dropped
PRESETS: dict[str, dict[str, float]] = {
    "seed": {
        "nothing": 0.10, "text": 0.25, "cls": 0.05, "patches": 0.05, "text+cls+patches": 0.10, "pose": 0.05,
        "all": 0.40,
    },
    "default": {
        "nothing": 0.10, "text": 0.20, "text+pose": 0.18, "pose": 0.05, "text+cls": 0.05, "text+cls+pose": 0.05,
        "cls": 0.03, "patches": 0.03, "cls+patches": 0.03, "cls+patches+pose": 0.03, "text+patches": 0.03,
        "text+cls+patches": 0.05, "all": 0.17,
    },
    "quickstart": {"nothing": 0.10, "text": 0.25, "text+pose": 0.40, "all": 0.25},
}  # fmt: skip


class ConditioningConfig(Config):
    """The dropout table: a preset's name, or ``table`` with its own probabilities."""

    preset: Literal["seed", "default", "quickstart"] | None = "default"
    table: dict[str, float] | None = None

    def resolve(self, modalities: Iterable[str] = MODALITIES) -> dict[Subset, float]:
        """Return the table over the ``modalities`` that the data has.

        Without a modality, categories that differ only in it become one ("text" and "text+pose" without pose). Raises
        :class:`ConfigError` for unknown names, negative shares or a sum other than 1.
        """
        if (self.preset is None) == (self.table is None):
            raise ConfigError("conditioning: give either `preset` or `table` (the other one null)")
        named = PRESETS[self.preset] if self.preset is not None else self.table
        if any(not share >= 0 for share in named.values()) or not math.isclose(sum(named.values()), 1, abs_tol=1e-6):
            raise ConfigError(f"conditioning.table: shares must be >= 0 and sum to 1, not {sum(named.values()):g}")
        present = frozenset(modalities)
        table: dict[Subset, float] = {}
        for name, share in named.items():
            subset = parse_subset(name) & present
            table[subset] = table.get(subset, 0.0) + share
        return {subset: share for subset, share in table.items() if share > 0}


def deal(table: Mapping[Subset, float], count: int, generator: np.random.Generator) -> list[Subset]:
    """Deal the images of one optimiser step their subsets by systematic sampling.

    One random offset for ``count`` equidistant points on the cumulated table: each subset's share of the step is exact
    to one image and right in expectation; a permutation makes it independent of the images' order.
    """
    subsets = list(table)
    edges = np.cumsum([table[subset] for subset in subsets])
    points = (np.arange(count) + generator.random()) / count * edges[-1]
    chosen = np.searchsorted(edges, points, side="right").clip(max=len(subsets) - 1)
    return [subsets[i] for i in chosen[generator.permutation(count)]]


def condition_shares(subsets: Sequence[Subset], table: dict[Subset, float]) -> dict[str, float]:
    """Return each subset's share of the step's images."""
    counts = Counter(subsets)
    return {f"train/condition_share/{subset_name(subset)}": counts[subset] / len(subsets) for subset in table}
