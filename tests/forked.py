"""A function in a process of its own that may be killed, without the seconds in which a new Python imports torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

from nanodit import faults

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
