"""Progress that never falls silent: a live bar on a terminal, a plain line at least every five seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

from nanodit.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 5.0  # seconds
_silent = ContextVar("silent", default=False)


def say(text: str) -> None:
    """Print one plain line to stdout, at once; see :func:`printable`."""
    print(printable(text), flush=True)


def _remark(text: str) -> None:
    """Say from a thread beside the command's own, whose next line ends it where nobody reads any more."""
    with suppress(BrokenPipeError):
        say(text)


@contextmanager
def repeating(function: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """While this is open, call ``function`` every so many seconds in a thread ``name``, the first time after them.

    A call that is under way when the context ends is waited for. What ``function`` raises ends the thread alone.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            function()

    thread = threading.Thread(target=repeat, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def waiting(what: str, at_once: bool = True) -> Iterator[None]:
    """Say what is being waited for, if wanted ``at_once``, and every five seconds with the time it has taken."""
    if at_once:
        say(what)
    start = time.monotonic()
    with repeating(lambda: _remark(f"{what}: {duration(time.monotonic() - start)}"), PLAIN_INTERVAL, "waiting"):
        yield


def duration(seconds: float) -> str:
    """Format seconds as ``42s``, ``3m 05s``, ``2h 07m`` or ``12d 5h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400:,}d {whole % 86400 // 3600}h"


def data_size(count: float) -> str:
    """Format bytes as ``1.2 GB``, ``0.3 MB`` or ``12.0 kB``."""
    for unit in ("GB", "MB", "kB"):
        if count >= 1e8 or unit == "kB":
            break
        count *= 1000
    return f"{count / 1e9:.1f} {unit}"


@contextmanager
def without_progress() -> Iterator[None]:
    """Show no :class:`Progress` that begins inside the block, in this thread."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


class Progress:
    """Counts ``done`` of ``total`` and shows rate, time left and any extra fields.

    Rate and time left are measured from the first update on, because workers may take a minute to start.
    Without a terminal a thread prints a line every five seconds even while no update arrives, so that a long batch is
    not taken for a hang. Use as a context manager or call :meth:`close`; both print the final count once.
    """

    def __init__(self, label: str, total: int | None, unit: str = "samples", done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._initial = done
        self._fields: dict[str, object] = {}
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None  # count and time of the first update that counted something
        self._aside: tuple[str, float] | None = None  # what is done beside the counting, and since when
        self._closed = threading.Event()
        self._bar: RichProgress | None = None
        self._thread: threading.Thread | None = None
        self._shown = not _silent.get()
        if not self._shown:
            return
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            count, rest = Column(no_wrap=True), Column(no_wrap=False)  # where there is no room, the rest gives way
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(table_column=count), TextColumn(unit),
                TextColumn("{task.fields[extra]}", table_column=rest), TimeRemainingColumn(), console=Console(),
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
        if self._first is None and done > self._initial:
            self._first = (done, time.monotonic())
        if self._bar is not None:
            rate = "" if (rate := self._rate()) is None else f"{rate:.4g}/s "
            self._bar.update(self._task, completed=done, extra=rate + self._extra())

    def advance(self, n: int = 1, **fields: object) -> None:
        """Add ``n`` to the count."""
        self.update(self.done + n, **fields)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Show what is done meanwhile, and for how long, while nothing is counted; the rate passes over it."""
        since = time.monotonic()
        self._aside = what, since
        if self._bar is not None:
            self._bar.update(self._task, extra=what)
        try:
            yield
        finally:
            self._aside = None
            if self._first is not None:
                self._first = self._first[0], self._first[1] + time.monotonic() - since

    def close(self) -> None:
        """Stop and print the final count, rate and time taken."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()
        if not self._shown:
            return
        taken = time.monotonic() - self._start
        rate = (self.done - self._initial) / max(taken, 1e-9)
        say(f"{self.label}: {self.done} {self.unit} in {duration(taken)} ({rate:.4g}/s){self._extra()}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rate(self) -> float | None:
        """Return the number per second since the first update; None before there was a second one."""
        if self._first is None or self.done == self._first[0]:
            return None
        return (self.done - self._first[0]) / max(time.monotonic() - self._first[1], 1e-9)

    def _extra(self) -> str:
        return "".join(f"  {name} {value}" for name, value in self._fields.items())

    def _print_regularly(self) -> None:
        while not self._closed.wait(PLAIN_INTERVAL):
            _remark(self.line())

    def line(self) -> str:
        """Return where it stands now, for example ``px: 64/500 samples, 3.1/s, 2m 20s left  rejected 1``."""
        of = "" if self.total is None else f"/{self.total}"
        rate, pace = self._rate(), ""
        aside = self._aside
        if aside:
            pace = f", {aside[0]} for {duration(time.monotonic() - aside[1])}"
        elif self._first is None:
            pace = ", starting"
        elif rate is not None:
            left = "" if self.total is None else f", {duration((self.total - self.done) / rate)} left"
            pace = f", {rate:.4g}/s{left}"
        return f"{self.label}: {self.done}{of} {self.unit}{pace}{self._extra()}"
