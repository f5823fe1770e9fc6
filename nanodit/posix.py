"""What Linux and macOS have and Windows lacks, imported and asked in one place."""

from __future__ import annotations

import sys

from nanodit.errors import ConfigError

try:
    import fcntl
    import resource
except ModuleNotFoundError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]


def require_posix(command: str) -> None:
    """Raise :class:`ConfigError` where ``command``, which locks what it writes and starts processes, cannot work."""
    if fcntl is None:
        raise ConfigError(
            f"{command} works on Linux and macOS, and on Windows inside WSL2 (`wsl --install`, then as on Linux), but "
            "not on Windows itself, which lacks POSIX's locks and signals; `nanodit train sample`, `nanodit train "
            "export` and `nanodit evaluate report` work here"
        )


def peak_memory() -> int:
    """Return the most memory that this process has had at once, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, man 2 getrusage of either system
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
