"""When a run is saved."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from train.config import CheckpointSection
from train.loop.tracking import Tracker


class Saver:
    """Calls ``save`` when it is time: after so many steps or minutes, and before an error that would lose steps."""

    def __init__(self, config: CheckpointSection, save: Callable[[], object]) -> None:
        self.config, self.save = config, save
        self.saved = 0  # the step of the last checkpoint
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Say whether a checkpoint is to be written after ``step``."""
        minutes = (time.monotonic() - self.saved_at) / 60
        every = self.config.every_steps
        return (every > 0 and step % every == 0) or minutes >= (self.config.every_minutes or math.inf)

    def save_rest(self, step: int, tracker: Tracker) -> None:
        """Save the last completed step, unless the last checkpoint is of it."""
        if self.saved < step:
            tracker.sync()  # a checkpoint promises the records up to its step
            self.save()
            self.saved, self.saved_at = step, time.monotonic()

    @contextlib.contextmanager
    def nothing_lost(self, step: int, tracker: Tracker) -> Iterator[None]:
        """Where something in this context, which touches no weight, fails, save the steps before it."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # the first failure is the one to report
                self.save_rest(step, tracker)
            raise
