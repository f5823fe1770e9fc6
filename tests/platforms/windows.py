"""Runs a command as Windows would see it, as far as Linux can show that: without what Python lacks there.

    python tests/platforms/windows.py nanodit|prep|train|evaluate ARGUMENTS [+ PACKAGE ARGUMENTS]...

Several commands run one after another, up to the first that fails.
The project's own code finds neither modules that exist on POSIX alone nor the names of ``os``, ``signal``, ``select``
and ``socket`` that Windows has not. Libraries keep them: their own code for Windows cannot run here.
"""

from __future__ import annotations

import builtins
import os
import runpy
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any

OURS = ("nanodit", "prep", "train", "evaluate", "tools")
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline"}
# https://docs.python.org/3/library/os.html and signal.html: "Availability: Unix"
NAMES = {
    os: (
        "fork forkpty getuid geteuid getgid getegid getgroups getpgid getpgrp killpg setsid setuid setgid sysconf "
        "statvfs sched_getaffinity sched_setaffinity getloadavg uname chown fchown fchmod mkfifo nice wait wait3 wait4 "
        "chroot openpty posix_fadvise posix_fallocate pread pwrite sendfile O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK"
    ),
    signal: (
        "SIGKILL SIGALRM SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGSTOP SIGCONT SIGCHLD SIGPIPE alarm setitimer getitimer "
        "pause pthread_kill pthread_sigmask sigwait siginterrupt"
    ),
    select: "poll epoll",
    socket: "AF_UNIX",
}


class Part(ModuleType):
    """A module without some of its names."""

    def __init__(self, whole: ModuleType, hidden: set[str]) -> None:
        super().__init__(whole.__name__)
        self.__dict__["_whole"], self.__dict__["_hidden"] = whole, hidden

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._whole, name)


def hide() -> None:
    """Take away what Windows lacks from the project's own modules."""
    real = builtins.__import__
    parts = {module.__name__: Part(module, set(names.split())) for module, names in NAMES.items()}

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        asking = globals or {}
        ours = str(asking.get("__package__") or asking.get("__name__")).partition(".")[0] in OURS
        if not ours or level:
            return real(name, globals, locals, fromlist, level)
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return parts[name] if name in parts else real(name, globals, locals, fromlist, level)

    builtins.__import__ = without


def main() -> None:
    rest = sys.argv[1:]
    sys.path[0] = os.getcwd()
    hide()
    while rest:
        end = rest.index("+") if "+" in rest else len(rest)
        sys.argv, rest = rest[:end], rest[end + 1 :]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code or not rest:
                raise


if __name__ == "__main__":
    main()
