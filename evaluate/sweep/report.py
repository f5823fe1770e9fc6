"""``evaluate report SWEEP``: one HTML page with the verdicts of a sweep, and the numbers behind it as JSON and CSV.

A pure function of the sweep's files, offline and without a script. What the page shows comes as plain values from
:mod:`evaluate.sweep.views`; the template is ``sweep_report.html``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate.suite import is_charted
from evaluate.sweep import sections, views
from evaluate.sweep.analysis import Cohort, Contrast, at_equal, contrasts, factorial, measure_of, split_cohorts
from evaluate.sweep.files import SWEEP, RecordedSweep
from evaluate.sweep.pictures import grids
from evaluate.sweep.questions import questions
from evaluate.sweep.words import answer, metric_title
from nanodit.errors import ConfigError
from nanodit.files import canonical_json, check_writable, write_atomic
from nanodit.pages import open_template

SCHEMA = 1
DECLARED = (
    *("name", "arms", "factors", "seeds", "aa_seeds", "max_seeds", "looks", "budget", "primary"),
    *("early_stopping", "concurrent", "fractional", "time_claims"),
)
COLUMNS = ("arm", "seed", "status", "reason", "cohort", "attempts", "steps", "images", "seconds", "peak_memory_gb")


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP).is_file()


def write_sweep_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the page, by default ``report.html`` in the sweep's folder, and JSON and CSV beside it; returns the three.

    Raises :class:`DataError` for files that are missing or damaged, and :class:`ConfigError` where the JSON would
    replace an evaluation's.
    """
    sweep = RecordedSweep.read(folder)
    page = output or folder / "report.html"
    check_writable(page)
    record, table = page.with_suffix(".json"), page.with_suffix(".csv")
    if (record.parent / "samples.parquet").is_file() and record.name == "report.json":
        raise ConfigError(f"{record} is the evidence of an evaluation; give --output another name or folder")
    write_atomic(page, render(sweep))
    write_atomic(record, canonical_json(sweep_json(sweep)))
    write_atomic(table, sweep_csv(sweep))
    return [page, record, table]


def render(sweep: RecordedSweep) -> str:
    """Return the page as text."""
    cohorts = split_cohorts(sweep)
    first = cohorts[0] if cohorts else Cohort((), {})
    judged = [_judge(sweep, cohort) for cohort in cohorts or [first]]
    equal = {axis: at_equal(sweep, first, axis) for axis in ("step", "minutes")}
    pictures, no_pictures = grids(sweep, first)
    filters = {"count": lambda value: f"{value:,}", "percent": lambda share: f"{100 * share:.2f}%"}
    template = open_template(Path(__file__).with_name("sweep_report.html"), filters)
    return template.render(
        sweep=sweep,
        styles=views.styles(sweep),
        title=metric_title(sweep.primary),
        lower=sweep.mode == "min",
        budget=views.budget(sweep),
        answer=_answer(sweep, cohorts, judged[0]),
        banners=views.banners(sweep, cohorts, judged),
        verdicts=[
            {"cohort": cohort, "number": number, "rows": views.verdict_rows(sweep, found)}
            for number, (cohort, found) in enumerate(zip(cohorts or [first], judged), 1)
        ],
        questions=questions(sweep, first),
        arms=views.arm_rows(sweep),
        seeds=views.seed_table(sweep, cohorts),
        points=views.points_chart(sweep, first),
        curves=sections.curve_charts(sweep, first),
        equal=sections.equal_tables(sweep, equal),
        pareto=sections.pareto_charts(sweep, first),
        effects=sections.effect_rows(sweep, factorial(sweep, first)),
        grids=pictures,
        no_grids=no_pictures,
        metrics=views.metric_rows(sweep, first),
        changes=views.changes(sweep, judged[0]),
        trials=sections.trial_rows(sweep),
        cost=sections.cost_rows(sweep),
        cohorts=sections.cohort_rows(cohorts),
    )


def _judge(sweep: RecordedSweep, cohort: Cohort) -> list[Contrast]:
    return contrasts(sweep, cohort, measure_of(sweep.primary), sweep.mode, sweep.margin, sweep.primary)


def _answer(sweep: RecordedSweep, cohorts: Sequence[Cohort], judged: Sequence[Contrast]) -> str:
    """Return the answer of the largest cohort, and whether it may still change."""
    said = answer(judged, metric_title(sweep.primary), sweep.margin, sweep.looks)
    said = f"Of the largest of {len(cohorts)} cohorts: {said}" if len(cohorts) > 1 else said
    going = any(trial.status in ("running", "not started") for trial in sweep.trials)
    return f"Not finished; so far: {said}" if going else said


def sweep_json(sweep: RecordedSweep) -> dict[str, Any]:
    """Return the verdicts in the shape of an evaluation's report.json, a metric being a difference between arms.

    ``n`` counts training seeds. ``skipped`` names the trials that take no part, and why.
    """
    cohorts = split_cohorts(sweep)
    metrics, effects = [], []
    for number, cohort in enumerate(cohorts, 1):
        for one in _judge(sweep, cohort):
            compared = one.comparison
            interval = compared.interval if compared else None
            seeds = compared.differences.items() if compared else ()
            metrics.append(
                {
                    "name": f"{sweep.primary}/{one.arm.name} - {one.against}",
                    "arm": one.arm.name,
                    "against": one.against,
                    "cohort": number,
                    "value": interval.value if interval else None,
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "n": interval.n if interval else 0,
                    "differences": {str(seed): value for seed, value in seeds},
                    "test": None if compared is None else "paired t" if compared.paired else "Welch's t",
                    "p": compared.p if compared else None,
                    "p_holm": one.verdict.adjusted,
                    "verdict": one.verdict.word,
                    "failed": dict(zip((one.arm.name, one.against), one.failed)),
                    "p_ranks": one.ranks.p if one.ranks else None,
                    "seeds_needed": one.verdict.seeds,
                    "toward": one.verdict.toward,
                    "note": one.verdict.note,
                    "undeclared": list(one.arm.undeclared),
                    "not_comparable": list(one.barred),
                    "baselines": {},
                    "settings": {"mode": sweep.mode, "margin": sweep.margin, "level": 0.95, "unit": "training seed"},
                }
            )
    if cohorts:
        found = factorial(sweep, cohorts[0])
        effects = [
            {
                "factors": list(effect.factors),
                "value": effect.comparison.interval.value,
                "low": effect.comparison.interval.low,
                "high": effect.comparison.interval.high,
                "n": effect.comparison.interval.n,
                "p_holm": adjusted,
            }
            for effect, adjusted in zip(found.effects, found.adjusted)
        ]
    excluded = [
        {"name": f"{trial.arm}, seed {trial.seed}", "reason": reason}
        for trial in sweep.trials
        if (reason := trial.excluded(sweep.primary))
    ]
    declared = {name: sweep.content.get(name) for name in DECLARED}
    return {
        "schema": SCHEMA,
        "kind": "sweep",
        "metrics": metrics,
        "effects": effects,
        "skipped": excluded,
        "provenance": {"sweep": declared, "cohorts": [cohort.trials[0].record.get("cohort") for cohort in cohorts]},
    }


def sweep_csv(sweep: RecordedSweep) -> str:
    """Write one row for each trial: how it ended, what it took, and every metric of its last evaluation."""
    cohorts = {trial.folder: number for number, one in enumerate(split_cohorts(sweep), 1) for trial in one.trials}
    names = sorted({name for trial in sweep.trials for name in trial.metrics if not is_charted(name)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *names])
    for trial in sweep.trials:
        own = {"arm": trial.arm, "seed": trial.seed, "status": trial.status, "cohort": cohorts.get(trial.folder)}
        facts = [own.get(name, trial.record.get(name)) for name in COLUMNS]
        writer.writerow([*facts, *(trial.value(name) if name in trial.metrics else None for name in names)])
    return text.getvalue()
