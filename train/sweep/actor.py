"""The actor through which Ray Tune runs a trial: it waits for the trial's process, and survives its death.

Imports no torch, so that a supervisor starts fast and is small.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ray import tune

from train.sweep.process import TrialProcess, ending, wait_for_gpu
from train.sweep.record import CONFIG, FAILED, FINAL_CODES, FINISHED, read_record, write_record

CURVE = "validation/heldout_error"  # what early stopping looks at
LOOK = 2.0  # seconds between looks at the trial


class SupervisedTrial(tune.Trainable):
    """A trial as Tune sees it: a child process to wait for, whose death the actor survives."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the child, once nothing else computes on its GPU."""
        self.folder = Path(config["folder"])
        self.trial = self.folder / "trials" / config["trial"]
        self.retries, self.watch, self.reported = config["retries"], config["watch"], 0
        self.trial.mkdir(parents=True, exist_ok=True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if config["whole_gpus"] and visible:
            wait_for_gpu(visible)
        if config["fault"]:
            os.environ["NANODIT_FAULT"] = config["fault"]
        here, log = Path(config["directory"]), self.trial / "trial.log"
        self.child = TrialProcess(self.folder / CONFIG, config["trial"], log, here, config["threads"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial: starting an actor takes seconds, and nothing of a trial is in this process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the end of the child, or for the next value that early stopping is to look at."""
        while True:
            if self.watch and (point := self._next_point()):
                return point
            code = self.child.wait(LOOK if self.watch else None)
            if code is not None:
                return self._ended(code)

    def cleanup(self) -> None:
        """End the child, if it still runs."""
        if hasattr(self, "child"):
            self.child.end()

    def _next_point(self) -> dict[str, Any] | None:
        from train.loop.tracking import read_metrics

        records = read_metrics(self.trial / "metrics.jsonl")
        found = next((one for one in records if one["step"] > self.reported and CURVE in one), None)
        if found is None:
            return None
        self.reported = found["step"]
        return {"step": found["step"], CURVE: found[CURVE]}

    def _ended(self, code: int) -> dict[str, Any]:
        record = read_record(self.trial)
        if record.get("status") == FINISHED:
            return {"done": True, "step": record["steps"]}
        reason = record.get("reason") or f"{ending(code)}; the last line of trial.log: {self.child.last_words}"
        failures = record.get("failures", 0) + 1
        record |= {"reason": reason, "failures": failures}
        if code in FINAL_CODES or failures > self.retries:
            write_record(self.trial, record | {"status": FAILED, "ended": time.time()})
            return {"done": True}
        write_record(self.trial, record)
        raise RuntimeError(reason)  # Tune tries again, from the last checkpoint
