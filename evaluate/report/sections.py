"""The tests' own sections of the page: what they left beside metrics, and the pictures that they kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.metrics.colours import PALETTES
from evaluate.records import AGAIN, MODEL, REAL
from evaluate.report.files import Run
from evaluate.report.metrics import condition_order, part_name
from evaluate.report.pictures import EmbeddedImages, picture, shorten
from evaluate.suite import TESTS
from evaluate.suite.declaration import SuiteTest
from nanodit.errors import DataError

WORDS = 160  # characters of a caption beside a small picture


@dataclass(frozen=True)
class Page:
    """One evaluation as a test's section sees it: what the test left, and pictures and words for the page."""

    run: Run
    images: EmbeddedImages

    def extras(self, test: str) -> dict[str, Any] | None:
        """Return what a test left in extras.json."""
        return self.run.files.extras.get(test)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of report.json."""
        return self.run.files.metrics

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.parquet."""
        return self.run.files.samples

    def drawn(self, condition: str, key: str, seed: int, title: str, note: str = "") -> dict[str, Any]:
        """Return a picture of the model."""
        return picture(self.run, (MODEL, condition, key, seed), self.images, title, note) | {"judged": []}

    def real(self, key: str, title: str = "real", note: str = "holdout") -> dict[str, Any]:
        """Return the real image of a sample."""
        return picture(self.run, (REAL, "real", key, 0), self.images, title, note) | {"judged": []}

    def kept(self, key: str) -> bool:
        """Whether the real image of a sample was kept."""
        return bool(self.run.files.rows[REAL, "real", key, 0]["image"])

    def stored(self, name: str, title: str) -> dict[str, Any]:
        """Return another picture of the folder; raises ``ValueError`` for a path that leads out of it."""
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name} leads out of the folder")
        path = self.run.files.folder / path
        width, height = self.images.size(path)
        return {
            **{"title": title, "note": "", "judged": [], "data": self.images.make(path)},
            **{"width": width, "height": height, "stretch": math.sqrt(width / height)},
        }

    def caption(self, key: str) -> str:
        """Return the beginning of a sample's caption."""
        return shorten(self.run.files.rows[REAL, "real", key, 0]["caption"], WORDS)

    def shorten(self, text: str) -> str:
        """Return the beginning of a text that is longer than some lines."""
        return shorten(text, 4 * WORDS)

    def words(self, condition: str) -> str:
        """Return the name of a condition as people say it."""
        return part_name(condition)

    def order(self, condition: str) -> tuple[int, str]:
        """Return a key to sort conditions by."""
        return condition_order(condition)


def colour(attribute: str, name: str) -> str:
    """Return the CSS colour of a palette name."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTES[attribute][name])


def sections(runs: Sequence[Run], images: EmbeddedImages) -> dict[str, list[dict[str, Any]]]:
    """Return by test what each run has of it: ``run`` and ``shown``, or ``why`` there is nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for test in (test for test in TESTS.values() if test.section):
        for run in runs:
            try:
                shown = test.section.values(Page(run, images))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                path = run.files.folder / "extras.json"
                raise DataError(f"{path} is damaged ({test.name}: {type(error).__name__} {error}). {AGAIN}") from error
            found.setdefault(test.name, []).append({"run": run, "shown": shown, "why": "" if shown else why(run, test)})
    return {test: own for test, own in found.items() if any(one["shown"] or one["why"] for one in own)}


def why(run: Run, test: SuiteTest) -> str:
    """Return why a run has nothing to show of a test, empty where the test was not asked for."""
    asked = (run.files.provenance.get("evaluation") or {}).get("tests")
    if asked is not None and test.name not in asked:
        return ""
    reasons = [one["reason"] for one in run.files.report["skipped"] if test.owns(one["name"])]
    return "skipped: " + "; ".join(dict.fromkeys(reasons)) if reasons else ""
