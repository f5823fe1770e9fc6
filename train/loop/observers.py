"""Observers of a run while it trains - pictures, validation - which may neither change it nor end it.

An observer gets a copy of the averaged model. Whatever it does to the process (random generators, threads, grad mode)
is undone, and where it fails, training goes on: a warning says so, and ``RUN/warnings.jsonl`` keeps it with its
traceback. Too little memory is such a failure, since a step may fit where a picture does not. A full disk is not: it
would meet the training next, and ends the run with its exit code.
"""

from __future__ import annotations

import json
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from nanodit.console import say
from nanodit.errors import DataError, MemoryShortage, NanoditError, ResourceError, resource_error
from nanodit.files import no_link
from train.checkpoint.run_folder import StopRequest

T = TypeVar("T")
WARNINGS = "warnings.jsonl"


@contextmanager
def process_restored() -> Iterator[None]:
    """Put back, at the end, what is global: all random generators, torch's threads, default dtype and grad mode."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        random.setstate(generators[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != settings[0]:
            torch.set_num_threads(settings[0])
        torch.set_default_dtype(settings[1])
        torch.set_grad_enabled(settings[2])
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        torch.set_float32_matmul_precision(precision)


def observe(what: str, step: int, run_folder: Path, stop: StopRequest, function: Callable[[], T]) -> T | None:
    """Return ``function()`` without a trace in the run; None where it failed, or was given up for a signal.

    ``what`` names the observer in the warning, e.g. ``validation``. Raises :class:`ResourceError`.
    """
    if stop.requested:
        return None
    try:
        with process_restored(), stop.interrupting():
            return function()
    except KeyboardInterrupt:
        if not stop.requested:  # not of a signal
            raise
    except Exception as error:
        lack = error if isinstance(error, ResourceError) else resource_error(error)
        less_often = f"Or do it less often: `{what}.every_steps`"
        if lack is not None and not isinstance(lack, MemoryShortage):
            raise ResourceError(f"{what} at step {step}: {lack}. {less_often}") from None
        reason = str(error) if isinstance(error, NanoditError) else f"{type(error).__name__}: {error}"
        if lack is not None:
            reason = f"{lack}. {less_often}"
        say(f"warning: {what} at step {step} failed, but training goes on: {reason}")
        keep_warning(run_folder, step, what, reason, traceback.format_exc())
    if torch.cuda.is_initialized():  # outside the handler: the error's traceback holds the tensors of what failed
        torch.cuda.empty_cache()
    return None


def keep_warning(run_folder: Path, step: int, what: str, reason: str, trace: str | None = None) -> None:
    """Add a line to the run's warnings.jsonl."""
    record = {"step": step, "what": what, "reason": reason, **({"traceback": trace} if trace else {})}
    with open(run_folder / WARNINGS, "a", encoding="utf-8", opener=no_link) as file:
        file.write(json.dumps(record) + "\n")


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return ``values`` as they are; raises :class:`DataError` naming those that are not numbers."""
    bad = [tag for tag, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DataError(f"{', '.join(bad)}: not finite")
    return dict(values)
