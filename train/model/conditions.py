"""What an image is conditioned on, and which of it is dropped: text, DINO CLS, DINO patches, pose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanodit.config import Config
from nanodit.errors import ConfigError
from train.data.flip import flip_pose

MODALITIES = ("text", "cls", "patches", "pose")
TEXT_MULTIPLE = 32  # text is padded to a multiple of this within a micro-batch, so that few shapes occur

Subset = frozenset[str]

# which conditions are kept -> probability; the rest of the four is dropped
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


def parse_subset(name: str) -> Subset:
    """Read ``text+pose``, ``all`` or ``nothing``; raises :class:`ConfigError` that lists the known names."""
    if name in ("all", "nothing"):
        return frozenset(MODALITIES if name == "all" else ())
    subset = frozenset(name.split("+"))
    if not subset <= set(MODALITIES):
        unknown = ", ".join(sorted(subset - set(MODALITIES)))
        raise ConfigError(f"conditions {name!r}: unknown {unknown}; use `all`, `nothing` or {' + '.join(MODALITIES)}")
    return subset


def subset_name(subset: Iterable[str], modalities: Iterable[str] = MODALITIES) -> str:
    """Return the canonical name of a subset: ``all``, ``nothing`` or its parts joined by ``+``."""
    subset = frozenset(subset)
    if not subset:
        return "nothing"
    if subset == frozenset(modalities):
        return "all"
    return "+".join(name for name in MODALITIES if name in subset)


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


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch of equally large images; a modality that no image keeps is None.

    text (B, L, text width) with text_mask (B, L), True at real tokens; cls (B, DINO width); patches (B, h, w, DINO
    width); pose (B, 133, 3) with x, y in [-1, 1] and confidence; keep (B, 4) says which of MODALITIES each image keeps.
    """

    keep: Tensor
    text: Tensor | None = None
    text_mask: Tensor | None = None
    cls: Tensor | None = None
    patches: Tensor | None = None
    pose: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keep)

    def keeps(self, modality: str) -> Tensor:
        """Say which images keep a modality, (B,)."""
        return self.keep[:, MODALITIES.index(modality)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """Apply ``function`` to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditions(**{name: None if value is None else function(value) for name, value in values.items()})

    def to(self, device: torch.device | str) -> Conditions:
        """Move every tensor."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, indices: Sequence[int] | slice | Tensor) -> Conditions:
        """Return the conditions of some of the images."""
        return self.map(lambda tensor: tensor[indices])

    def keeping(self, subset: Iterable[str] | Sequence[Subset]) -> Conditions:
        """Keep ``subset`` for all images, or the i-th of a list of subsets for image i; waits for a GPU it lies on.

        A modality that nobody keeps is removed and text is trimmed to the longest that is kept, so that what is dropped
        costs nothing. An image keeps at most what it had.
        """
        subsets = list(subset)
        if not subsets or isinstance(subsets[0], str):
            subsets = [frozenset(subsets)] * len(self)
        wanted = torch.tensor([[name in kept for name in MODALITIES] for kept in subsets], device=self.keep.device)
        keep = self.keep & wanted
        kept_by_any = dict(zip(MODALITIES, keep.any(0).tolist()))
        result = replace(self, keep=keep, **{name: None for name, kept in kept_by_any.items() if not kept})
        if result.text is None:
            return replace(result, text_mask=None)
        longest = int(result.text_mask[keep[:, 0]].sum(1).max())
        length = math.ceil(longest / TEXT_MULTIPLE) * TEXT_MULTIPLE
        return replace(result, text=result.text[:, :length], text_mask=result.text_mask[:, :length])


def condition_shares(subsets: Sequence[Subset], table: dict[Subset, float]) -> dict[str, float]:
    """Return each subset's share of the step's images."""
    counts = Counter(subsets)
    return {f"train/condition_share/{subset_name(subset)}": counts[subset] / len(subsets) for subset in table}


def load_conditions(dataset: Any, rows: Sequence[dict[str, Any]], flips: Sequence[bool] | None = None) -> Conditions:
    """Read the stored features of some rows of one bucket (a :class:`prep.dataset.layout.Dataset`), everything kept.

    ``flips`` says of which images the conditions of the mirror image are wanted, all of them; None: of none.
    """
    layers = dataset.info["layers"]
    has = {"text": "t5" in layers, "cls": "dino" in layers, "patches": "dino" in layers, "pose": "pose" in layers}
    flips = flips or [False] * len(rows)

    def read(member: str) -> list[np.ndarray]:
        load = getattr(dataset, member)
        return [load(row, flipped=True) if flip else load(row) for row, flip in zip(rows, flips)]

    return collate(
        text=read("t5") if has["text"] else None,
        cls=read("cls") if has["cls"] else None,
        patches=read("patches") if has["patches"] else None,
        pose=[flip_pose(dataset.pose(row)) if flip else dataset.pose(row) for row, flip in zip(rows, flips)]
        if has["pose"]
        else None,
        count=len(rows),
    )


def collate(*, text=None, cls=None, patches=None, pose=None, count: int) -> Conditions:
    """Stack per-image NumPy features into :class:`Conditions`; text is padded with zeros and masked."""
    keep = torch.tensor([[feature is not None for feature in (text, cls, patches, pose)]] * count)
    stack = lambda arrays: torch.from_numpy(np.stack(arrays).astype(np.float32))  # noqa: E731
    padded = mask = None
    if text is not None:
        length = math.ceil(max(len(tokens) for tokens in text) / TEXT_MULTIPLE) * TEXT_MULTIPLE
        padded = torch.zeros(count, length, text[0].shape[1])
        mask = torch.zeros(count, length, dtype=torch.bool)
        for i, tokens in enumerate(text):
            padded[i, : len(tokens)] = torch.from_numpy(tokens.astype(np.float32))
            mask[i, : len(tokens)] = True
    return Conditions(
        keep=keep,
        text=padded,
        text_mask=mask,
        cls=None if cls is None else stack(cls),
        patches=None if patches is None else stack(patches),
        pose=None if pose is None else stack(pose),
    )
