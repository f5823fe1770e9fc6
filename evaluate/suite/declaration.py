"""The declaration of a test: all that config, run and reports know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluate.records import Metric, Skipped
from nanodit.config import Config

if TYPE_CHECKING:
    from evaluate.drawing.context import DrawingContext, Rows
    from evaluate.drawing.finished import FinishedBatches
    from evaluate.drawing.pictures import Picture

Values = Mapping[tuple[str, int], tuple[Any, int]]  # (key, noise or bin) -> numerator and weight


@dataclass(frozen=True)
class Section:
    """A test's own part of the page.

    ``values`` takes the evaluation's :class:`evaluate.report.sections.Page` and returns what the template shows, or
    None where the test left nothing. ``section.html`` shows ``note`` (text), ``table`` (``head`` and ``rows`` of text)
    and ``groups`` of pictures (``caption`` and ``pictures``), each of which may be missing.
    """

    title: str
    lead: str
    values: Callable[[Any], dict[str, Any] | None]
    template: str = "section.html"  # of this folder


@dataclass(frozen=True, eq=False)
class SuiteTest:
    """One test: what it asks to be drawn, what it concludes from it, and how reports say it.

    ``pictures`` and ``summarise`` get the test's section of the config, None where ``config`` is. Metrics are named by
    how they begin: ``families`` maps that to how people say it, in the order of the page; ``roles`` to the baselines
    that are its floor, the best that a metric has, and its ceiling, the first; None for the usual ones. Of each family
    the metric of one condition is the headline: that which the family ``isolated`` names, else the first of
    ``headline`` that was measured, else the first in the order of the page. ``minimised`` names what sees a metric:
    ``flow`` (the squared error that training minimises), ``lpips`` or the ``judge``, whose networks may be in losses.
    """

    name: str  # in the config, among `tests` and as the key of its section
    title: str  # of its metrics on the page
    pictures: Callable[[DrawingContext, Any], tuple[list[Picture], list[Skipped]]]
    summarise: Callable[[Rows, DrawingContext, Any], tuple[list[Metric], list[Skipped]]]
    config: type[Config] | None = None
    measure: Callable[[DrawingContext, Any, FinishedBatches], None] | None = None  # what is no row of samples.parquet
    default: bool = True  # whether it runs where `tests` names none
    looks: bool = True  # at pictures; an evaluation none of whose tests does opens no judge
    stem: str = ""  # how its metrics' names begin, where that is not its own name
    families: Mapping[str, str] = field(default_factory=dict)
    isolated: str = ""  # the family whose metric is of the arm that isolates what the test is about
    headline: tuple[str, ...] = ()  # conditions
    charted: tuple[str, ...] = ()  # families that have a chart instead of lines in tables
    default_part: str = "all"  # what a name means that does not say what was given
    parts: Mapping[str, str] = field(default_factory=dict)  # of names -> how people say them
    roles: Mapping[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = field(default_factory=dict)
    minimised: Mapping[str, str] = field(default_factory=dict)  # how metrics begin -> what may be a loss, too
    values: Callable[[str, Any], Values | None] | None = None  # what a metric is a mean of, to pair two evaluations by
    beside: Callable[[str, float | None, Mapping[str, Any]], str] | None = None  # name, value, settings -> words
    alarms: Mapping[str, str] = field(default_factory=dict)  # `alarms` of its extras by name -> in words
    terms: tuple[tuple[str, str], ...] = ()  # words of the page and what they mean
    section: Section | None = None

    def owns(self, metric: str) -> bool:
        """Whether a metric is of this test, by its name."""
        stem = self.stem or self.name
        return metric.startswith(stem) and metric[len(stem) : len(stem) + 1] in ("", "/", "_")
