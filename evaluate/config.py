"""What an evaluation reads from its YAML: samples, conditions and guidance, sampler, grid, bars."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from evaluate.drawing.arms import SamplerConfig
from evaluate.metrics.examiner import PoseModelsConfig
from evaluate.suite.divergence import DivergenceConfig
from evaluate.suite.edit import EditConfig
from evaluate.suite.heldout_loss import HeldoutLossConfig
from evaluate.suite.pose import PoseConfig
from evaluate.suite.reconstruction import ReconstructionConfig
from evaluate.suite.swap import SwapConfig
from nanodit.config import Config
from nanodit.place import PROJECT

TestName = Literal[
    "heldout_loss", "reconstruction", "attributes", "swap", "edit", "divergence", "pose", "memorisation", "distribution"
]


class EvaluateConfig(Config):
    """Everything that ``nanodit evaluate run`` reads beside the checkpoint."""

    tests: list[TestName] = Field(default=list(get_args(TestName)), min_length=1)
    samples: int = Field(default=256, gt=0)  # holdout images, at most
    seeds: int = Field(default=1, gt=0)  # noises per image and condition
    # conditions kept -> guidance scale; guidance 1 is none, and what reconstruction is quoted at
    conditions: dict[str, float] = Field(default={"all": 1.0, "text+pose": 2.0, "text": 2.0})
    sampler: SamplerConfig = SamplerConfig()
    heldout_loss: HeldoutLossConfig = HeldoutLossConfig()
    swap: SwapConfig = SwapConfig()
    edit: EditConfig = EditConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    pose: PoseConfig = PoseConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    baseline_images: int = Field(default=512, gt=0)  # training images behind the mean image and the affine fit
    training_features: int = Field(default=4096, gt=0)  # training images that pictures are compared with
    judge: str | None = (
        None  # encoder of likeness, a folder or in the hub's cache; null: see evaluate/metrics/likeness.py
    )
    probe: str | None = None  # CLIP model that is asked for what an edit names, a folder or in the hub's cache
    # DWPose's files; null: the demo networks for datasets made with demo encoders, otherwise no judging of joints
    pose_models: PoseModelsConfig | None = None
    needed: dict[str, float] = Field(default={})  # metric name -> the bar it is held against in the report
    grid_images: int = Field(default=8, ge=0)  # samples whose pictures are kept for the report
    batch_size: int = Field(default=32, gt=0)  # changes no number
    device: Literal["auto", "cpu", "cuda"] = "auto"


def tier_file(tier: str) -> Path:
    """Return the config of a tier: in the working directory's configs/evaluate, otherwise the installed one."""
    name = Path("configs") / "evaluate" / f"{tier}.yaml"
    return name if name.is_file() else PROJECT / "nanodit" / name
