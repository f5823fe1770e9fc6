"""From the loader to the device: one copy a micro-batch, beside what a GPU computes, in memory that is used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.data.buffers import Buffer
from train.loop.microbatch import MicroBatch

SLOTS = 2  # micro-batches that lie on a GPU, one of which is computed


class Sender:
    """Hands out buffers to make micro-batches in, and brings what was made onto the ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Buffer] = []
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._slots = deque(_Slot(device) for _ in range(SLOTS))

    def buffer(self) -> Buffer:
        """Return a buffer that nobody uses; of any thread."""
        try:
            return self._free.pop().reset()
        except IndexError:
            return Buffer(pinned=self.device.type == "cuda")

    def give_back(self, buffer: Buffer | None) -> None:
        """Take a buffer back that nobody uses any more."""
        if buffer is not None:
            self._free.append(buffer)

    @contextmanager
    def sent(self, batch: MicroBatch) -> Iterator[MicroBatch]:
        """Yield a micro-batch on the device, unpacked; afterwards its buffer is free, and its tensors are not to be
        used."""
        if self.device.type == "cuda" and batch.buffer is not None:
            with self._through_a_slot(batch, batch.buffer) as moved:
                yield moved
            return
        yield batch.to(self.device).unpacked()
        self.give_back(batch.buffer)

    @contextmanager
    def _through_a_slot(self, batch: MicroBatch, buffer: Buffer) -> Iterator[MicroBatch]:
        """Copy the buffer at once on a stream of its own, while the GPU computes the micro-batch before.

        The host waits for the copy before the last in its slot, so that it never runs further ahead than the slots.
        """
        slot, computing = self._slots[0], torch.cuda.current_stream(self.device)
        self._slots.rotate(-1)
        slot.copied.synchronize()  # of a new event: at once
        self.give_back(slot.sent)
        slot.sent = buffer
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.computed)
            if len(slot.bytes) < len(buffer.bytes):
                slot.bytes = torch.empty_like(buffer.bytes, device=self.device)
            used = min(buffer.used, len(buffer.bytes))
            slot.bytes[:used].copy_(buffer.bytes[:used], non_blocking=True)
            slot.copied.record()
        computing.wait_event(slot.copied)
        yield within(batch, buffer, slot.bytes).unpacked()
        slot.computed.record(computing)


def within(batch: MicroBatch, buffer: Buffer, copied: Tensor) -> MicroBatch:
    """Return a micro-batch made in ``buffer`` with its tensors in a copy of the buffer's bytes, on the copy's device.

    What the buffer had no room for is copied by itself.
    """

    def place(tensor: Tensor) -> Tensor:
        if not buffer.holds(tensor):
            return tensor.to(copied.device, non_blocking=True)
        where = copied.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=copied.device).set_(*where)

    return batch.map(place)


class _Slot:
    """Memory of a GPU for one micro-batch: when it was copied there, of which buffer, and when it was computed."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.copied, self.computed = torch.cuda.Event(), torch.cuda.Event()
        self.sent: Buffer | None = None
