"""The context of every test: the subject, the configuration, the judges, and the training images as they see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from evaluate.drawing.arms import DrawingArm, SamplerConfig, choose_arms, named_arm, untrained
from evaluate.drawing.baselines import TrainingImages
from evaluate.drawing.pictures import Picture
from evaluate.drawing.texts import Texts
from evaluate.metrics.clip import ClipProbe
from evaluate.metrics.examiner import Examiner
from evaluate.metrics.likeness import Judge
from evaluate.metrics.training_features import TrainFeatures, load_train_features
from evaluate.records import BASELINE, ITSELF, NO_SKILL, REAL, RELATED, Metric, Skipped, cluster_of, select
from evaluate.subject import HoldoutPart, Row, Subject
from nanodit.config import Config
from prep.dataset.rows import by_key
from train.hardware import Precision
from train.method.sampling import NO_GUIDANCE, Guidance, GuidanceValue, precision_setting
from train.model.conditions import Subset


class DrawingConfig(Config):
    """The part of the config that all tests share: what is drawn, and what it is compared with."""

    samples: int = Field(default=256, gt=0)  # holdout images, at most
    holdout: HoldoutPart = "test"  # the part of it that is read
    seed: int | None = Field(default=None, ge=0)  # chooses the holdout images; null: the first in key order
    seeds: int = Field(default=1, gt=0)  # noises per image and condition
    captions: Literal["long", "short"] = "long"  # given as text
    # conditions kept -> guidance, such as 2.0, {text: 3.0, dino: 1.5} or {self: 3.0}; 1 is none, at which
    # reconstruction is quoted
    conditions: dict[str, GuidanceValue] = Field(default={"all": 1.0, "text+pose": 2.0, "text": 2.0})
    sampler: SamplerConfig = SamplerConfig()
    baseline_images: int = Field(default=512, gt=0)  # training images behind the mean image and the affine fit
    training_features: int = Field(default=4096, gt=0)  # training images that pictures are compared with
    grid_images: int = Field(default=8, ge=0)  # samples whose pictures are kept for the report
    batch_size: int = Field(default=32, gt=0)  # at most: fewer where a GPU has no room for so many; changes no number
    precision: Precision = "fp32"  # of the model under test, for pictures and held-out loss


class Rows:
    """The rows of samples.parquet: dicts with the columns of ``records.SAMPLES_SCHEMA``.

    ``feature`` and ``feature_pixels`` are float32 arrays, or None.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.all = list(rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def select(self, kind: str, condition: str, seed: int | None = None) -> list[Mapping[str, Any]]:
        """Return the rows of one kind and condition, in key order; of one noise where ``seed`` is given."""
        return [row for row in select(self.all, kind, condition) if seed is None or row["seed"] == seed]

    @cached_property
    def without_skill(self) -> dict[str, list[Mapping[str, Any]]]:
        """The rows of each baseline of NO_SKILL, in key order."""
        return {name: self.select(BASELINE, name) for name in NO_SKILL}

    @cached_property
    def clusters(self) -> dict[str, str]:
        """What every sample is resampled with, by key."""
        return {row["key"]: cluster_of(row) for row in self.all}

    @cached_property
    def real(self) -> dict[str, Mapping[str, Any]]:
        """The row of each real image by key."""
        return {row["key"]: row for row in self.all if row["kind"] == REAL}


@dataclass
class DrawingContext:
    """The things that a test may use, and the places where it leaves what is no metric.

    ``judge`` is None where its weights are missing, ``no_judge`` says why; joints are not judged where ``no_detector``
    says why, otherwise with ``detector``. ``texts`` encodes captions of one's own.
    ``looks`` tells whether a test looks at pictures: where none does, the real images are not judged either.
    ``heldout`` are the rows of heldout_loss.parquet, ``unpaired`` the features of pictures that are no rows of
    samples.parquet. ``extras`` is written to extras.json, a key for each test,
    and ``nearest`` for the pictures that a report shows first.
    """

    subject: Subject
    config: DrawingConfig
    training: TrainingImages
    judge: Judge | None
    no_judge: str | None
    examiner: Examiner
    texts: Texts
    run_folder: Path | None = None
    step: int | None = None  # of the checkpoint
    probe: ClipProbe | None = None  # CLIP; ``no_probe`` says why there is none
    no_probe: str | None = None
    detector: str = ""  # what finds the joints, as metrics name it
    no_detector: str | None = None
    looks: bool = True
    heldout: list[dict[str, Any]] = field(default_factory=list)
    unpaired: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    shown: dict[tuple[str, str, str, int], None] = field(default_factory=dict)
    shown_training: dict[str, str] = field(default_factory=dict)  # key -> path

    @property
    def figures(self) -> bool:
        """Whether the dataset knows its true attributes and joints."""
        return self.examiner.figures

    @property
    def keys(self) -> list[str]:
        """The holdout samples under test, in key order."""
        return sorted(row["key"] for row in self.subject.rows)

    @cached_property
    def apart(self) -> list[str]:
        """The samples under test, of each group of near duplicates the first: what distances between sets are of."""
        groups: dict[str, str] = {}
        for key in self.keys:
            groups.setdefault(self.rows[key].get("duplicate_group") or key, key)
        return list(groups.values())

    @cached_property
    def arms(self) -> list[DrawingArm]:
        """The configured conditions that the dataset and the model's training allow."""
        return choose_arms(self.config.conditions, self.subject)[0]

    def configured(self) -> tuple[list[Picture], list[Skipped]]:
        """Ask for every sample and noise under each configured condition; name the conditions that are left out."""
        arms, skipped = choose_arms(self.config.conditions, self.subject)
        return [picture for arm in arms for picture in self.of_all(arm)], skipped

    @cached_property
    def rows(self) -> Mapping[str, Row]:
        """Every row of the dataset's index by key: what donors are looked up in."""
        return by_key(self.subject.dataset.rows())

    @cached_property
    def train_features(self) -> TrainFeatures:
        """Features of up to ``config.training_features`` training images; ``feature`` is None without a judge."""
        return load_train_features(self.subject.dataset, self.judge, self.config.training_features)

    def arm(
        self, conditions: str, guidance: GuidanceValue | None = None, test: str = "samples"
    ) -> DrawingArm | Skipped:
        """Return how pictures given ``conditions`` (``all``, ``text+pose``, ``dino``, ``nothing`` ...) are drawn.

        ``guidance`` defaults to the configuration's for these conditions, 1 for others. Skipped, under the name
        ``TEST/CONDITIONS``, where the dataset lacks them or training never saw them.
        """
        return named_arm(conditions, guidance, self.config.conditions, self.subject, test)

    def untrained(self, subset: Subset, guidance: Guidance = NO_GUIDANCE) -> str | None:
        """Return why a picture given ``subset`` would mean nothing (``subset X never trained``), or None."""
        return untrained(subset, guidance, self.subject)

    def of_all(self, arm: DrawingArm, label: str | None = None, **given: Any) -> list[Picture]:
        """Ask for every sample and noise in this way; ``given`` are further fields of :class:`Picture`."""
        label = label or arm.name
        return [
            Picture(key, label, arm.subset, arm.guidance, seed, **given)
            for key in self.keys
            for seed in range(self.config.seeds)
        ]

    def settings(self, conditions: str, guidance: Guidance = NO_GUIDANCE, **more: Any) -> dict[str, Any]:
        """Return what pictures given ``conditions`` were drawn and judged with: the ``settings`` of a metric of them.

        Only metrics whose settings are equal may be compared.
        """
        sampler = self.config.sampler
        drawn = {"sampler": sampler.method, "steps": sampler.steps, "grid": sampler.grid, "seeds": self.config.seeds}
        if guidance != NO_GUIDANCE:
            drawn["interval"] = list(sampler.interval)
        return {**self.common, **drawn, "conditions": conditions, "guidance": guidance.value, **more}

    def settings_of(self, arms: Iterable[DrawingArm], **more: Any) -> dict[str, dict[str, Any]]:
        """Return the settings of each arm by its name."""
        return {arm.name: self.settings(arm.name, arm.guidance, **more) for arm in arms}

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every metric, also of those that need no picture."""
        chosen: dict[str, Any] = {"holdout": self.subject.part} if self.subject.part != "holdout" else {}
        chosen |= {} if self.config.seed is None else {"holdout_seed": self.config.seed}
        chosen |= {} if self.config.captions == "long" else {"given_captions": self.config.captions}
        precision = precision_setting(self.subject.precision)
        return {"weights": self.subject.weights, "base": self.subject.dataset.info["base"], **chosen, **precision}

    @property
    def judged(self) -> dict[str, Any]:
        """Settings of what the judge of likeness sees; empty without one."""
        return {} if self.judge is None else {"judge": self.judge.label}

    @property
    def lpips(self) -> dict[str, Any]:
        """Settings of what LPIPS is measured with; empty without it."""
        return {"lpips": self.examiner.lpips_label} if self.examiner.lpips_label else {}

    def objective(self, metric: Metric, minimised: Mapping[str, str]) -> str:
        """Return :attr:`Metric.objective`; ``minimised`` is that of its test's declaration."""
        losses = self.subject.losses
        judged = self.judge is not None and "dinov2" in self.judge.label and "dinov2" in losses
        said = {"flow": ITSELF, "lpips": RELATED if "lpips" in losses else "", "judge": RELATED if judged else ""}
        starts = [start for start in minimised if metric.name.startswith(start)]
        if not starts or "_pixels" in metric.name:  # mean colours, which no network sees
            return ""
        return said.get(minimised[max(starts, key=len)], "")

    def show(self, kind: str, condition: str, key: str, seed: int | None = None) -> None:
        """Keep a picture for the report: its row gets the path below the output folder as ``image``."""
        self.shown[kind, condition, key, seed or 0] = None

    def show_training(self, key: str) -> str:
        """Keep a training image for the report; returns its path below the output folder."""
        return self.shown_training.setdefault(key, f"images/train-{key}.png")
