"""One module per test. Each scores pictures or predictions into rows, and turns rows into metrics with intervals."""

from collections.abc import Mapping
from typing import Any

from evaluate.suite import (
    attributes,
    distribution,
    divergence,
    edit,
    heldout_loss,
    memorisation,
    pose,
    reconstruction,
    swap,
    unpaired,
)

TESTS = {  # by name, in the order in which they run and stand on the page
    module.TEST.name: module.TEST
    for module in (
        heldout_loss, reconstruction, attributes, swap, edit, divergence, pose, memorisation, distribution,
        unpaired,
    )
}  # fmt: skip


def beside(metric: str, value: float | None, settings: Mapping[str, Any]) -> str:
    """Return what a metric's test says beside its value, mostly nothing."""
    return next(
        (test.beside(metric, value, settings) for test in TESTS.values() if test.owns(metric) and test.beside), ""
    )


def is_charted(metric: str) -> bool:
    """Whether a metric, by its name, has its place in a chart and none in tables."""
    return any(metric.startswith(f"{family}/") for test in TESTS.values() for family in test.charted)
