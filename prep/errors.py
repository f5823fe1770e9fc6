"""Errors that a user can act on, and the exit codes that scripts rely on."""

from __future__ import annotations

import sys
from collections.abc import Callable


class NanoditError(Exception):
    """A failure with a message for the user: what was wrong, where, and what to do."""

    exit_code = 1


class ConfigError(NanoditError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(NanoditError):
    """Data that cannot be used, or a gate that did not open (exit code 3)."""

    exit_code = 3


class ResourceError(NanoditError):
    """Too little memory or disk (exit code 4)."""

    exit_code = 4


class SkippedError(NanoditError):
    """Something was skipped and ``--strict`` was given (exit code 5)."""

    exit_code = 5


class Interrupted(NanoditError):
    """Stopped from outside with everything saved; the same command continues (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


def run_command(main: Callable[[], int | None]) -> int:
    """Run ``main`` and return its exit code; a :class:`NanoditError` becomes one ``error:`` line on stderr.

    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        return main() or 0
    except NanoditError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
