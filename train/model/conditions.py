"""What an image is conditioned on, and which of it is dropped: text, DINO CLS, DINO patches, pose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from nanodit.errors import ConfigError

MODALITIES = ("text", "cls", "patches", "pose")
TEXT_MULTIPLE = 32  # text is padded to a multiple of this within a micro-batch, so that few shapes occur

Subset = frozenset[str]


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
