"""Batches that do not fit into a GPU's memory: halved until they do, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nanodit.errors import MemoryShortage, gpu_is_full

T = TypeVar("T")


class Halving:
    """Runs batches on ``device``, and halves of those that do not fit into its memory.

    The size that fitted is kept for later batches: a failed attempt costs as much as a batch. Results are those of
    the whole batch up to the last bits, which depend on a batch's shape. Main memory is not watched here: there is
    no telling what else needs it.

    Several threads may run batches. A GPU computes one at a time, in one thread: memory is that of one batch, and
    onnxruntime keeps handles and workspaces for each thread that calls it. With ``own_thread`` False batches are
    computed where they are run: for a caller of one thread, to which its modes of torch (inference, autocast) belong.
    """

    def __init__(self, what: str, device: str, own_thread: bool = True) -> None:
        self.what, self.device = what, str(device)
        self.limit: int | None = None  # the largest batch, once one did not fit
        elsewhere = own_thread and self.device.startswith("cuda")
        self._turn = ThreadPoolExecutor(1, thread_name_prefix="gpu") if elsewhere else None
        self._note = ""

    def run(self, compute: Callable[[Any], T], batch: Sequence[Any]) -> Iterator[T]:
        """Yield ``compute`` of ``batch``, or of its parts in order; a batch is anything with a length and slices.

        Raises :class:`MemoryShortage` when a single item does not fit.
        """
        start = 0
        while start < len(batch):
            part = batch[start : start + (self.limit or len(batch))]
            fits, result = self._attempt(compute, part)
            if fits:
                yield result
                start += len(part)
            else:  # outside the handler: the error's traceback holds the tensors of the attempt
                self._halve(len(part))

    def take_note(self) -> str | None:
        """Return what the user should know about the batches so far, once; None when nothing is new."""
        note, self._note = self._note, ""
        return note or None

    def _attempt(self, compute: Callable[[Any], T], part: Sequence[Any]) -> tuple[bool, T | None]:
        try:
            return True, self._turn.submit(compute, part).result() if self._turn else compute(part)
        except Exception as error:
            if not gpu_is_full(error, self.device):
                raise
            if len(part) > 1:
                return False, None
            raise MemoryShortage(
                f"{self.what}: a single item does not fit into the free memory of {self.device}. Close other "
                "programs that use it (nvidia-smi), or choose a smaller model, a smaller base or the device cpu"
            ) from error

    def _halve(self, tried: int) -> None:
        self.limit = min(tried // 2, self.limit or tried)  # another thread may have halved it already
        self._note = (
            f"{self.what}: batches of {tried} do not fit into the free memory of {self.device}; continuing with "
            f"{self.limit}. Set batch_size to {self.limit} to avoid the failed attempts"
        )
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
