"""The ways of drawing that are compared, and the pictures each of them draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluate.config import EvaluateConfig, SamplerConfig
from evaluate.metrics import degenerate
from evaluate.records import Skipped
from evaluate.subject import Batch, Subject, to_uint8
from prep.errors import ConfigError
from train.conditioning import Subset, parse_subset, subset_name
from train.sample import sample


@dataclass(frozen=True)
class Arm:
    """One way to draw: the conditions kept and the guidance scale (1: none)."""

    name: str
    subset: Subset
    guidance: float


def choose_arms(config: EvaluateConfig, subject: Subject) -> tuple[list[Arm], list[Skipped]]:
    """The arms that training prepared the model for; the others are named as skipped.

    Raises :class:`ConfigError` when two conditions are the same on a dataset that lacks a modality.
    """
    arms, skipped = [], []
    for name, guidance in config.conditions.items():
        subset = parse_subset(name) & frozenset(subject.modalities)
        needs = [subset] if guidance == 1 else [subset, frozenset()]
        untrained = [subset_name(need, subject.modalities) for need in needs if need not in subject.table]
        if untrained:
            skipped.append(Skipped(f"samples/{name}", f"subset {untrained[0]} never trained"))
        else:
            arms.append(Arm(subset_name(subset, subject.modalities), subset, guidance))
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError("conditions: two of them are the same on this dataset, which lacks a modality; remove one")
    return arms, skipped


def choose_subsets(names: Sequence[str], subject: Subject) -> tuple[list[Subset], list[Skipped]]:
    """The condition subsets of the held-out loss, and those that were never trained."""
    subsets = {name: parse_subset(name) & frozenset(subject.modalities) for name in names}
    skipped = [
        Skipped(f"heldout_loss/{name}", f"subset {name} never trained")
        for name, subset in subsets.items()
        if subset not in subject.table
    ]
    return list(dict.fromkeys(subset for subset in subsets.values() if subset in subject.table)), skipped


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
        steps=sampler.steps,
        method=sampler.method,
        guidance=arm.guidance,
    ).cpu()
    return to_uint8(images), [degenerate(image) for image in images.numpy()]
