"""Root without the right to pass by permissions, so that a folder of mode 000 is closed to it as to any user."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # linux/capability.h
VERSION_3 = 0x20080522  # of the header of capget and capset: two words of bits for each set


@contextmanager
def permissions_count() -> Iterator[None]:
    """Let permissions bind this thread and those that it starts, whoever it runs as; Linux only."""
    if sys.platform != "linux":
        pytest.skip("capabilities are Linux's")
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()

    def call(name: str) -> None:
        if getattr(libc, name)(header, sets):
            raise OSError(ctypes.get_errno(), name)

    call("capget")
    before = sets[0]  # effective, permitted, inheritable of the first 32 capabilities
    sets[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    call("capset")
    try:
        yield
    finally:
        sets[0] = before
        call("capset")
