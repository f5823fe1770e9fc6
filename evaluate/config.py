"""What an evaluation reads from its YAML: what is drawn, the tests with a section for each, judges and bars."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from evaluate.drawing.context import DrawingConfig
from evaluate.metrics.examiner import PoseModelsConfig
from evaluate.suite.divergence import DivergenceConfig
from evaluate.suite.edit import EditConfig
from evaluate.suite.heldout_loss import HeldoutLossConfig
from evaluate.suite.pose import PoseTestConfig
from evaluate.suite.reconstruction import ReconstructionConfig
from evaluate.suite.swap import SwapConfig

TestName = Literal[
    "heldout_loss", "reconstruction", "attributes", "swap", "edit", "divergence", "pose", "memorisation", "distribution"
]


class EvaluateConfig(DrawingConfig):
    """Everything that ``python -m evaluate run`` reads beside the checkpoint."""

    tests: list[TestName] = Field(default=list(get_args(TestName)), min_length=1)
    heldout_loss: HeldoutLossConfig = HeldoutLossConfig()
    swap: SwapConfig = SwapConfig()
    edit: EditConfig = EditConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    pose: PoseTestConfig = PoseTestConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    judge: str | None = (
        None  # encoder of likeness, a folder or in the hub's cache; null: see evaluate/metrics/likeness.py
    )
    probe: str | None = None  # CLIP model that is asked for what an edit names, a folder or in the hub's cache
    # DWPose's files; null: the demo networks for datasets made with demo encoders, otherwise no judging of joints
    pose_models: PoseModelsConfig | None = None
    needed: dict[str, float] = Field(default={})  # metric name -> the bar it is held against in the report
    device: Literal["auto", "cpu", "cuda"] = "auto"


def tier_file(tier: str) -> Path:
    """The config of a tier: in the working directory's configs/evaluate, otherwise in those of this installation."""
    name = Path("configs") / "evaluate" / f"{tier}.yaml"
    return name if name.is_file() else Path(__file__).parents[1] / name
