"""Processes that are forked from this one, without the seconds in which a new Python imports torch.

They are processes as any other: with a number, a group and pipes of their own, and they may be killed. What they do not
show is what a command imports, and what it takes from the variables that Python and torch read as they start.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import pytest

from nanodit import faults

PYTHON = sys.executable
FORK = multiprocessing.get_context("fork")


def in_child(function: Callable[[], object], fault: str | None = None) -> int:
    """Run ``function`` in a forked process and return its exit code, minus the signal's number if one ended it."""

    def work() -> None:
        faults._passed.clear()  # what this process passed before
        if fault:
            os.environ["NANODIT_FAULT"] = fault
        function()

    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def fork_modules(monkeypatch: pytest.MonkeyPatch, *needed: str) -> None:
    """Let ``python [-P] -m MODULE`` be forked from now on, whoever of this process or of those below it starts it.

    Modules that several of them are ``needed`` by are imported once, here.
    """
    for name in needed:
        import_module(name)
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)


class ForkedPopen(subprocess.Popen):
    """A Popen whose child runs the module of ``python [-P] -m MODULE`` itself; other commands start as ever."""

    def __init__(self, args: Any, *rest: Any, env: Mapping[str, str] | None = None, **options: Any) -> None:
        words = [] if isinstance(args, str | bytes | os.PathLike) else [*map(str, args)]
        words = [word for place, word in enumerate(words) if (place, word) != (1, "-P")]
        if words[:2] == [PYTHON, "-m"]:
            kept = {0, 1, 2, *options.get("pass_fds", ())}
            options["preexec_fn"] = lambda: _become(words[2], words[3:], env, kept)
        super().__init__(args, *rest, env=env, **options)


def _become(module: str, arguments: Sequence[str], env: Mapping[str, str] | None, kept: set[int]) -> NoReturn:
    """Run a module as the program of this process, as far as that can be told from outside, and end with its code."""
    code = 1
    try:
        gc.freeze()  # nothing of this process's is closed later, when its number is another file's
        for number in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
            with suppress(OSError):  # the one that listed them
                os.close(number)
        faulthandler.disable()
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        faults._passed.clear()
        code = _run(module, arguments)
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(module: str, arguments: Sequence[str]) -> int:
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # who imports it gets another one than the program, as ever
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
