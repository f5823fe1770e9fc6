"""Which context tokens of a batch count, and where they lie when they are kept side by side without padding.

Shape letters as in :mod:`train.model.network`; M is the number of context tokens of a batch that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """The context tokens of each image that count, one image after another.

    ``lengths`` says how many each image has; the host knows them, so that nothing waits for a device. ``index`` (M,)
    are their places in the padded context, image by image (b m,), ``slots`` (M,) in one with room for the longest
    alone, int64; ``offsets`` (b + 1,), int32, is where each image begins and ends.
    """

    lengths: tuple[int, ...]
    index: Tensor
    slots: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, mask_bm: Tensor) -> Spans:
        """Find the tokens where a mask is True; waits for a GPU it lies on."""
        counts, index = mask_bm.sum(1), mask_bm.flatten().nonzero().squeeze(1)
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=mask_bm.device)
        offsets[1:] = counts.cumsum(0)
        image = index // max(1, mask_bm.shape[1])
        lengths = tuple(counts.tolist())
        slots = torch.arange(len(index), device=index.device) - offsets[image] + image * max(lengths)
        return cls(lengths, index, slots, offsets)

    @classmethod
    def equal(cls, images: int, tokens: int, device: torch.device | str) -> Spans:
        """Return those of images of which every token counts."""
        index = torch.arange(images * tokens, device=device)
        offsets = torch.arange(images + 1, dtype=torch.int32, device=device) * tokens
        return cls((tokens,) * images, index, index, offsets)

    @property
    def longest(self) -> int:
        """How many tokens the image with the most has."""
        return max(self.lengths)

    @property
    def are_equal(self) -> bool:
        """Whether all images have as many tokens."""
        return len(set(self.lengths)) == 1

    def map(self, function: Callable[[Tensor], Tensor]) -> Spans:
        """Apply ``function`` to every tensor."""
        return Spans(self.lengths, *map(function, (self.index, self.slots, self.offsets)))
