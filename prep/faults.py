"""One hook for the tests of crash safety: named moments inside the code at which a fault may be injected from outside.

``NANODIT_FAULT=checkpoint.after_tmp:kill`` ends the process by SIGKILL when it passes ``checkpoint.after_tmp``, and
``checkpoint.after_tmp:kill:3`` when it does so for the third time. Without the variable :func:`fault` does nothing.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from prep.errors import ConfigError

_passed: Counter[str] = Counter()


def fault(point: str) -> None:
    """Pass the named point, and fail there if ``NANODIT_FAULT`` asks for it: ``POINT:kill`` or ``POINT:kill:NTH``."""
    wanted = os.environ.get("NANODIT_FAULT")
    if not wanted:
        return
    name, _, action = wanted.partition(":")
    action, _, nth = action.partition(":")
    if action != "kill" or not (nth or "1").isdigit():
        raise ConfigError(f"NANODIT_FAULT={wanted!r} is not of the form POINT:kill or POINT:kill:NTH")
    if name != point:
        return
    _passed[point] += 1
    if _passed[point] == int(nth or "1"):
        os.kill(os.getpid(), signal.SIGKILL)
