"""The material of a report: the files of one evaluation, read and checked, and the run's own records beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from evaluate.records import AGAIN, DEV, SAMPLES_SCHEMA, SCHEMA_VERSION, Metric, from_table, upgraded
from evaluate.report.compare import differing, objections
from nanodit.errors import ConfigError, DataError
from prep.dataset.layout import read_parquet
from train.loop.tracking import VALIDATED, read_metrics

METRIC_FIELDS = tuple(name for name in Metric("", None).to_dict() if name != "objective")  # which earlier ones lack
OUTPUTS = "validation_outputs"
SINCE = ("cluster",)  # columns that earlier evaluations lack
UNKNOWN = "unknown"
TEST = "test"  # of the holdout, the part that decides nothing before the last evaluation
HOLDOUTS = {TEST: "the test part of the holdout", "dev": "the dev part of the holdout, which decisions may use"}

Name = tuple[str, str, str, int]  # kind, condition, key, seed (0 for null) of a row of samples.parquet


@dataclass(frozen=True, eq=False)
class EvaluationFiles:
    """The files of one evaluation, read.

    ``metrics_log`` holds the records of the run's metrics.jsonl up to the step, empty where the evaluation does not lie
    in its run folder; ``earlier`` the metrics of its other evaluations up to then, by step. ``unfinished`` names newer
    evaluations that were killed. ``same_test`` are the folders of what else in the run measured on the same test
    images.
    """

    folder: Path
    report: dict[str, Any]
    samples: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    extras: dict[str, Any]
    curves: list[dict[str, Any]]
    metrics_log: list[dict[str, Any]] = field(default_factory=list)
    earlier: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    same_test: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> EvaluationFiles:
        """Read an output folder, or the newest one of a run.

        Raises :class:`ConfigError` when there is none and :class:`DataError` for files that are missing, damaged or of
        another version.
        """
        given, folder = folder, find_output(folder)
        report = _read_report(folder / "report.json")
        found = cls(
            folder,
            report,
            _read_samples(folder / "samples.parquet"),
            _read_heldout(folder / "heldout_loss.parquet"),
            _read_extras(folder / "extras.json"),
            _read_curves(folder / "training.jsonl"),
        )
        if folder.parent.name != OUTPUTS:
            return found
        step = report["provenance"].get("step", 0)
        log = [record for record in _read_curves(folder.parents[1] / "metrics.jsonl", False) if record["step"] <= step]
        killed = unfinished(given) if given != folder else []
        around = {"metrics_log": log, "earlier": _earlier(folder, report), "unfinished": killed}
        return cls(**(vars(found) | around | {"same_test": _same_test(folder, report)}))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of report.json."""
        return self.report["metrics"]

    @property
    def provenance(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return self.report["provenance"]

    @cached_property
    def rows(self) -> dict[Name, dict[str, Any]]:
        """The rows of samples.parquet by kind, condition, key and seed."""
        return {(row["kind"], row["condition"], row["key"], row["seed"] or 0): row for row in self.samples}


def find_output(folder: Path) -> Path:
    """Return the evaluation's folder that is meant: itself, or of a run folder the newest one of ema weights."""
    if (folder / "report.json").is_file():
        return folder
    if (folder / "parts").is_dir():
        raise ConfigError(f"{folder}: this evaluation is not finished. {AGAIN}: it continues from what is there")
    found = [path.parent for path in folder.glob(f"{OUTPUTS}/step-*/report.json")]
    outputs = [path for path in found if step_of(path) is not None]
    if found and not outputs:
        others = ", ".join(sorted(map(str, found)))
        raise ConfigError(f"{folder}: was evaluated with other weights than ema; give the folder: {others}")
    if not outputs:
        raise ConfigError(f"{folder}: no report.json here or in {OUTPUTS}. Run nanodit evaluate run first")
    return max(outputs, key=lambda path: (step_of(path), not path.name.endswith(DEV)))


def unfinished(run_folder: Path) -> list[str]:
    """Return the evaluations of a run that were begun and neither finished nor cleared away, by name."""
    begun = {path.parent for path in run_folder.glob(f"{OUTPUTS}/step-*/parts") if step_of(path.parent) is not None}
    return sorted(path.name for path in begun if not (path / "report.json").is_file())


def step_of(folder: Path) -> int | None:
    """Return the step in a folder's name ``step-NNNNNN``, ``-dev`` behind it or not; None for any other name."""
    digits = folder.name.removeprefix("step-").removesuffix(DEV)
    return int(digits) if digits.isdecimal() else None


def _earlier(folder: Path, report: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Return the metrics of the run's evaluations up to this one by step: those that it may be compared with."""
    step, found = report["provenance"].get("step", 0), {}
    now = {metric["name"]: metric for metric in report["metrics"]}
    for path in sorted(folder.parent.glob("step-*/report.json")):
        try:
            other = _read_report(path)
            if path.parent == folder or other["provenance"]["step"] >= step or objections(report, other):
                continue
        except (DataError, KeyError):
            continue  # a note on the past: what cannot be read is no part of the curve
        alike = [one for one in other["metrics"] if one["name"] in now and not differing([one, now[one["name"]]])]
        if alike:  # nothing of an evaluation of other weights is
            found[other["provenance"]["step"]] = alike
    return found


def _same_test(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Return what else in the run measured on the test images that an evaluation measured on, by folder.

    Those are evaluations beside it, and what was evaluated or validated before the holdout had parts: it read them all.
    """
    if report["provenance"].get("holdout") != TEST:
        return []
    found = []
    for path in sorted(folder.parent.glob("*/report.json")):
        with suppress(DataError, KeyError, TypeError, AttributeError):  # as for the curve: a note on the past
            other = read_object(path, AGAIN)["provenance"]
            same = other["dataset"]["fingerprint"] == report["provenance"]["dataset"]["fingerprint"]
            if same and other.get("holdout") != "dev" and path.parent != folder:
                found.append(path.parent)
    for path in sorted(folder.parent.glob(f"*/{VALIDATED}")):
        with suppress(DataError):
            if "holdout" not in read_object(path, AGAIN) and path.parent not in found:
                found.append(path.parent)
    return found


def _read_report(path: Path) -> dict[str, Any]:
    report = read_object(path, AGAIN)
    if report.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: schema {report.get('schema')}, but this version reads {SCHEMA_VERSION}. {AGAIN}")
    lacking = {"metrics", "skipped", "provenance"} - set(report)
    if not lacking:
        lacking = {name for metric in report["metrics"] for name in METRIC_FIELDS if name not in metric}
    if lacking:
        raise DataError(f"{path} is damaged (it lacks {', '.join(sorted(lacking))}). {AGAIN}")
    return report | {"metrics": [upgraded(metric) for metric in report["metrics"]]}


def _read_extras(path: Path) -> dict[str, Any]:
    return read_object(path, AGAIN)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; raises :class:`DataError` with the ``remedy`` where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {remedy}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (not a JSON object). {remedy}")
    return content


def _read_samples(path: Path) -> list[dict[str, Any]]:
    table = _read_table(path)
    lacking = [name for name in SAMPLES_SCHEMA.names if name not in (*table.column_names, *SINCE)]
    if lacking:
        raise DataError(f"{path} is damaged (it lacks {', '.join(lacking)}). {AGAIN}")
    return from_table(table)


def _read_heldout(path: Path) -> list[dict[str, Any]]:
    return _read_table(path).to_pylist()


def _read_table(path: Path) -> pa.Table:
    try:
        return read_parquet(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {AGAIN}") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error


def _read_curves(path: Path, required: bool = True) -> list[dict[str, Any]]:
    if required and not path.is_file():  # a run without curves has an empty one
        raise DataError(f"{path} does not exist. {AGAIN}")
    try:
        return read_metrics(path)
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluation on the page: its files, and how it is named where there are several."""

    files: EvaluationFiles
    letter: str  # A, B, ... ; empty where it is the only one
    style: str  # CSS class of its lines

    @property
    def title(self) -> str:
        """The run folder and the step, the weights unless they are the usual average, and dev where that was read."""
        provenance = self.files.provenance
        training, weights = provenance.get("training") or {}, provenance.get("weights", "ema")
        title = f"{training.get('output', UNKNOWN)}, step {provenance.get('step', 0):,}"
        title = title if weights in ("ema", UNKNOWN) else f"{title}, weights {weights}"
        return f"{title}, on dev" if provenance.get("holdout") == "dev" else title

    @property
    def name(self) -> str:
        """A short name for legends."""
        return self.letter or self.title


def name_runs(files: Sequence[EvaluationFiles]) -> list[Run]:
    """Return the letters and colours for several evaluations, in the order given."""
    if len(files) == 1:
        return [Run(files[0], "", "c1")]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if len(files) > len(letters):
        raise ConfigError(f"{len(files)} runs are too many for one page; give at most {len(letters)}")
    return [Run(one, letter, f"c{index % 6 + 1}") for index, (one, letter) in enumerate(zip(files, letters))]
