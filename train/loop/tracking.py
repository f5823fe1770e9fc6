"""What a run records about itself: TensorBoard, metrics.jsonl and provenance.json."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanodit.console import say
from nanodit.errors import DataError
from nanodit.files import write_atomic
from nanodit.posix import peak_memory
from train.data.prefetch import processors

VALIDATED = "heldout.json"  # what a validation writes last


class Tracker:
    """Writes the same numbers to ``metrics.jsonl`` and TensorBoard.

    ``step`` counts the optimiser steps completed before: what an interrupted run logged beyond it is dropped from both.
    """

    def __init__(self, run_folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only a run needs it

        metrics = run_folder / "metrics.jsonl"
        kept = truncate_metrics(metrics, step)
        metrics.touch()
        # a buffer that takes any line: it reaches the file in one write
        self._file = open(metrics, "r+b", buffering=1 << 20)  # noqa: SIM115 - closed by close()
        self._record: dict[str, float] = {"step": step}  # the last one, which more of its step joins
        self._start = self._file.seek(0, os.SEEK_END)  # where its line begins
        if kept and kept[-1]["step"] == step:  # which an earlier start wrote
            self._record = kept[-1]
            self._start -= len(_line(self._record))
        self._events = run_folder / "tensorboard"
        # events of an earlier start at purge_step or later are hidden
        self._board: SummaryWriter | None = SummaryWriter(str(self._events), purge_step=step + 1, flush_secs=10)

    def _show(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call TensorBoard; where its events cannot be written, give it up and say so once: it only looks on."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments, **named)
        except Exception as error:  # whatever the thread that writes them met: a folder that was moved, a lost drive
            self._board = None
            reason = f"{type(error).__name__}: {error}"
            say(f"warning: {self._events}: TensorBoard's events are not written any more ({reason}); training goes on")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` (tag -> finite number) at ``step`` completed optimiser steps.

        More of the step that was recorded last joins its record: a step has one line.
        """
        again = self._record["step"] == step
        record = {**(self._record if again else {"step": step}), **values}
        line = _line(record)
        self._start = self._file.seek(self._start) if again else self._file.seek(0, os.SEEK_END)
        self._record = record
        self._file.write(line)
        self._file.flush()
        for tag, value in values.items():
            self._show("add_scalar", tag, value, step)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Show an image, uint8 (H, W, 3), on TensorBoard."""
        self._show("add_image", tag, image, step, dataformats="HWC")

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text, as it is, on TensorBoard."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a code block in Markdown, whatever is in it
        self._show("add_text", tag, indented, step)

    def sync(self) -> None:
        """Make what was logged durable; called before a checkpoint, which promises the records up to its step."""
        os.fsync(self._file.fileno())
        self._show("flush")

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._show("close")


@contextlib.contextmanager
def quiet_event_writer() -> Iterator[None]:
    """Let TensorBoard's thread end without a traceback: what it met is raised again where it is called next."""
    usual = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            usual(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class Rates:
    """Steps and images per second of training alone, and the share of that time in which it waits for data.

    No validation, pictures or saving, no compilation, no warm-up.
    """

    WARM_UP_STEPS = 2

    def __init__(self, peak_flops: float | None = None) -> None:
        self._peak_flops, self._flops = peak_flops, 0
        self._added = self._graphs = 0
        self._steps = self._images = 0
        self._seconds = self._waited = 0.0
        self._shown: dict[str, str] = {}

    def add(self, images: int, seconds: float, flops: int = 0, waited: float = 0.0) -> None:
        """Count one optimiser step and its FLOPs, unless it is one of the first or compiled something.

        ``waited`` is how many of its seconds the device had nothing to do, as no micro-batch was there.
        """
        self._added += 1
        counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)  # None while it is being imported
        graphs = counters["stats"]["unique_graphs"] if counters else 0
        compiled, self._graphs = graphs > self._graphs, graphs
        if self._added > self.WARM_UP_STEPS and not compiled:
            self._steps += 1
            self._images += images
            self._seconds += seconds
            self._flops += flops
            self._waited += waited

    def take(self) -> dict[str, float]:
        """Return the rates since the last call, empty where nothing was counted; MFU where the GPU's peak is known."""
        if not self._steps:
            return {}
        iterations, images = self._steps / self._seconds, self._images / self._seconds
        wait = self._waited / self._seconds
        rates = {"sys/iter_per_sec": iterations, "sys/images_per_sec": images, "sys/data_wait": wait}
        self._shown = {"images/s": f"{images:.1f}", "data wait": f"{wait:.0%}"}
        if self._peak_flops:
            rates["sys/mfu"] = self._flops / self._seconds / self._peak_flops
        self._steps = self._images = self._flops = 0
        self._seconds = self._waited = 0.0
        return rates

    def shown(self) -> dict[str, str]:
        """Return what a progress line says: the last rates taken."""
        return self._shown


class DataWait:
    """Measures how long a device has nothing to do, as no micro-batch is there.

    The host runs ahead of a GPU and may wait while that computes: there the time counts between two events of the GPU's
    own clock, one from before the host waits and one from after, which are one moment where it was busy throughout.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Measure what happens in this context."""
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Return the seconds since the last call; the device must have been waited for."""
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


class WaitingAdvice:
    """Says once in a run that it waits for its data, and what helps.

    ``prefetch`` micro-batches are made ahead, by ``workers`` threads.
    """

    MUCH = 0.1  # of the time of a step
    RECORDS = 3  # in a row, of which the first ones may be of files that were not in memory yet

    def __init__(self, prefetch: int, workers: int) -> None:
        self.prefetch, self.workers = prefetch, workers
        self._in_a_row, self._said = 0, False

    def consider(self, share: float | None) -> None:
        """Take note of a logged ``sys/data_wait``."""
        if share is None or self._said:
            return
        self._in_a_row = self._in_a_row + 1 if share > self.MUCH else 0
        if self._in_a_row == self.RECORDS:
            self._said = True
            say(f"warning: {share:.0%} of the time goes into waiting for data (sys/data_wait): {self._remedy()}")

    def _remedy(self) -> str:
        if self.prefetch == 0:
            return "data.prefetch=2 makes micro-batches while the network computes"
        if self.workers < (more := processors() - 1):
            return f"data.workers={more} makes micro-batches in more threads than {self.workers}"
        return (
            "a larger data.cache_gb keeps more samples in memory; else more processors, a faster disk, or a dataset "
            "with image.format=jpeg, whose pixels are decoded in half the time"
        )


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return the GPU memory in 1e9 bytes: allocated and reserved now, and the peak since the last call.

    Pictures and checkpoints in between are in the peak. Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory/peak_vram_gb": peak / 1e9,
        "memory/vram_allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
        "memory/vram_reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
    }


def memory_shown(values: Mapping[str, float]) -> dict[str, str]:
    """Return what a progress line says: the peak of the GPU among logged ``values``; on a CPU, of this process."""
    if "memory/peak_vram_gb" in values:
        return {"memory": f"{values['memory/peak_vram_gb']:.1f} GB"}
    if torch.cuda.is_initialized():
        return {}  # a step that was not logged: what was said last stays
    return {"memory": f"{peak_memory() / 1e9:.1f} GB"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a torn last line, which a kill can leave, is dropped, any other is a :class:`DataError`."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a whole line ends with a newline
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not last:
                break
            raise DataError(f"{path}:{number}: not a record of metrics; restore the file or delete it") from None
        records.append(record)
    return records


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records of the first ``step`` completed steps, and return them."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    if path.exists():
        write_atomic(path, b"".join(map(_line, kept)))
    return kept


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
