"""Memory that micro-batches are made in, one after another: fresh pages cost more than what is written into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROWTH = 1.25  # of a buffer, times what it was too small for
ALIGNMENT = 64  # bytes: of a cache line, and a multiple of what any dtype needs


class Buffer:
    """A piece of memory whose parts are handed out as tensors, for one micro-batch at a time.

    What does not fit gets memory of its own; the next :meth:`reset` makes the buffer as large as was needed. ``pinned``
    memory is one that a GPU reads while the host goes on.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def reset(self) -> Buffer:
        """Forget what was handed out."""
        if self.used > len(self.bytes):
            self.bytes = self._fresh((int(self.used * GROWTH),), torch.uint8)
        self.used = 0
        return self

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with any content."""
        start, size = self.used, torch.Size(shape).numel() * dtype.itemsize
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        if self.used > len(self.bytes):
            return self._fresh(shape, dtype)
        return self.bytes[start : start + size].view(dtype).view(shape)

    def take(self, tensor: Tensor) -> Tensor:
        """Return a tensor in memory of the buffer's kind: itself, or a copy."""
        if not self.pinned or self.holds(tensor) or tensor.is_pinned():
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor lies in the buffer."""
        return len(self.bytes) > 0 and tensor.untyped_storage().data_ptr() == self.bytes.untyped_storage().data_ptr()

    def _fresh(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
