"""One hook for the tests of crash safety: named moments inside the code at which a fault may be injected from outside.

``NANODIT_FAULT=POINT:ACTION`` acts when the process passes the point, ``POINT:ACTION:NTH`` when it does so for the NTH
time, and ``POINT@SUBJECT:ACTION`` whenever it passes the point with that subject (a sample's key, say; ``*`` for all).
Several faults are separated by commas. Without the variable :func:`fault` does nothing.

Actions: ``kill`` (SIGKILL to this process), ``segfault``, ``hang`` (for ever), ``allocate`` (40 GB at once), ``delay``
(a tenth of a second), ``raise`` (RuntimeError), ``memory`` (MemoryError).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections import Counter

from nanodit.errors import ConfigError

FORM = re.compile(
    r"(?P<point>[\w.]+)(@(?P<subject>[^:@,]+))?:(?P<action>kill|segfault|hang|allocate|delay|raise|memory)(:(?P<nth>\d+))?"
)
ALLOCATION = 40 << 30  # bytes
DELAY = 0.1  # seconds

_passed: Counter[str] = Counter()


def fault(point: str, subject: str | None = None) -> None:
    """Pass the named point, about a ``subject`` if there is one, and fail there if ``NANODIT_FAULT`` asks for it."""
    wanted = os.environ.get("NANODIT_FAULT")
    if not wanted:
        return
    matches = [FORM.fullmatch(text) for text in wanted.split(",")]
    if None in matches:
        raise ConfigError(f"NANODIT_FAULT={wanted!r} is not of the form POINT[@SUBJECT]:ACTION[:NTH]")
    _passed[point] += 1
    for match in matches:
        if match["point"] != point or match["subject"] not in (None, "*", subject):
            continue
        if match["subject"] or _passed[point] == int(match["nth"] or 1):
            _act(match["action"])


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "segfault":
        ctypes.string_at(0)
    elif action == "allocate":
        bytearray(ALLOCATION)
    elif action == "delay":
        time.sleep(DELAY)
    elif action == "raise":
        raise RuntimeError("a fault was asked for")
    elif action == "memory":
        raise MemoryError("a fault was asked for")
    while action == "hang":
        time.sleep(0.1)
