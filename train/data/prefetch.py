"""Making micro-batches ahead in a background thread, and saying when storage stalls."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from nanodit.console import duration, repeating, say
from train.data.samples import TrainingSet

STALL_SECONDS = 10.0  # that reading a member may take before it is said
ABANDON_SECONDS = 5.0  # that the thread which reads ahead is waited for at the end

T = TypeVar("T")


def watch_for_stalls(data: TrainingSet) -> AbstractContextManager[None]:
    """While this is open, say which read of ``data`` takes longer than STALL_SECONDS, again and again until it ends."""

    def watch() -> None:
        for what, since in sorted(data.reading.copy().values(), key=lambda reading: reading[1])[:1]:  # the oldest
            if (taken := time.monotonic() - since) >= STALL_SECONDS:
                say(f"waiting for the storage: {what} is being read for {duration(taken)}")

    return repeating(watch, STALL_SECONDS / 2, "stalls")


def prefetch(
    make: Callable[[int], T], numbers: Iterable[int], depth: int, give_up: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """Yield ``make(number)`` for endless numbers, made up to ``depth`` ahead by a background thread (0: none).

    The order and the values are those of calling ``make`` in place; so is an exception, which ends the iteration where
    the value would have come. ``give_up`` is asked while nothing comes, and ends it too. Close the iterator to stop the
    thread.
    """
    if depth == 0:
        yield from map(make, numbers)
        return
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        # of this thread alone: a second team of torch threads would fight with the training's for the cores
        torch.set_num_threads(1)
        for number in numbers:
            if stop.is_set():
                return
            try:
                made = (make(number), None)
            except BaseException as error:  # handed to the consumer, which raises it
                made = (None, error)
            ready.put(made)
            if made[1] is not None:
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                value, error = ready.get(timeout=0.5)
            except queue.Empty:
                if give_up():
                    return
                continue
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        abandoned = time.monotonic() + ABANDON_SECONDS  # a read may hang with its storage, for ever
        while thread.is_alive() and time.monotonic() < abandoned:  # it may be waiting for room in the queue
            while not ready.empty():
                ready.get_nowait()
            thread.join(timeout=0.01)
