"""One HTML page, and a CSV, from the files of an evaluation: a pure function of them, offline, without a script.

The template ``report.html`` gets plain values from :mod:`evaluate.views`. jinja2 escapes every string, and the page's
Content-Security-Policy forbids it to load or run anything.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

from evaluate import views
from evaluate.records import SCHEMA_VERSION
from evaluate.suite.attributes import ATTRIBUTES, PALETTES
from evaluate.suite.heldout_loss import RATIO_FROM
from evaluate.suite.pose import ALPHA, CONFIDENCE
from prep.errors import ConfigError, DataError
from prep.files import write_atomic
from train.tracking import read_metrics


@dataclass(frozen=True)
class Files:
    """The files of one evaluation, read."""

    folder: Path
    report: dict[str, Any]
    samples: list[dict[str, Any]]
    curves: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Files:
        """Read an output folder, or the newest one of a run.

        Raises :class:`ConfigError` when there is none and :class:`DataError` for files of another version.
        """
        folder = find_output(folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if report.get("schema") != SCHEMA_VERSION:
            raise DataError(
                f"{folder / 'report.json'}: schema {report.get('schema')}, this version reads {SCHEMA_VERSION}. "
                "Run python -m evaluate run again"
            )
        samples = pq.read_table(folder / "samples.parquet").to_pylist()
        return cls(folder, report, samples, read_metrics(folder / "training.jsonl"))


def find_output(folder: Path) -> Path:
    """The evaluation's folder that is meant: itself, or the newest of a run folder."""
    if (folder / "report.json").is_file():
        return folder
    outputs = [path.parent for path in folder.glob("validation_outputs/step-*/report.json")]
    if not outputs:
        raise ConfigError(f"{folder}: no report.json here or in validation_outputs. Run python -m evaluate run first")
    return max(outputs, key=lambda path: int(path.name.removeprefix("step-")))


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the page (default: ``report.html`` among the files) and the metrics as CSV beside it; returns both."""
    files = Files.read(folder)
    page = output or files.folder / "report.html"
    table = page.with_suffix(".csv")
    write_atomic(page, render(files))
    write_atomic(table, metrics_csv(files.report["metrics"]))
    return [page, table]


def render(files: Files) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": lambda share: f"{100 * share:.2f}%"}
    environment.globals |= {"colour": views.colour}
    metrics, provenance = files.report["metrics"], files.report["provenance"]
    return environment.get_template("report.html").render(
        provenance=provenance,
        headlines=views.headlines(metrics),
        groups=views.metric_groups(metrics),
        gallery=views.gallery(files.samples, files.folder),
        heldout=views.heldout_charts(metrics),
        confusions=views.confusions(files.samples),
        training=views.training_charts(files.curves),
        skipped=files.report["skipped"],
        unscored=[metric for metric in metrics if metric["reason"]],
        images=len({row["key"] for row in files.samples}),
        configs={name: _pretty(provenance[name]) for name in ("training", "evaluation")},
        attributes=ATTRIBUTES,
        palettes=PALETTES,
        alpha=ALPHA,
        confidence=CONFIDENCE,
        ratio_from=RATIO_FROM,
    )


def metrics_csv(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The metrics of report.json as CSV; baselines and settings as JSON in their cells."""
    columns = ("name", "value", "low", "high", "n", "unit", "better", "needed", "verdict", "reason")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "baselines", "settings"])
    for metric in metrics:
        nested = [json.dumps(metric[name], sort_keys=True) for name in ("baselines", "settings")]
        writer.writerow([*("" if metric[name] is None else metric[name] for name in columns), *nested])
    return text.getvalue()


def number(value: float | None, metric: Mapping[str, Any]) -> str:
    """A number of a metric (its value, a bound, a baseline) as people read it, a dash for null.

    dB get one decimal, shares and similarities two, losses and distances three significant digits.
    """
    if value is None:
        return "–"
    if metric["unit"] == "dB":
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}" if metric["better"] == "higher" else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
