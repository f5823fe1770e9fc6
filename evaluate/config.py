"""The config of an evaluation: what is drawn, the tests with a section for each, judges and bars."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from evaluate.drawing.context import DrawingConfig
from evaluate.metrics.examiner import PoseModelsConfig
from evaluate.suite import TESTS

TestName = Literal[tuple(TESTS)]
Sections = create_model(
    "Sections",
    __base__=DrawingConfig,
    **{test.name: (test.config, test.config()) for test in TESTS.values() if test.config},
)


class EvaluateConfig(Sections):
    """Everything that ``nanodit evaluate run`` reads beside the checkpoint: a test's section has the test's name."""

    tests: list[TestName] = Field(default=[test.name for test in TESTS.values() if test.default], min_length=1)
    # encoder of likeness, a folder or in the hub's cache; null: see evaluate/metrics/likeness.py
    judge: str | None = None
    probe: str | None = None  # CLIP model that is asked for what an edit names, a folder or in the hub's cache
    # DWPose's files; null: the demo networks for datasets made with demo encoders, otherwise no judging of joints
    pose_models: PoseModelsConfig | None = None
    needed: dict[str, float] = Field(default={})  # metric name -> the bar it is held against in the report
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def section(self, test: str) -> Any:
        """Return a test's own section; None for a test without one."""
        return getattr(self, test) if TESTS[test].config else None
