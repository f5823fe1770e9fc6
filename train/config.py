"""The trainer's config: each component's section beside the component, composed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nanodit.config import Config, Place
from train.data.batch_plan import Phase
from train.hardware import Precision
from train.method.dropout import ConditioningConfig
from train.method.ema import EmaConfig
from train.method.flow import FlowConfig
from train.method.loss import LossConfig
from train.method.optim import OptimizerConfig
from train.method.perceptual import PerceptualConfig
from train.method.repa import RepaConfig
from train.method.sampling import Guidance, GuidanceValue, Method, Sampling
from train.method.schedule import Schedule
from train.model.conditions import Subset
from train.model.config import ModelConfig
from train.model.tread import TreadConfig


class TrainSection(Config):
    """Steps, batches, learning rate and numerics of the loop."""

    steps: int = Field(default=5000, gt=0)  # optimiser steps
    batch_size: int = Field(default=16, gt=0)  # images in a micro-batch, all of one bucket
    grad_accumulation_steps: int = Field(default=1, gt=0)  # micro-batches in an optimiser step
    # image tokens of a micro-batch at most; the step's images, as many as before, are cut into micro-batches by it
    token_budget: int | None = Field(default=None, gt=0)
    phases: list[Phase] = Field(default=[])  # of another resolution, in order; full size after the last
    lr: float = Field(default=3e-4, gt=0)  # the peak, for every optimiser
    lr_min: float = Field(default=1e-6, ge=0)  # where the schedule ends
    warmup: int | None = Field(default=None, ge=0)  # steps; null: min(500, 5 % of the steps)
    schedule: Schedule = "cosine"  # after the warm-up; wsd: warm-up, stable, decay
    decay_share: float = Field(default=0.2, gt=0, le=1)  # of the steps, at the end; of wsd alone
    grad_clip: float = Field(default=1.0, gt=0)  # of the norm over all parameters
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # null: the power warm-up, which suits any length
    ema_warmup: int = Field(default=0, ge=0)  # steps that a fixed decay leaves out of the average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware multiplies it
    gradient_checkpointing: Literal["none", "all"] | Annotated[int, Field(gt=0)] = "none"  # k: every k-th block
    compile: bool | Literal["auto"] = False  # each block by itself; auto: where a compiler is found
    threads: int | None = Field(default=None, gt=0)  # of torch on the CPU; null: torch's own choice
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("phases")
    @classmethod
    def _check_phases(cls, phases: list[Phase]) -> list[Phase]:
        ends = [phase.until_step for phase in phases]
        if ends != sorted(set(ends)):
            raise ValueError(f"until_step must grow from phase to phase, not {ends}")
        return phases

    @model_validator(mode="after")
    def _check_average(self) -> TrainSection:
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup belongs to a fixed ema_decay; set that too")
        return self

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        return {True: "all", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def checkpoint_every(self) -> int:
        """Every so many blocks are recomputed in the backward pass, 0: none."""
        return {"none": 0, "all": 1}.get(self.gradient_checkpointing, self.gradient_checkpointing)


class DataSection(Config):
    """How samples are read, and who draws their noise; no effect on which ones or in which order."""

    # probability that an image is mirrored, with all its conditions, if its caption allows it
    flip: float = Field(default=0.0, ge=0, le=0.5)
    # probability that an image is given its short caption in place of the long one
    short_captions: float = Field(default=0.0, ge=0, le=1)
    cache_gb: float = Field(default=4.0, ge=0)  # 1e9 bytes of decoded samples kept in memory
    prefetch: int = Field(default=2, ge=0)  # micro-batches made ahead in the background; 0: none, and no thread
    # who draws the noise, which is another for each; auto: the host for a CPU, the device for a GPU, and what it was
    # where a run goes on
    noise: Literal["auto", "host", "device"] = "auto"
    # threads that make them, each one at a time; auto: one less than the processors, from 1 to 8
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"


class CheckpointSection(Config):
    """When to save, and how many to keep."""

    every_steps: int = Field(default=500, gt=0)
    every_minutes: float | None = Field(default=None, gt=0)  # since the last one; null: by steps alone
    keep_last: int | None = Field(default=None, gt=0)  # null: all
    keep_every: int | None = Field(default=None, gt=0)  # steps whose multiples are kept for good; null: none

    @model_validator(mode="after")
    def _check_retention(self) -> CheckpointSection:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every says what keep_last must leave; set keep_last too")
        return self


class VisualDebugSection(Config):
    """The grid of holdout samples drawn from EMA weights; ``every_steps`` 0 turns it off."""

    every_steps: int = Field(default=500, ge=0)
    count: int = Field(default=8, gt=0)  # holdout samples
    method: Method = "heun"
    steps: int = Field(default=20, gt=0)  # of the sampler
    guidance: GuidanceValue = 1.0  # of all conditions, {text: 3, dino: 1.5} of some, or {self: 3}
    precision: Precision = "fp32"

    def sampling(self, given: Subset) -> Sampling:
        """Return how a picture of these conditions is drawn."""
        guidance = Guidance.of(self.guidance).of_given(given)
        return Sampling(self.method, self.steps, **guidance.fields, precision=self.precision)


class ValidationSection(Config):
    """The loss of holdout samples, measured while the run trains; ``every_steps`` 0 turns it off.

    ``tests`` of :mod:`evaluate` beside it draw pictures and write a report's files.
    """

    every_steps: int = Field(default=0, ge=0)
    samples: int = Field(default=64, gt=0)  # of the holdout, at most
    seed: int | None = Field(default=None, ge=0)  # chooses them; null: the first in key order
    # given conditions; those that the dropout table never trains are left out
    conditions: list[str] = Field(default=["all", "text"], min_length=1)
    tests: list[str] = Field(default=[])  # of evaluate, at its tier pulse
    evaluate_overrides: dict[str, Any] = Field(default={})  # of evaluate's config for these tests, by dotted key


class TrainConfig(Config):
    """Everything that ``nanodit train run`` reads."""

    dataset: Place
    output: Place
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=1, gt=0)
    model: ModelConfig = ModelConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    flow: FlowConfig = FlowConfig()
    tread: TreadConfig = TreadConfig()
    repa: RepaConfig = RepaConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainSection = TrainSection()
    ema: EmaConfig = EmaConfig()
    data: DataSection = DataSection()
    checkpoint: CheckpointSection = CheckpointSection()
    visual_debug: VisualDebugSection = VisualDebugSection()
    validation: ValidationSection = ValidationSection()

    @model_validator(mode="after")
    def _check_table(self) -> TrainConfig:
        self.conditioning.resolve()  # a wrong table is refused here and not after a minute of loading
        self.tread.route(self.model.depth)
        self.repa.blocks(self.model.depth)
        return self

    @property
    def losses(self) -> list[LossConfig]:
        """The sections of losses beside the flow loss, on or off, in their order."""
        sections = (getattr(self, name) for name in type(self).model_fields)
        return [section for section in sections if isinstance(section, LossConfig)]

    @property
    def run_folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output)
