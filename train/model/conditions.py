"""What the images of a batch are conditioned on, and which of it is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanodit.errors import ConfigError
from prep.dataset.quantise import GROUP, Quantised
from train.model.modalities import MODALITIES, Stored
from train.model.spans import Spans

TEXT_MULTIPLE = 32  # text is padded to a multiple of this within a micro-batch, so that few shapes occur

Subset = frozenset[str]
Empty = Callable[..., Tensor]  # of a shape and a dtype, as torch.empty


def padded_length(tokens: float) -> int:
    """Return the length to which a text of so many tokens is padded."""
    return math.ceil(tokens / TEXT_MULTIPLE) * TEXT_MULTIPLE


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
    """The conditions of a batch of equally large images.

    ``keep`` (B, modalities) says which of ``MODALITIES`` each image keeps. ``tensors`` holds their features by name:
    text (B, L, width) with text_mask (B, L), True at real tokens; cls (B, DINO width); patches (B, h, w, DINO width);
    pose (B, 133, 3) with x, y in [-1, 1] and confidence. Each is an attribute, too, and None where no image keeps it.
    As :func:`pack` leaves them they have the dtypes that are stored, until they are :meth:`unpacked`. ``spans`` says
    which context tokens count, where that is known (:func:`train.model.context.find_spans`).
    """

    keep: Tensor
    tensors: Mapping[str, Tensor]
    spans: Spans | None = None

    def __len__(self) -> int:
        return len(self.keep)

    def __getattr__(self, name: str) -> Tensor | None:
        if _modality(name) not in MODALITIES:
            raise AttributeError(f"conditions have no {name!r}")
        return self.tensors.get(name)

    def keeps(self, modality: str) -> Tensor:
        """Say which images keep a modality, (B,)."""
        return self.keep[:, list(MODALITIES).index(modality)]

    def replace(self, **tensors: Tensor | None) -> Conditions:
        """Return these conditions with other tensors, or without those that are None."""
        merged = {**self.tensors, **tensors}
        return Conditions(self.keep, {name: tensor for name, tensor in merged.items() if tensor is not None})

    def only(self, subset: Iterable[str]) -> Conditions:
        """Return these conditions without the tensors of modalities that are not in ``subset``."""
        kept = frozenset(subset)
        return Conditions(self.keep, {name: value for name, value in self.tensors.items() if _modality(name) in kept})

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """Apply ``function`` to every tensor."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return Conditions(function(self.keep), tensors, self.spans and self.spans.map(function))

    def unpacked(self) -> Conditions:
        """Return these conditions with all features in float32, computed on the device where they lie."""
        tensors = {}
        for name, tensor in self.tensors.items():
            modality = MODALITIES.get(name)
            if modality is None:  # a mask, or the scales of features
                if not name.endswith("_scale"):
                    tensors[name] = tensor
            elif (scale := self.tensors.get(modality.scale)) is not None:
                scales = scale.float().unsqueeze(-1).expand(*scale.shape, GROUP).flatten(-2)
                tensors[name] = tensor.float() * scales[..., : tensor.shape[-1]]
            else:
                tensors[name] = tensor.float()
        return Conditions(self.keep, tensors, self.spans)

    def to(self, device: torch.device | str) -> Conditions:
        """Move every tensor."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, indices: Sequence[int] | slice | Tensor) -> Conditions:
        """Return the conditions of some of the images."""
        select = lambda tensor: tensor[indices]  # noqa: E731
        return Conditions(self.keep, self.tensors).map(select)

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
        kept_by_any = [name for name, kept in zip(MODALITIES, keep.any(0).tolist()) if kept]
        result = Conditions(keep, self.only(kept_by_any).tensors)
        for name in (one.name for one in MODALITIES.values() if one.ragged and one.name in result.tensors):
            mask = result.tensors[MODALITIES[name].mask]
            longest = int(mask[result.keeps(name)].sum(1).max())
            shown = slice(padded_length(longest))
            tensors = {name: result.tensors[name][:, shown], MODALITIES[name].mask: mask[:, shown]}
            result = result.replace(**tensors)
        return result


def _modality(tensor: str) -> str:
    """Return the modality that a tensor of :class:`Conditions`, features, mask or scales, belongs to."""
    return tensor.removesuffix("_mask").removesuffix("_scale")


def collate(*, count: int, **features: Sequence[Stored] | None) -> Conditions:
    """Stack the features of ``count`` images, by modality; text is padded with zeros and masked."""
    return pack(count=count, **features).unpacked()


def pack(*, count: int, empty: Empty = torch.empty, **features: Sequence[Stored] | None) -> Conditions:
    """Do what :func:`collate` does, in the dtypes that the features have, into tensors that ``empty`` returns."""
    given = {name: arrays for name, arrays in features.items() if arrays is not None}
    tensors: dict[str, Tensor] = {}
    for name, arrays in given.items():
        modality = MODALITIES[name]
        if isinstance(arrays[0], Quantised):
            tensors[modality.scale] = _stack([one.scale for one in arrays], empty)
            arrays = [one.values for one in arrays]
        if not modality.ragged:
            tensors[name] = _stack(arrays, empty)
            continue
        length = padded_length(max(len(rows) for rows in arrays))
        padded = empty((count, length, arrays[0].shape[1]), dtype=_dtype(arrays))
        mask = empty((count, length), dtype=torch.bool)
        for i, rows in enumerate(arrays):
            padded[i].numpy()[: len(rows)] = rows
            padded[i, len(rows) :] = 0
            mask[i] = torch.arange(length) < len(rows)
        tensors |= {name: padded, modality.mask: mask}
    return Conditions(torch.tensor([[name in given for name in MODALITIES]] * count), tensors)


def _dtype(arrays: Sequence[np.ndarray]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, np.result_type(*arrays))).dtype


def _stack(arrays: Sequence[np.ndarray], empty: Empty) -> Tensor:
    stacked = empty((len(arrays), *arrays[0].shape), dtype=_dtype(arrays))
    np.stack(arrays, out=stacked.numpy())
    return stacked
