"""One module per test. Each scores pictures or predictions into rows, and turns rows into metrics with intervals."""

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
)

TESTS = {  # by name, in the order in which they run and stand on the page
    module.TEST.name: module.TEST
    for module in (
        heldout_loss, reconstruction, attributes, swap, edit, divergence, pose, memorisation, distribution,
    )
}  # fmt: skip


def is_charted(metric: str) -> bool:
    """Whether a metric, by its name, has its place in a chart and none in tables."""
    return any(metric.startswith(f"{family}/") for test in TESTS.values() for family in test.charted)
