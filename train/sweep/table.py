"""The console of a sweep: the progress of its trials while they run, and the table of arms at the end."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanodit.console import Progress, repeating
from train.sweep.config import Sweep
from train.sweep.record import ENDED, FAILED, FINISHED, RUNNING, read_record

LOOK = 2.0  # seconds between looks at the trials
NAMED = 4


@contextmanager
def show_progress(sweep: Sweep) -> Iterator[None]:
    """Show the progress of the trials, at least every five seconds, while the context is open."""
    ended = _count(sweep)
    with Progress("sweep", len(sweep.trials), "trials", done=sum(ended.values())) as progress:
        try:
            with repeating(lambda: _show(sweep, progress), LOOK, "sweep"):
                yield
        finally:
            _show(sweep, progress)


def _show(sweep: Sweep, progress: Progress) -> None:
    counts = _count(sweep)
    running = []
    for trial in sweep.trials:
        if read_record(sweep.trials_folder / trial.name).get("status") == RUNNING:
            step = _last_step(sweep.trials_folder / trial.name / "metrics.jsonl")
            running.append(f"{trial.name} {step}/{trial.config.train.steps}")
    fields: dict[str, object] = {"running": ", ".join(running[:NAMED]) or "none"}
    if failed := counts[FAILED]:
        fields["failed"] = failed
    progress.update(sum(counts.values()), **fields)


def _count(sweep: Sweep) -> dict[str, int]:
    statuses = [read_record(sweep.trials_folder / trial.name).get("status") for trial in sweep.trials]
    return {status: statuses.count(status) for status in ENDED}


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole line, read from the file's end; 0 without one."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def table(sweep: Sweep) -> Iterator[str]:
    """Yield the arms with their finished and failed seeds and the mean primary metric, then the reason of each failure.

    A function of the files alone. Failed and stopped trials have no part in a mean.
    """
    metric = sweep.config.primary.metric
    rows = [("arm", "finished", "failed", metric, "per seed")]
    notes = []
    for arm in sweep.arms.values():
        trials = [trial for trial in sweep.trials if trial.arm == arm]
        records = {trial.name: read_record(sweep.trials_folder / trial.name) for trial in trials}
        values = []
        for trial in trials:
            record = records[trial.name]
            if record.get("status") != FINISHED:
                notes.append(f"{trial.name}: {record.get('status', 'not started')}: {record.get('reason') or ''}")
            else:
                values.append(primary_of(sweep.trials_folder / trial.name, metric, record))
        known = [value for value in values if value is not None]
        statuses = [record.get("status") for record in records.values()]
        rows.append(
            (
                arm.name, f"{statuses.count(FINISHED)}/{len(trials)}", str(statuses.count(FAILED)),
                f"{statistics.fmean(known):.5g}" if known else "-",
                " ".join("null" if value is None else f"{value:.5g}" for value in values),
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    yield from notes
    cohorts = {json.dumps(record["cohort"], sort_keys=True) for record in _finished(sweep)}
    if len(cohorts) > 1:
        yield f"warning: {len(cohorts)} cohorts, as code, data or machine changed; the report keeps them apart"


def _finished(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for trial in sweep.trials:
        record = read_record(sweep.trials_folder / trial.name)
        if record.get("status") == FINISHED:
            yield record


def primary_of(trial: Path, metric: str, record: Mapping[str, Any]) -> float | None:
    """Return a metric of the evaluation of a trial's last step; None where it has no value."""
    outputs, last = trial / "validation_outputs", f"step-{record['steps']:06d}"
    names = (record.get("measured_in"), last, f"{last}-dev")  # earlier trials do not say in which folder it is
    files = (outputs / name / "report.json" for name in names if name)
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return None
    metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"]
    return next((one["value"] for one in metrics if one["name"] == metric), None)
