"""The ways of drawing that are compared, and the pictures each of them draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from evaluate.metrics.pixels import degenerate
from evaluate.records import Skipped
from evaluate.subject import Batch, Subject, to_uint8
from nanodit.config import Config
from train.method.sampling import (
    DRAWING,
    NO_GUIDANCE,
    Grid,
    Guidance,
    GuidanceValue,
    Method,
    Sampling,
    sample,
    trajectory_keep_ids,
)
from train.model.conditions import Subset, parse_subset, subset_name
from train.model.modalities import MODALITIES

TRAINED = "trained"  # in place of names: every subset that training drew


class SamplerConfig(Config):
    """The sampler of all pictures; the same for every condition."""

    method: Method = DRAWING.method
    steps: int = Field(default=DRAWING.steps, gt=0)
    grid: Grid = DRAWING.grid  # of the steps' times
    interval: list[float] = Field(default=[0.0, 1.0], min_length=2, max_length=2)  # unshifted t in which guidance acts

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        self.sampling()
        return self

    def sampling(self, guidance: Guidance = NO_GUIDANCE) -> Sampling:
        """Return how pictures with this guidance are drawn."""
        return Sampling(self.method, self.steps, **guidance.fields, interval=tuple(self.interval), grid=self.grid)


@dataclass(frozen=True)
class DrawingArm:
    """One way to draw: the conditions kept and the guidance."""

    name: str
    subset: Subset
    guidance: Guidance


def choose_arms(guidances: Mapping[str, GuidanceValue], subject: Subject) -> tuple[list[DrawingArm], list[Skipped]]:
    """Return the arms (conditions -> guidance) that dataset and training allow; the others are named as skipped."""
    guidances = {name: Guidance.of(value) for name, value in guidances.items()}
    chosen, skipped = _choose(guidances, subject, "samples")
    arms = [DrawingArm(_label(subset, subject), subset, guidances[name]) for name, subset in chosen.items()]
    return arms, skipped


def choose_subsets(names: Sequence[str], subject: Subject) -> tuple[list[Subset], list[Skipped]]:
    """Return the condition subsets of the held-out loss, and those that cannot be measured; TRAINED stands for all."""
    trained = [subset_name(subset, subject.modalities) for subset in sorted(subject.table, key=_size)]
    names = [name for one in names for name in (trained if one == TRAINED else [one])]
    chosen, skipped = _choose(dict.fromkeys(names, NO_GUIDANCE), subject, "heldout_loss")
    return list(chosen.values()), skipped


def named_arm(
    conditions: str, guidance: GuidanceValue | None, guidances: Mapping[str, GuidanceValue], subject: Subject, test: str
) -> DrawingArm | Skipped:
    """Return how pictures given ``conditions`` are drawn, or why they are not; see
    :meth:`evaluate.drawing.context.DrawingContext.arm`.

    The name is that of the conditions, with ``@GUIDANCE`` behind it where ``guidances`` draw the same ones with another
    one.
    """
    usual: dict[str, Guidance] = {}
    for name, value in guidances.items():
        usual.setdefault(_label(_subset(name, subject), subject), Guidance.of(value))  # of twins the first is drawn
    label = _label(_subset(conditions, subject), subject)
    chosen_guidance = usual.get(label, NO_GUIDANCE) if guidance is None else Guidance.of(guidance)
    chosen, skipped = _choose({conditions: chosen_guidance}, subject, test)
    if skipped:
        return skipped[0]
    (subset,) = chosen.values()
    name = label if chosen_guidance == usual.get(label, chosen_guidance) else f"{label}@{chosen_guidance}"
    return DrawingArm(name, subset, chosen_guidance)


def parse(name: str) -> Subset:
    """Read conditions as :func:`train.model.conditions.parse_subset` does, where ``dino`` stands for its two parts."""
    return parse_subset("+".join("cls+patches" if part == "dino" else part for part in name.split("+")))


def _label(subset: Subset, subject: Subject) -> str:
    """Return the name of conditions in samples.parquet: canonical, ``dino`` for its two parts."""
    return subset_name(subset, subject.modalities).replace("cls+patches", "dino")


def _size(subset: Subset) -> tuple[int, str]:
    """Return a key that sorts subsets, the largest first."""
    return -len(subset), subset_name(subset)


def _subset(name: str, subject: Subject) -> Subset:
    """Read a name: ``all`` is all that the dataset has, any other name means what it says, or nothing."""
    return frozenset(subject.modalities) if name == "all" else parse(name)


def untrained(subset: Subset, guidance: Guidance, subject: Subject) -> str | None:
    """Return why a picture given ``subset`` would mean nothing, or None."""
    needs = [subset, *Sampling(**guidance.fields).chain(subset)]
    if lacking := [need for need in needs if need not in subject.table]:
        return f"subset {_label(lacking[0], subject)} never trained"
    if guidance.of_given(subset) != guidance:
        return f"guidance {guidance} has a scale of what is not given"
    if guidance.self_scale != 1 and not subject.tread.enabled:
        return "self-guidance needs a model that was trained with routing"
    return None


def _choose(guidances: Mapping[str, Guidance], subject: Subject, test: str) -> tuple[dict[str, Subset], list[Skipped]]:
    """Read the names of conditions (name -> guidance): name -> subset of those to test, and the skipped ones."""
    chosen: dict[str, Subset] = {}
    skipped = []
    for name, guidance in guidances.items():
        subset = _subset(name, subject)
        lacking = [part for part in MODALITIES if part in subset and part not in subject.modalities]
        twins = [other for other, taken in chosen.items() if taken == subset]
        if lacking:
            skipped.append(Skipped(f"{test}/{name}", f"the dataset has no {' and no '.join(lacking)}"))
        elif reason := untrained(subset, guidance, subject):
            skipped.append(Skipped(f"{test}/{name}", reason))
        elif twins:
            skipped.append(Skipped(f"{test}/{name}", f"the same conditions as {twins[0]} on this dataset"))
        else:
            chosen[name] = subset
    return chosen, skipped


@torch.inference_mode()
def draw(
    subject: Subject, batch: Batch, arm: DrawingArm, seed: int, sampler: SamplerConfig
) -> tuple[np.ndarray, list[str | None]]:
    """Draw one picture for each sample of ``batch``: uint8 (B, H, W, 3), and why any of them cannot be scored.

    The noise is a function of (sample key, seed) alone, so it is the same for every arm, batch size and order, and a
    batch that does not fit into a GPU's memory is drawn in parts.
    """

    def images_of(part: Batch) -> Tensor:
        keep_ids = None
        if arm.guidance.self_scale != 1:
            tokens = part.height * part.width // subject.model.config.patch_size**2
            keep_ids = trajectory_keep_ids(subject.tread, [(key, seed) for key in part.keys], tokens)
        return sample(
            subject.model,
            part.conditions.keeping(arm.subset).to(subject.device),
            part.noise(seed).to(subject.device),
            flow=subject.flow,
            sampling=replace(sampler.sampling(arm.guidance), precision=subject.precision),
            keep_ids=keep_ids,
        ).cpu()

    images = torch.cat(list(subject.as_fits(images_of, batch)))
    return to_uint8(images), [degenerate(image) for image in images.numpy()]
