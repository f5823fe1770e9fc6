"""``python -m prep.captions.watchdog FD PROGRAM ...``: a server, and whatever it starts, ends with who asked for it.

``ollama serve`` starts runners that hold the card and outlive it, and an actor may be killed, with its node or alone.
So the server has a process group of its own and this process beside it, whose only input is a pipe that nobody writes
to: when the other end is closed, on purpose or because its owner is gone, the whole group is ended. The output of the
server goes to this process's standard error; its own standard output is closed when nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 3.0  # seconds for a server to end by itself


def main() -> None:
    """Run the program until it ends or the pipe is closed."""
    if os.fork():  # Ray ends the children of a worker that ends: this one is nobody's
        os._exit(0)
    os.setsid()  # nor reached by Ctrl-C in a terminal
    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    threading.Thread(target=_end_with, args=(int(sys.argv[1]), server), daemon=True).start()
    server.wait()
    _signal_group(server, signal.SIGKILL)  # what it leaves behind


def _end_with(pipe: int, server: subprocess.Popen[bytes]) -> None:
    os.read(pipe, 1)
    _signal_group(server, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    _signal_group(server, signal.SIGKILL)


def _signal_group(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    main()
