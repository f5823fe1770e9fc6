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
import pyarrow as pa

from evaluate import views
from evaluate.records import AGAIN, SAMPLES_SCHEMA, SCHEMA_VERSION, Metric
from evaluate.suite.attributes import ATTRIBUTES, PALETTES
from evaluate.suite.heldout_loss import RATIO_FROM
from evaluate.suite.pose import ALPHA, CONFIDENCE
from prep.errors import ConfigError, DataError
from prep.files import write_atomic
from prep.shards import read_parquet
from train.tracking import read_metrics

METRIC_FIELDS = tuple(Metric("", None).to_dict())


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

        Raises :class:`ConfigError` when there is none and :class:`DataError` for files that are missing, damaged or of
        another version.
        """
        folder = find_output(folder)
        report = _read_report(folder / "report.json")
        return cls(folder, report, _read_samples(folder / "samples.parquet"), _read_curves(folder / "training.jsonl"))


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error
    if not isinstance(report, dict):
        raise DataError(f"{path} is damaged (not a JSON object). {AGAIN}")
    if report.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: schema {report.get('schema')}, this version reads {SCHEMA_VERSION}. {AGAIN}")
    lacking = {"metrics", "skipped", "provenance"} - set(report)
    if not lacking:
        lacking = {name for metric in report["metrics"] for name in METRIC_FIELDS if name not in metric}
    if lacking:
        raise DataError(f"{path} is damaged (it lacks {', '.join(sorted(lacking))}). {AGAIN}")
    return report


def _read_samples(path: Path) -> list[dict[str, Any]]:
    try:
        table = read_parquet(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {AGAIN}") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error
    lacking = [name for name in SAMPLES_SCHEMA.names if name not in table.column_names]
    if lacking:
        raise DataError(f"{path} is damaged (it lacks {', '.join(lacking)}). {AGAIN}")
    return table.to_pylist()


def _read_curves(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # a run without curves has an empty one
        raise DataError(f"{path} does not exist. {AGAIN}")
    try:
        return read_metrics(path)
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error


def find_output(folder: Path) -> Path:
    """The evaluation's folder that is meant: itself, or the newest of a run folder."""
    if (folder / "report.json").is_file():
        return folder
    outputs = [path.parent for path in folder.glob("validation_outputs/step-*/report.json")]
    outputs = [path for path in outputs if path.name.removeprefix("step-").isdecimal()]
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
