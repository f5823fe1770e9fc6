"""Progress that never falls silent: a live bar on a terminal, a plain line at least every five seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 5.0  # seconds


def say(text: str) -> None:
    """Print one plain line to stdout, at once."""
    print(text, flush=True)


def duration(seconds: float) -> str:
    """Format seconds as ``42s``, ``3m 05s`` or ``2h 07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class Progress:
    """Counts ``done`` of ``total`` and shows rate, time left and any extra fields.

    Without a terminal a thread prints a line every five seconds even while no update arrives, so that a long batch is
    not taken for a hang. Use as a context manager or call :meth:`close`; both print the final count once.
    """

    def __init__(self, label: str, total: int | None, unit: str = "samples", done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._initial = done
        self._fields: dict[str, object] = {}
        self._start = time.monotonic()
        self._closed = threading.Event()
        self._bar: RichProgress | None = None
        if sys.stdout.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                TextColumn("{task.fields[extra]}"), TimeRemainingColumn(), console=Console(),
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, completed=done, extra="")
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._print_regularly, daemon=True, name=f"progress-{label}")
            self._thread.start()

    def update(self, done: int, **fields: object) -> None:
        """Set the count and the extra fields to show, e.g. ``loss=0.0421``."""
        self.done = done
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, extra=f"{self._rate():.4g}/s {self._extra()}")

    def advance(self, n: int = 1, **fields: object) -> None:
        """Add ``n`` to the count."""
        self.update(self.done + n, **fields)

    def close(self) -> None:
        """Stop and print the final count, rate and time taken."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()
        taken = duration(time.monotonic() - self._start)
        say(f"{self.label}: {self.done} {self.unit} in {taken} ({self._rate():.4g}/s){self._extra()}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rate(self) -> float:
        return (self.done - self._initial) / max(time.monotonic() - self._start, 1e-9)

    def _extra(self) -> str:
        return "".join(f"  {name} {value}" for name, value in self._fields.items())

    def _print_regularly(self) -> None:
        while not self._closed.wait(PLAIN_INTERVAL):
            rate = self._rate()
            of = "" if self.total is None else f"/{self.total}"
            left = ""
            if self.total is not None and rate > 0:
                left = f", {duration((self.total - self.done) / rate)} left"
            say(f"{self.label}: {self.done}{of} {self.unit}, {rate:.4g}/s{left}{self._extra()}")
