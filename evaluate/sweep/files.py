"""The files of a sweep: its declaration ``sweep.json``, and one run folder with ``trial.json`` for each trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evaluate.records import DEV
from evaluate.report.files import read_object, step_of
from evaluate.statistics.looks import FEWEST, Looks
from nanodit.errors import DataError
from train.loop.tracking import read_metrics

SCHEMA = 1
SWEEP, TRIAL, TRIALS = "sweep.json", "trial.json", "trials"
OUTPUTS = "validation_outputs"
AGAIN = "Run nanodit train sweep --resume to make what is missing"
RATE = "sys/iter_per_sec"
VALIDATION = "validation/heldout_error"
NEEDED = ("arms", "seeds", "primary", "time_claims")


@dataclass(frozen=True)
class RecordedArm:
    """One arm as it was declared: what it is compared with, and everything that it changes there."""

    name: str
    role: Literal["baseline", "arm", "a/a"]
    against: str | None = None
    factors: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # key -> [of `against`, of this arm]
    undeclared: Sequence[str] = ()  # keys among these that belong to none of the factors

    @classmethod
    def of(cls, name: str, content: Mapping[str, Any]) -> RecordedArm:
        """Read an entry of sweep.json."""
        factor = content.get("factor") or ()
        return cls(
            name,
            str(content.get("role", "arm")).lower(),
            content.get("against"),
            (factor,) if isinstance(factor, str) else tuple(factor),
            content.get("overrides") or {},
            content.get("differences") or {},
            tuple(content.get("undeclared") or ()),
        )


@dataclass(frozen=True)
class RecordedTrial:
    """One training run of the sweep, as far as it came.

    ``metrics`` are the entries of its last evaluation's report.json by name, ``skipped`` the reasons for those that are
    not there; ``evaluated`` is that evaluation's step, None where there is none.
    """

    arm: str
    seed: int
    folder: Path
    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    evaluated: int | None = None

    @property
    def status(self) -> str:
        """``finished``, ``failed``, ``stopped``, ``running`` or ``not started``."""
        return self.record.get("status", "not started")

    @property
    def reason(self) -> str | None:
        """Why the trial did not finish, as its record says."""
        return self.record.get("reason")

    def number(self, name: str) -> float | None:
        """Return a number of the trial's record; None where it is not known, or no number."""
        value = self.record.get(name)
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else None

    @cached_property
    def cohort(self) -> str:
        """Everything outside of the configuration that may move a number, as canonical text."""
        return json.dumps(self.record.get("cohort") or {}, sort_keys=True, default=str)

    def value(self, name: str) -> float | None:
        """Return a metric of the last evaluation, or the last value logged under a tag; None if not a number."""
        if name in self.metrics:
            value = self.metrics[name]["value"]
        elif "/" in name:
            value = next((record[name] for record in reversed(self.log) if name in record), None)
        else:
            value = self.number(name)
        return float(value) if value is not None and math.isfinite(value) else None

    def excluded(self, name: str) -> str | None:
        """Return why the trial takes no part in a claim about a metric; None where it does."""
        if self.status != "finished":
            return f"{self.status}: {self.reason}" if self.reason else self.status
        if self.value(name) is not None:
            steps = self.number("steps")
            if name in self.metrics and steps is not None and self.evaluated != steps:
                return f"evaluated at step {self.evaluated}, not at its last step, {steps:.0f}"
            return None
        if name in self.metrics or any(name in record for record in self.log):
            return self.metrics.get(name, {}).get("reason") or "the value is not a number"
        if name in self.skipped:
            return f"skipped: {self.skipped[name]}"
        return "never evaluated" if self.evaluated is None else f"its evaluation holds no {name}"

    def lost(self, name: str) -> str | None:
        """Return why a trial ended without a value of a metric, as one that diverged does; None where it did not."""
        measured = name in self.metrics or any(name in record for record in self.log)
        if self.status in ("failed", "stopped") or (
            self.status == "finished" and measured and self.value(name) is None
        ):
            return self.excluded(name)
        return None

    @cached_property
    def clock(self) -> dict[int, float]:
        """Seconds of training up to each logged step, from the rates logged (no validation, saving, compilation).

        A step without a rate takes that of the next one which has one, or of the last. Empty where none was logged.
        """
        rates = [record.get(RATE) for record in self.log]
        following = next((rate for rate in reversed(rates) if rate), None)
        if following is None:
            return {}
        for index in reversed(range(len(rates))):
            following = rates[index] = rates[index] or following
        seconds, step, found = 0.0, 0, {}
        for record, rate in zip(self.log, rates):
            seconds += max(0, record["step"] - step) / rate
            step = record["step"]
            found[step] = seconds
        return found

    def curve(self, tag: str, axis: Literal["step", "images", "minutes"] = "step") -> list[tuple[float, float]]:
        """Return what was logged under ``tag`` over steps, images seen or minutes of training; empty where unknown."""
        points = [(record["step"], record[tag]) for record in self.log if tag in record]
        points = [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]
        if axis == "minutes":
            return [(self.clock[step] / 60, value) for step, value in points if step in self.clock]
        if axis == "images":
            images, steps = self.number("images"), self.number("steps")
            return [(step * images / steps, value) for step, value in points] if images and steps else []
        return [(float(step), value) for step, value in points]


@dataclass(frozen=True)
class RecordedSweep:
    """A sweep, read: the declaration, and every trial that it asks for in the order of arms and seeds."""

    folder: Path
    content: Mapping[str, Any]
    arms: Mapping[str, RecordedArm]
    trials: Sequence[RecordedTrial]

    @property
    def name(self) -> str:
        """The name of the sweep."""
        return str(self.content.get("name") or "sweep")

    @property
    def primary(self) -> str:
        """The metric that was declared before the first trial."""
        return self.content["primary"]["metric"]

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which way the primary metric is good."""
        return self.content["primary"].get("mode", "min")

    @property
    def margin(self) -> float | None:
        """Differences of the primary metric within it were declared to make none."""
        return self.content["primary"].get("margin")

    @property
    def looks(self) -> Looks:
        """The numbers of seeds at which the sweep could be judged, and the most that it declared."""
        seeds = self.content.get("looks") or [len(self.content["seeds"])]
        return Looks(tuple(seeds), self.content.get("max_seeds"))

    @property
    def time_claims(self) -> bool:
        """Whether trials ran one after another on a machine of their own, so that their times mean something."""
        return bool(self.content["time_claims"])

    @property
    def memory_claims(self) -> bool:
        """Whether no two trials shared a device."""
        return not self.content.get("fractional", False)

    @classmethod
    def read(cls, folder: Path) -> RecordedSweep:
        """Read a sweep's folder. Raises :class:`DataError` for files that are missing or damaged, by name."""
        content = read_object(folder / SWEEP, AGAIN)
        if content.get("schema") != SCHEMA:
            raise DataError(
                f"{folder / SWEEP}: schema {content.get('schema')}, but this version reads {SCHEMA}. {AGAIN}"
            )
        if lacking := [name for name in NEEDED if name not in content]:
            raise DataError(f"{folder / SWEEP} is damaged (it lacks {', '.join(lacking)}). {AGAIN}")
        if problem := _problem_of_looks(content):
            raise DataError(f"{folder / SWEEP} is damaged ({problem}). {AGAIN}")
        arms = {name: RecordedArm.of(name, arm) for name, arm in content["arms"].items()}
        arms = dict(sorted(arms.items(), key=lambda item: item[1].role == "a/a"))  # the repeat, which claims nothing
        found = {}
        trials = folder / TRIALS
        for path in sorted([*trials.glob(f"*/{TRIAL}"), *trials.glob(f"*/*/{TRIAL}")]):  # an arm may be called A/A
            trial = _read_trial(path)
            found[trial.arm, trial.seed] = trial
        asked = [
            (arm.name, seed)
            for arm in arms.values()
            for seed in (content.get("aa_seeds") or () if arm.role == "a/a" else content["seeds"])
        ]
        order = list(dict.fromkeys([*asked, *sorted(found, key=str)]))
        missing = [pair for pair in order if pair not in found]
        found |= {pair: RecordedTrial(*pair, trials / f"{pair[0]}-seed{pair[1]}", {}) for pair in missing}
        return cls(folder, content, arms, [found[pair] for pair in order])


def _problem_of_looks(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the seeds at which a sweep.json may be judged, or None."""
    most, looks = content.get("max_seeds"), content.get("looks") or [len(content["seeds"])]
    if most is not None and (type(most) is not int or most < max(FEWEST, len(content["seeds"]))):
        return f"max_seeds {most!r} for {len(content['seeds'])} seeds"
    whole = isinstance(looks, list) and all(type(count) is int and count > 0 for count in looks)
    if not whole or looks != sorted(set(looks)) or looks[-1] != len(content["seeds"]):
        return f"looks {looks!r} for {len(content['seeds'])} seeds"
    return None


def evaluated(trial: Path, record: Mapping[str, Any], name: str) -> dict[int, Path]:
    """Return a file of the evaluations of a trial by step: of several of a step, the one that the sweep measured by.

    Earlier trials do not say which that is, and have it where `evaluate run` has all of the holdout, now its part test.
    """
    files = sorted(trial.glob(f"{OUTPUTS}/step-*/{name}"))
    files.sort(key=lambda path: (path.parent.name == record.get("measured_in"), not path.parent.name.endswith(DEV)))
    return {step: path for path in files if (step := step_of(path.parent))}


def _read_trial(path: Path) -> RecordedTrial:
    record = read_object(path, AGAIN)
    if lacking := [name for name in ("arm", "seed", "status") if name not in record]:
        raise DataError(f"{path} is damaged (it lacks {', '.join(lacking)}). {AGAIN}")
    folder = path.parent
    try:
        log = read_metrics(folder / "metrics.jsonl")
    except (DataError, OSError) as error:
        raise DataError(f"{folder / 'metrics.jsonl'} is damaged ({error}). {AGAIN}") from error
    reports = evaluated(folder, record, "report.json")
    if not reports:
        return RecordedTrial(record["arm"], record["seed"], folder, record, log)
    step = max(reports)
    report = read_object(reports[step], AGAIN)
    try:
        metrics = {one["name"]: {"reason": None, "settings": {}, **one} for one in report["metrics"] if "value" in one}
        skipped = {one["name"]: one["reason"] for one in report["skipped"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{reports[step]} is damaged ({error!r}). {AGAIN}") from error
    return RecordedTrial(record["arm"], record["seed"], folder, record, log, metrics, skipped, step)
