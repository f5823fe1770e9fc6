"""Errors that a user can act on, and the exit codes that scripts rely on."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO

# what the system says when there is no more room to write in
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})

# what it says of a place where nothing can be written or read, for reasons that lie outside this program
_NO_PLACE = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EEXIST", "EISDIR", "EIO", "ESTALE", "ELOOP", "ENAMETOOLONG", "EBUSY",
        "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "ENXIO", "EINVAL",
    )
    if hasattr(errno, name)
)  # fmt: skip
_DISK_FAILS = frozenset(getattr(errno, name) for name in ("EIO", "ESTALE", "EREMOTEIO") if hasattr(errno, name))
_LOOP = "Symlink loop from"
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})

# What CUDA's libraries and onnxruntime, whose errors have no class of their own for it, say where a GPU's memory does
# not suffice: torch where its allocator is passed by, cuBLAS, cuSOLVER, cuFFT, cuDNN (before version 9 ALLOC_FAILED,
# since then an alias of the host's), the arena of onnxruntime. A bare CUDNN_STATUS_INTERNAL_ERROR, or
# CUBLAS_STATUS_NOT_INITIALIZED, may be anything, and is not among them.
_GPU_IS_FULL = (
    "CUDA out of memory", "CUDA error: out of memory", "CUDA driver error: out of memory", "CUDA ran out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY", "CUDA failure 2: out of memory", "HIP out of memory", "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "CUFFT_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Failed to allocate memory for requested buffer",
)  # fmt: skip

PROBLEM_BREAK = "\n       "  # between the problems of one error, which stand below each other


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


class MemoryShortage(ResourceError):
    """Too little memory, of a GPU or of the machine (exit code 4)."""


class SkippedError(NanoditError):
    """Something was skipped and ``--strict`` was given (exit code 5)."""

    exit_code = 5


class Interrupted(NanoditError):
    """Stopped from outside with everything saved; the same command continues (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


def gpu_is_full(error: BaseException, device: str = "cuda") -> bool:
    """Say whether an error is a GPU's lack of memory: the one place that decides it, for all packages.

    It is if it has torch's class for it, or if its text is one of those that CUDA's libraries and onnxruntime have for
    it. On a CPU, as ``device``, texts say nothing of a GPU: onnxruntime has the same words for main memory.
    """
    # torch's class is known by its name: not every command imports torch
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, NanoditError) or not str(device).startswith("cuda"):
        return False
    return any(text in str(error) for text in _GPU_IS_FULL)


def resource_error(error: BaseException) -> ResourceError | None:
    """Return ``error`` for the user if it is a lack of memory or disk; None if it is anything else."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}cannot be written: {error.strerror}. Make room, or choose another output folder")
    if isinstance(error, MemoryError) or gpu_is_full(error):
        reason = first_line(error)
        return MemoryShortage(
            f"out of memory{': ' if reason else ''}{reason}. Close other programs, or use smaller batches or images"
        )
    return None


def place_error(error: BaseException) -> ResourceError | None:
    """Return ``error`` for the user if a file or folder could not be used, or none more be opened; None for others.

    Only where a command ends with it: what deals with an OSError itself knows more about it.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(_LOOP):  # of Path.resolve, before Python 3.13
        return ResourceError(f"{str(error).removeprefix(_LOOP).strip()} is a symbolic link to itself. Remove it")
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_DESCRIPTORS:
        return ResourceError(f"{error.strerror}. Raise the limit (ulimit -n 4096), and run the same command again")
    if error.filename is None and error.errno in _DISK_FAILS:
        return ResourceError(f"{error.strerror}. Check the disk or the network drive, and run the same command again")
    if error.errno not in _NO_PLACE or error.filename is None:
        return None
    named = getattr(error, "filename2", None) or error.filename  # the target, where a file was to take its place
    place = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else str(named)
    if error.errno == errno.ELOOP and os.path.islink(place):
        return ResourceError(f"{place} is a symbolic link where a file of ours is written. Remove it, and run again")
    return ResourceError(
        f"{place}: {error.strerror}. Check the place, its permissions and its disk, and run the same command again"
    )


def first_line(error: BaseException) -> str:
    """Return what of an error's text is worth a line; empty where it has none."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def run_command(main: Callable[[], int | None]) -> int:
    """Run ``main`` and return its exit code; what a user can act on becomes one ``error:`` line on stderr.

    That is a :class:`NanoditError`, a lack of memory or disk (:func:`resource_error`), a place that cannot be used
    (:func:`place_error`), and SIGINT or SIGTERM where ``main`` does not handle them. Where nobody reads stdout any more
    the command ends as after a signal, silently. Any other exception is a defect of ours and keeps its traceback.
    ``NANODIT_TRACEBACK=1`` in the environment prints the traceback of every error, before its line.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a name shows its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _sigterm_as_interrupt():
            try:
                return main() or 0
            except Exception as error:
                if _sigterm_came and not isinstance(error, NanoditError):
                    raise KeyboardInterrupt from error  # which became this error where a C extension was being imported
                raise
    except NanoditError as error:
        return _report(error)
    except KeyboardInterrupt:
        return _report(Interrupted("stopped by a signal; finished work is kept, and the same command continues"))
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return Interrupted.exit_code
    except Exception as error:
        known = resource_error(error) or place_error(error)
        if known is None:
            raise
        return _report(known, error)


def settled(code: int) -> int:
    """Return a command's exit code, which SIGINT and SIGTERM change no more: from now on they end the process with it.

    For a program's last statement. What Python and its libraries do at their end would otherwise meet a signal with a
    traceback, and a supervisor would be told that finished work was broken off.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    return code


def printable(text: str) -> str:
    """Escape what moves a terminal's cursor or hides letters, as ``\\x1b``: names of files may hold it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _report(error: NanoditError, cause: BaseException | None = None) -> int:
    sys.stdout.flush()
    if os.environ.get("NANODIT_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(cause or error)
    lines = str(error).split(PROBLEM_BREAK)
    print(f"error: {PROBLEM_BREAK.join(map(printable, lines))}", file=sys.stderr, flush=True)
    return error.exit_code


def end_process(error: NanoditError) -> NoReturn:
    """Report an error and end this process with its exit code, at once and from any thread.

    For what the main thread cannot be told of any more. No ``finally`` is run, as after SIGKILL.
    """
    with suppress(Exception):  # stdout may be closed
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h\n")  # a live bar hides the cursor
        _report(error)
    os._exit(error.exit_code)


def _unread(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose other end is closed, as by ``| head``."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # closed, or not a file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


class Signalled(KeyboardInterrupt):
    """SIGTERM, which asks to stop as Ctrl-C does.

    Where KeyboardInterrupt itself once left code that was executed from a string, as dataclasses have, ``python -m``
    ends by SIGINT in the end, whatever became of it and whatever the exit code; of a class of its own it does not.
    """


_sigterm_came = False


def sigterm_came() -> bool:
    """Return whether SIGTERM came since :func:`run_command` began; false outside it.

    It raised KeyboardInterrupt then, which is lost where it meets a C extension that is being imported, say.
    """
    return _sigterm_came


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, where ``main`` installs no handler of its own."""
    global _sigterm_came
    if threading.current_thread() is not threading.main_thread():  # which alone may install handlers
        yield
        return
    owner, _sigterm_came = os.getpid(), False

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _sigterm_came
        _sigterm_came = True
        if os.getpid() != owner:  # a forked child inherits the handler, but ends as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Signalled

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        _sigterm_came = False
