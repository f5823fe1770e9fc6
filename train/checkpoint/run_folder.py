"""Who owns a run folder, and how a run is asked to stop."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nanodit.console import say
from nanodit.errors import ConfigError, Interrupted, Signalled, sigterm_came
from nanodit.files import no_link
from nanodit.posix import fcntl

RUN_LOCK = "run.lock"
OWN_CONFIGS = ("config.yaml", "sweep.yaml")  # that a run or a sweep writes into its folder


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (created if needed) for this process; :class:`ConfigError` names the process that has it already.

    The kernel drops the lock when its owner ends, however it ends, so that a lock file left behind locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RUN_LOCK, "a+", encoding="utf-8", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ConfigError(
                f"{folder}: another trainer (process {owner}) is writing here; wait for it, stop it, or choose another "
                "`output`"
            ) from None
        except OSError as error:  # mounted object stores and some network volumes have no locks
            say(f"warning: {folder / RUN_LOCK}: {error.strerror}; make sure that no second trainer writes here")
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_still_there(file: Path, output: Path, overrides: Sequence[str]) -> None:
    """Refuse the config in the folder of a run or sweep that was moved or copied: it names the place where it was.

    Unless ``output`` is among the overrides. Raises :class:`ConfigError`.
    """
    here = file.parent
    own = (here / RUN_LOCK).exists() and file.name in OWN_CONFIGS
    named = any(override.partition("=")[0].strip() == "output" for override in overrides)
    if own and not named and not (output.exists() and os.path.samefile(here, output)):
        raise ConfigError(
            f"{file}: belongs to what lies in {here}, but its output is {output}: it was moved or copied, or the path "
            f"is relative to another folder. Say where to write: output={here}, for example"
        )


class StopRequest:
    """Turns the first SIGTERM or SIGINT into ``requested``; the second ends the process at once, which is safe.

    A context manager: the handlers are those of before again afterwards. What may be given up at any moment runs under
    :meth:`interrupting`. Whoever else wants an end sets ``requested``, which makes no signal the second one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._signalled = False
        self._interrupting = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        if sigterm_came():
            self.requested = self._signalled = True
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal end what runs in this context as a KeyboardInterrupt, instead of waiting until it is over."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(Interrupted.exit_code)  # checkpoints are whole or absent, so nothing has to be tidied
        self.requested = self._signalled = True
        # os.write, because the signal may have come in the middle of a print
        os.write(
            2, f"\n{signal.Signals(number).name}: saving the last completed step; send again to stop at once\n".encode()
        )
        if self._interrupting:
            self._interrupting = False
            raise Signalled
