"""What a sweep is: arms over one base config, seeds, a budget, and one metric declared before the first trial.

A sweep's YAML becomes trials, each an ordinary config of ``train run``; between two arms that are compared, everything
that differs beyond the declared factor is listed as undeclared.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nanodit.config import (
    Config,
    Place,
    dump_config,
    find_config,
    load_config,
    load_config_with_origins,
    override_text,
    section_model,
)
from nanodit.errors import ConfigError
from train.checkpoint.resume import differences
from train.config import TrainConfig

SCHEMA = 1
AA = "A/A"  # the arm that repeats the baseline with other seeds: what it differs by is noise
AA_FOLDER = "A-A"  # no arm can be called so
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*")
EVALUATE = "evaluate."  # before the keys of an evaluation, among differences and factors
OF_THE_TRIAL = ("seed", "output")  # differ between all trials
FREE = ("resources", "retries", "concurrent", "questions")  # may change on --resume: no result depends on them


class ArmConfig(Config):
    """One arm: what it changes, and where it starts from."""

    on: str | None = None  # the arm whose overrides it takes first, and with which it is compared; null: the first arm
    factor: str | list[str] | None = None  # of `factors`: what it is declared to change
    overrides: dict[str, Any] = Field(default={})  # keys of the trainer's config
    evaluate: dict[str, Any] = Field(default={})  # keys of the evaluation's config


class BudgetConfig(Config):
    """How long each trial trains: exactly one of the three."""

    steps: int | None = Field(default=None, gt=0)  # optimiser steps
    samples: int | None = Field(default=None, gt=0)  # images seen, rounded up to whole steps
    hours: float | None = Field(default=None, gt=0)  # of training at the pace measured when a trial begins

    @model_validator(mode="after")
    def _check_one(self) -> BudgetConfig:
        if sum(value is not None for value in (self.steps, self.samples, self.hours)) != 1:
            raise ValueError("a budget is one of steps, samples and hours")
        return self


class PrimaryConfig(Config):
    """The metric that decides, declared before anything is trained."""

    metric: str  # as `evaluate run` names it in report.json
    mode: Literal["min", "max"] = "min"  # which way is better
    margin: float | None = Field(default=None, ge=0)  # differences within it are equivalent; null: none is


class QuestionConfig(Config):
    """A question that the report answers beside the primary metric: by how much one arm differs from another."""

    arms: list[str] = Field(min_length=2, max_length=2)  # the second against the first
    ask: str = Field(min_length=1)
    # peak_memory, iterations_per_second, slope (of ln(held-out loss) over ln(step)) or metrics of report.json
    measures: list[str] = Field(min_length=1)


class ResourcesConfig(Config):
    """What one trial gets of the machine."""

    gpu: float | None = Field(default=None, ge=0)  # null: one where there is one; a fraction shares it
    cpu: float = Field(default=1, gt=0)  # also the threads of torch, where train.threads is null

    @field_validator("gpu")
    @classmethod
    def _check_whole(cls, gpu: float | None) -> float | None:
        if gpu is not None and gpu > 1 and gpu != int(gpu):
            raise ValueError("more than one GPU must be whole ones")
        return gpu


class SweepConfig(Config):
    """Everything that ``nanodit train sweep`` reads; files are relative to the sweep's own."""

    base: Place  # config of `train run`
    dataset: Place | None = None  # of every trial; null: the base's
    output: Place  # folder of the sweep
    overrides: dict[str, Any] = Field(default={})  # of every trial
    evaluate: Place  # config of `evaluate run`
    evaluate_overrides: dict[str, Any] = Field(default={})  # of every evaluation
    factors: dict[str, list[str]] = Field(default={})  # name -> keys, or sections of them, that it consists of
    arms: dict[str, ArmConfig] = Field(min_length=1)  # the first is the baseline
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    max_seeds: int | None = Field(default=None, ge=3)  # up to which seeds may be added and judged; null: none may
    aa_seeds: list[int] = Field(default=[])  # of the baseline once more, as the arm A/A; [] : no such arm
    budget: BudgetConfig
    primary: PrimaryConfig
    # those about arms that an extending file left out are not asked
    questions: list[QuestionConfig] = Field(default=[])
    early_stopping: Literal["none", "asha"] = "none"  # asha: stopped arms take no part in claims
    asha_grace: float = Field(default=0.25, gt=0, lt=1)  # share of the steps before which nothing is stopped
    resources: ResourcesConfig = ResourcesConfig()
    concurrent: int | None = Field(default=None, gt=0)  # trials at a time, at most; null: as many as fit
    retries: int = Field(default=2, ge=0)  # of a trial that died, from its last checkpoint

    @model_validator(mode="after")
    def _check_arms(self) -> SweepConfig:
        known: list[str] = []
        for name, arm in self.arms.items():
            if not ARM_NAME.fullmatch(name):
                raise ValueError(f"arm {name!r}: a name is letters, digits, _, + and . (it becomes a folder's)")
            if arm.on is not None and arm.on not in known:
                raise ValueError(f"arm {name}: on {arm.on} is no arm before it; there: {', '.join(known) or 'none'}")
            for factor in factors_of(arm):
                if factor not in self.factors:
                    raise ValueError(f"arm {name}: factor {factor} is not in factors: {', '.join(self.factors)}")
            known.append(name)
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> SweepConfig:
        seeds = [*self.seeds, *self.aa_seeds]
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds and aa_seeds must be different numbers from 0 on, not {seeds}")
        if self.max_seeds is not None and len(self.seeds) > self.max_seeds:
            raise ValueError(f"{len(self.seeds)} seeds, but max_seeds declares at most {self.max_seeds}")
        return self

    @model_validator(mode="after")
    def _check_stopping(self) -> SweepConfig:
        if self.early_stopping == "asha" and self.budget.hours is not None:
            raise ValueError("early_stopping asha compares trials at equal steps; give the budget in steps or samples")
        return self


def factors_of(arm: ArmConfig) -> tuple[str, ...]:
    """Return the factors that an arm declares."""
    return (arm.factor,) if isinstance(arm.factor, str) else tuple(arm.factor or ())


@dataclass(frozen=True)
class Arm:
    """An arm with everything that it inherits."""

    name: str
    role: Literal["baseline", "arm", "a/a"]
    against: str | None  # the arm it is compared with
    factors: tuple[str, ...]
    overrides: Mapping[str, Any]  # dotted key -> value, of the trainer's config
    evaluate: Mapping[str, Any]  # and of the evaluation's
    seeds: tuple[int, ...]

    @property
    def folder(self) -> str:
        """The name as part of a folder's."""
        return AA_FOLDER if self.role == "a/a" else self.name


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    arm: Arm
    config: TrainConfig
    trained_by: str | None = None  # the trial with the same training, whose weights it measures in another way

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm.folder}-seed{self.config.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep's arms and trials, the trials in the order in which they are started: seed by seed."""

    config: SweepConfig
    arms: Mapping[str, Arm]
    trials: Sequence[Trial]
    declared: Mapping[str, dict[str, Any]]  # what sweep.json says of each arm, whether or not it was chosen

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.config.output)

    @property
    def trials_folder(self) -> Path:
        """Where the run folders are."""
        return self.folder / "trials"

    def evaluation_of(self, arm: Arm) -> list[str]:
        """Return the overrides of an arm's evaluation as a command line has them: by dev, as sweeps are to choose."""
        return as_arguments({"holdout": "dev", **self.config.evaluate_overrides, **arm.evaluate})

    def absent(self, question: QuestionConfig) -> list[str]:
        """Return the arms that a question is about and that are not here."""
        return [name for name in question.arms if name == AA or name not in self.arms]

    def choose(self, names: Collection[str]) -> Sweep:
        """Return the part of the sweep that these arms are, with those whose weights they measure; all without names.

        Arms keep what they inherit and what they are declared against. Raises :class:`ConfigError` for other names.
        """
        for name in names:
            if name not in self.arms:
                near = difflib.get_close_matches(name, self.arms, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there: {', '.join(self.arms)}"
                raise ConfigError(f"--arms {name}: there is no such arm; {hint}")
        arms = {trial.name: trial.arm.name for trial in self.trials}
        needed = {arms[trial.trained_by] for trial in self.trials if trial.trained_by and trial.arm.name in names}
        chosen = {*(names or self.arms), *needed}
        return replace(
            self,
            arms={name: arm for name, arm in self.arms.items() if name in chosen},
            trials=[trial for trial in self.trials if trial.arm.name in chosen],
        )

    def record(self, concurrent: int, fractional: bool) -> dict[str, Any]:
        """Return what sweep.json declares: arms with their differences, seeds, budget and the primary metric."""
        config = self.config
        return {
            "schema": SCHEMA,
            "name": self.folder.name,
            "arms": {name: self.declared[name] for name in self.arms},
            "factors": config.factors,
            "seeds": config.seeds,
            "aa_seeds": config.aa_seeds,
            "max_seeds": config.max_seeds,
            "budget": config.budget.model_dump(exclude_none=True),
            "primary": config.primary.model_dump(),
            "questions": [question.model_dump() for question in config.questions if not self.absent(question)],
            "early_stopping": config.early_stopping,
            "concurrent": concurrent,
            "fractional": fractional,
            "time_claims": concurrent == 1 and not fractional,
        }


def _describe(arm: Arm, first: Mapping[str, Trial], factors: Mapping[str, list[str]]) -> dict[str, Any]:
    changed: dict[str, list[Any]] = {}
    if arm.against is not None:
        changed = _differences(first[arm.against], first[arm.name])
    prefixes = [prefix for factor in arm.factors for prefix in factors[factor]]
    return {
        "role": arm.role,
        "against": arm.against,
        "factor": arm.factors[0] if len(arm.factors) == 1 else list(arm.factors) or None,
        "overrides": {**arm.overrides, **{EVALUATE + key: value for key, value in arm.evaluate.items()}},
        "differences": changed,
        "undeclared": [key for key in changed if not any(key == p or key.startswith(p + ".") for p in prefixes)],
    }


def _differences(theirs: Trial, ours: Trial) -> dict[str, list[Any]]:
    configs = (trial.config.model_dump(mode="json") for trial in (theirs, ours))
    found = {key: [before, after] for key, before, after in differences(*configs) if key not in OF_THE_TRIAL}
    measured = differences(dict(theirs.arm.evaluate), dict(ours.arm.evaluate), EVALUATE)
    return found | {key: [before, after] for key, before, after in measured}


def load_sweep(file: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's YAML and resolve every trial. Raises :class:`ConfigError` that names the arm and the key."""
    config, origins = load_config_with_origins(SweepConfig, file, overrides)
    places = {name: _place(getattr(config, name), origins[name], file) for name in ("base", "evaluate")}
    return resolve(config.model_copy(update=places))


def _place(given: str, origin: str | None, file: Path) -> str:
    """Return where a config is: beside the file that names it, which ``file`` may extend.

    One of a command line may also be relative to the working directory.
    """
    if origin == "command line" and (here := find_config(given)).exists():
        return str(here)
    named_in = file if origin in ("command line", "default", None) else Path(origin)
    return str(named_in.parent / given)


def dump_sweep(sweep: Sweep) -> str:
    """Write the sweep's config as YAML that :func:`load_sweep` reads from the sweep's folder."""
    here = sweep.folder.absolute()
    places = {name: os.path.relpath(getattr(sweep.config, name), here) for name in ("base", "evaluate")}
    return dump_config(sweep.config.model_copy(update=places))


def resolve(config: SweepConfig) -> Sweep:
    """Make the arms and the trials of a config whose files are relative to the working directory."""
    arms: dict[str, Arm] = {}
    for name, declared in config.arms.items():
        start = arms.get(declared.on or "")
        baseline = next(iter(config.arms))
        arms[name] = Arm(
            name=name,
            role="baseline" if name == baseline else "arm",
            against=None if name == baseline else declared.on or baseline,
            factors=factors_of(declared),
            overrides={**(start.overrides if start else {}), **flatten(declared.overrides)},
            evaluate={**(start.evaluate if start else {}), **declared.evaluate},
            seeds=tuple(config.seeds),
        )
    baseline = next(iter(arms.values()))
    if config.aa_seeds:
        seeds = tuple(config.aa_seeds)
        arms[AA] = Arm(AA, "a/a", baseline.name, (), baseline.overrides, baseline.evaluate, seeds)
    trials = tuple(_trials(config, arms))
    first = {trial.arm.name: trial for trial in reversed(trials)}
    declared = {name: _describe(arm, first, config.factors) for name, arm in arms.items()}
    for arm in arms.values():
        if arm.role == "arm" and not declared[arm.name]["differences"]:
            raise ConfigError(f"arm {arm.name} differs from {arm.against} in nothing; change it or leave it out")
    return Sweep(config, arms, trials, declared)


def _trials(config: SweepConfig, arms: Mapping[str, Arm]) -> Iterator[Trial]:
    # seed by seed, so that what an early end leaves can be compared
    rounds = max(len(arm.seeds) for arm in arms.values())
    pairs = [(arm, arm.seeds[n]) for n in range(rounds) for arm in arms.values() if n < len(arm.seeds)]
    trained: dict[str, str] = {}
    for arm, seed in pairs:
        trial = Trial(arm, _train_config(config, arm, seed))
        same = json.dumps(trial.config.model_dump(mode="json", exclude={"output"}), sort_keys=True)
        by = trained.setdefault(same, trial.name)
        yield trial if by == trial.name else Trial(arm, trial.config, by)


def _train_config(config: SweepConfig, arm: Arm, seed: int) -> TrainConfig:
    dataset = {} if config.dataset is None else {"dataset": config.dataset}
    chosen = {**flatten(config.overrides), **dataset, **arm.overrides}
    folder = Path(config.output) / "trials" / f"{arm.folder}-seed{seed}"
    fixed: dict[str, Any] = {"seed": seed, "output": str(folder)}
    if clash := [key for key in (*fixed, "train.steps") if key in chosen]:
        raise ConfigError(f"arm {arm.name}: {clash[0]} is set by the sweep itself (seeds, output, budget); remove it")
    try:
        trial = load_config(TrainConfig, config.base, as_arguments({**chosen, **fixed}))
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from None
    train: dict[str, Any] = {}
    if config.budget.steps is not None:
        train["steps"] = config.budget.steps
    if config.budget.samples is not None:
        images = trial.train.batch_size * trial.train.grad_accumulation_steps
        train["steps"] = math.ceil(config.budget.samples / images)
    if trial.train.threads is None:
        train["threads"] = max(1, int(config.resources.cpu))
    if config.early_stopping != "none" and not trial.validation.every_steps:
        raise ConfigError(f"arm {arm.name}: early_stopping looks at validation; set validation.every_steps")
    return trial.model_copy(update={"train": trial.train.model_copy(update=train)})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of overrides that may be nested as the config's sections are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and section_model(TrainConfig, (prefix + key).split(".")):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Write overrides as a command line has them."""
    return [override_text(key, value) for key, value in values.items()]


def changes_on_resume(before: SweepConfig, after: SweepConfig) -> list[str]:
    """Return what a continued sweep may not change, as lines ``key: before -> after``; seeds may be added."""
    old, new = (one.model_dump(mode="json", exclude={*FREE, "output", "base", "evaluate"}) for one in (before, after))
    for name in ("seeds", "aa_seeds"):
        if set(old[name]) <= set(new[name]):
            old[name] = new[name]
    return [f"{key}: {theirs!r} -> {ours!r}" for key, theirs, ours in differences(old, new)]
