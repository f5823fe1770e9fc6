"""The ways of drawing that are compared, and the pictures each of them draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluate.config import EvaluateConfig, SamplerConfig
from evaluate.metrics import degenerate
from evaluate.records import Skipped
from evaluate.subject import Batch, Subject, to_uint8
from train.conditioning import MODALITIES, Subset, parse_subset, subset_name
from train.sample import sample


@dataclass(frozen=True)
class Arm:
    """One way to draw: the conditions kept and the guidance scale (1: none)."""

    name: str
    subset: Subset
    guidance: float


def choose_arms(config: EvaluateConfig, subject: Subject) -> tuple[list[Arm], list[Skipped]]:
    """The arms that the dataset and the model's training allow; the others are named as skipped."""
    chosen, skipped = _choose(config.conditions, subject, "samples")
    arms = [
        Arm(subset_name(subset, subject.modalities), subset, config.conditions[name]) for name, subset in chosen.items()
    ]
    return arms, skipped


def choose_subsets(names: Sequence[str], subject: Subject) -> tuple[list[Subset], list[Skipped]]:
    """The condition subsets of the held-out loss, and those that cannot be measured."""
    chosen, skipped = _choose(dict.fromkeys(names, 1.0), subject, "heldout_loss")
    return list(chosen.values()), skipped


def _choose(guidances: Mapping[str, float], subject: Subject, test: str) -> tuple[dict[str, Subset], list[Skipped]]:
    """Read the names of conditions (name -> guidance): name -> subset of those to test, and the skipped ones.

    ``all`` means all that the dataset has; any other name means what it says, or nothing.
    """
    chosen: dict[str, Subset] = {}
    skipped = []
    for name, guidance in guidances.items():
        subset = parse_subset(name)
        if name == "all":
            subset &= frozenset(subject.modalities)
        lacking = [part for part in MODALITIES if part in subset and part not in subject.modalities]
        needs = [subset] if guidance == 1 else [subset, frozenset()]
        untrained = [subset_name(need, subject.modalities) for need in needs if need not in subject.table]
        twins = [other for other, taken in chosen.items() if taken == subset]
        if lacking:
            skipped.append(Skipped(f"{test}/{name}", f"the dataset has no {' and no '.join(lacking)}"))
        elif untrained:
            skipped.append(Skipped(f"{test}/{name}", f"subset {untrained[0]} never trained"))
        elif twins:
            skipped.append(Skipped(f"{test}/{name}", f"the same conditions as {twins[0]} on this dataset"))
        else:
            chosen[name] = subset
    return chosen, skipped


@torch.inference_mode()
def draw(
    subject: Subject, batch: Batch, arm: Arm, seed: int, sampler: SamplerConfig
) -> tuple[np.ndarray, list[str | None]]:
    """Draw one picture for each sample of ``batch``: uint8 (B, H, W, 3), and why any of them cannot be scored.

    The noise is a function of (sample key, seed) alone, so it is the same for every arm, batch size and order.
    """
    images = sample(
        subject.model,
        batch.conditions.keeping(arm.subset).to(subject.device),
        batch.noise(seed).to(subject.device),
        flow=subject.flow,
        sampling=sampler.sampling(arm.guidance),
    ).cpu()
    return to_uint8(images), [degenerate(image) for image in images.numpy()]
