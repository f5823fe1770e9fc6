"""Who owns a run folder, and how a run is asked to stop."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prep.errors import ConfigError, Interrupted

RUN_LOCK = "run.lock"


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (created if needed) for this process; :class:`ConfigError` names the process that has it already.

    The kernel drops the lock when its owner ends, however it ends, so that a lock file left behind locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RUN_LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ConfigError(
                f"{folder}: another trainer (process {owner}) is writing here; wait for it, stop it, or choose another "
                "`output`"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class StopRequest:
    """Turns the first SIGTERM or SIGINT into ``requested``; the second ends the process at once, which is safe.

    A context manager: the handlers are those of before again afterwards.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(Interrupted.exit_code)  # checkpoints are whole or absent, so nothing has to be tidied
        self.requested = True
        # os.write, because the signal may have come in the middle of a print
        os.write(
            2, f"\n{signal.Signals(number).name}: saving the last completed step; once more to stop at once\n".encode()
        )
