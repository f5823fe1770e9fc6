"""Making micro-batches ahead in background threads, and saying when storage stalls."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import torch

from nanodit.console import duration, repeating, say
from train.data.samples import TrainingSet

STALL_SECONDS = 10.0  # that reading a member may take before it is said
ABANDON_SECONDS = 5.0  # that the threads which read ahead are waited for at the end
ASK_SECONDS = 0.5  # after which it is asked whether to go on waiting
MOST_THREADS = 8  # that "auto" takes: more than a GPU needs, and each holds a micro-batch in memory

T = TypeVar("T")


def watch_for_stalls(data: TrainingSet) -> AbstractContextManager[None]:
    """While this is open, say which read of ``data`` takes longer than STALL_SECONDS, again and again until it ends."""

    def watch() -> None:
        for what, since in sorted(data.reading.copy().values(), key=lambda reading: reading[1])[:1]:  # the oldest
            if (taken := time.monotonic() - since) >= STALL_SECONDS:
                say(f"waiting for the storage: {what} is being read for {duration(taken)}")

    return repeating(watch, STALL_SECONDS / 2, "stalls")


def prefetch(
    make: Callable[[int], T],
    numbers: Iterable[int],
    depth: int,
    workers: int = 1,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[T]:
    """Yield ``make(number)`` for numbers, made by background threads up to ``depth`` ahead of those in the making.

    The order and the values are those of calling ``make`` in place; so is an exception, which ends the iteration where
    the value would have come. A ``depth`` of 0 makes in place. ``give_up`` is asked while nothing comes, and ends it
    too. Close the iterator to stop the threads.
    """
    if depth == 0:
        yield from map(make, numbers)
        return
    coming = iter(numbers)
    order: queue.SimpleQueue[Future[T] | None] = queue.SimpleQueue()  # None: there are no more numbers
    room, next_one, stop = threading.Semaphore(depth + workers), threading.Lock(), threading.Event()

    def work() -> None:
        # of this thread alone: a second team of torch threads would fight with the training's for the cores
        torch.set_num_threads(1)
        while True:
            room.acquire()
            with next_one:  # who takes a number also takes its place
                if stop.is_set():
                    return
                number = next(coming, None)
                if number is None:
                    order.put(None)
                    stop.set()
                    return
                made: Future[T] = Future()
                order.put(made)
            try:
                made.set_result(make(number))
            except BaseException as error:  # handed to the consumer, which raises it
                made.set_exception(error)
                stop.set()  # what comes after it is not wanted any more

    threads = [threading.Thread(target=work, name="prefetch", daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            made = _waited_for(lambda: order.get(timeout=ASK_SECONDS), give_up)
            if made is None:
                return
            value = _waited_for(partial(made.result, ASK_SECONDS), give_up)
            if value is None:
                return
            room.release()
            yield value
            del value, made  # else a second one stays in memory while the next is waited for
    finally:
        stop.set()
        room.release(workers)
        abandoned = time.monotonic() + ABANDON_SECONDS  # a read may hang with its storage, for ever
        for thread in threads:
            thread.join(timeout=max(0.0, abandoned - time.monotonic()))


def _waited_for(get: Callable[[], T], give_up: Callable[[], bool]) -> T | None:
    """Return what ``get``, which times out, returns at last; None where ``give_up`` says so before."""
    while True:
        try:
            return get()
        except (queue.Empty, FutureTimeout):
            if give_up():
                return None


def thread_count(workers: int | str) -> int:
    """Return how many threads make micro-batches; "auto": one less than the processors, from 1 to MOST_THREADS."""
    if workers != "auto":
        return int(workers)
    return max(1, min(MOST_THREADS, processors() - 1))


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
