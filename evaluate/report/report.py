"""``evaluate report``: one HTML page about one evaluation, or several side by side, with JSON and CSV beside it.

A pure function of the files, offline and without a script. The template ``report.html`` gets plain values from
the other modules of this folder. jinja2 escapes every
string, and the page's Content-Security-Policy forbids it to load or run anything.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate import suite
from evaluate.records import ATTRIBUTES, MODEL, SCHEMA_VERSION, folder_name
from evaluate.report import curves
from evaluate.report import metrics as numbers
from evaluate.report.compare import Difference
from evaluate.report.files import OUTPUTS, UNKNOWN, EvaluationFiles, Run, find_output, name_runs
from evaluate.report.first_screen import first_screen
from evaluate.report.metrics import condition_order, guidance_words, number, part_name
from evaluate.report.pictures import SIDES, EmbeddedImages, gallery
from evaluate.report.sections import colour, sections
from evaluate.report.votes import tally_votes, votes_cells, votes_json, votes_section
from evaluate.suite import TESTS
from evaluate.suite.heldout_loss import NOISY_FROM
from evaluate.suite.pose import ALPHA, CONFIDENCE
from evaluate.votes.tally import Tally
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import canonical_json, check_writable, write_atomic
from nanodit.pages import open_template

__all__ = ["EvaluationFiles", "find_output", "metrics_csv", "number", "render", "report_json", "write_report"]

LIMIT = 10_000_000  # bytes of the page


def write_report(folders: Path | Sequence[Path], output: Path | None = None, votes: Sequence[Path] = ()) -> list[Path]:
    """Write the page, and the metrics as JSON and CSV beside it; returns the three.

    ``votes`` are files that the page of ``evaluate compare`` saved, about two of the runs.

    The page of one evaluation is ``report.html`` among its files unless ``output`` says otherwise, of several
    ``report.html`` in the working directory. Raises :class:`ConfigError` where the JSON would replace an evaluation's.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    files = [EvaluationFiles.read(folder) for folder in folders]
    page = output or (files[0].folder if len(files) == 1 else Path()) / "report.html"
    check_writable(page)
    record, table = page.with_suffix(".json"), page.with_suffix(".csv")
    own = len(files) == 1 and record.absolute() == (files[0].folder / "report.json").absolute()
    if not own and record.name == "report.json" and (record.parent / "samples.parquet").is_file():
        raise ConfigError(f"{record} is the evidence of another evaluation; give --output another name or folder")
    counted = tally_votes(votes, name_runs(files))
    html = render(files, counted)
    write_atomic(page, html)
    if not own:  # among its files it is there already
        write_atomic(record, canonical_json(report_json(files, counted)))
    write_atomic(table, metrics_csv(files, counted))
    return [page, record, table]


def render(files: EvaluationFiles | Sequence[EvaluationFiles], votes: Tally | None = None) -> str:
    """Return the page as text, of at most LIMIT bytes: pictures are made smaller until it is.

    Raises :class:`ResourceError` where the smallest do not help.
    """
    runs = name_runs([files] if isinstance(files, EvaluationFiles) else list(files))
    for side, lossless in ((SIDES[0], True), *((side, False) for side in SIDES)):
        html = _render(runs, EmbeddedImages(side, lossless), votes)
        if len(html.encode()) <= LIMIT:
            return html
    raise ResourceError(f"the page would be larger than {LIMIT / 1e6:.0f} MB; give fewer runs")


def _render(runs: Sequence[Run], images: EmbeddedImages, votes: Tally | None) -> str:
    filters = {
        "number": number,
        "signed": numbers.signed,
        "percent": lambda share: f"{100 * share:.2f}%",
        "count": lambda value: f"{value:,}" if isinstance(value, int) else str(value),
    }
    template = open_template(Path(__file__).with_name("report.html"), filters, Path(suite.__file__).parent)
    return template.render(
        runs=[facts(run) for run in runs],
        several=len(runs) > 1,
        headlines=[{"run": run, "metrics": numbers.headlines(run.files.metrics)} for run in runs],
        tallies=[{"run": run, **tally(run)} for run in runs],
        first=first_screen(runs, images, [unscored(run) for run in runs]),
        alarms=numbers.alarms(runs),
        comparison=numbers.comparisons(runs) if len(runs) > 1 else None,
        votes=votes_section(votes),
        groups=[{"run": run, "groups": numbers.metric_groups(run.files.metrics)} for run in runs],
        gallery=gallery(runs, images),
        heldout=curves.heldout_charts(runs),
        training=curves.training_charts(runs),
        history=curves.history_charts(runs),
        tests=list(TESTS.values()),
        sections=sections(runs, images),
        missing=[{"run": run, **missing(run)} for run in runs],
        scaled=None if images.lossless else images.side,
        colour=colour,
        attributes=ATTRIBUTES,
        alpha=ALPHA,
        confidence=CONFIDENCE,
        noisy_from=NOISY_FROM,
    )


def clusters(run: Run) -> str:
    """Say what was resampled for the intervals: groups of near duplicates, or images where the index names none."""
    heldout = (row for row in run.files.heldout if row["split"] == "holdout")
    names = {row.get("cluster") for row in run.files.samples or heldout}
    if None in names or not names:
        return "over images, each alone: groups of near duplicates are not known"
    return f"over {len(names)} groups of near duplicates, one image or more each"


def facts(run: Run) -> dict[str, Any]:
    """Return what a run's numbers depend on, and how to make them again; what is not known is called unknown."""
    given = run.files.provenance
    dataset, training, git = (given.get(name) or {} for name in ("dataset", "training", "git"))
    counts = dataset.get("counts") if isinstance(dataset.get("counts"), Mapping) else {}
    commit, dirty = git.get("commit", UNKNOWN), git.get("dirty", UNKNOWN)
    state = {False: "nothing changed since", True: "with uncommitted changes"}.get(dirty, "changes unknown")
    weights, fingerprint = given.get("weights_sha256", UNKNOWN), dataset.get("fingerprint", UNKNOWN)
    doubts = [
        f"the {name} is unknown"
        for name, value in (
            ("commit", commit),
            ("hash of the weights", weights),
            ("dataset's fingerprint", fingerprint),
        )
        if value in (UNKNOWN, None)
    ]
    if dirty is not False:
        doubts.append(
            "the code had uncommitted changes" if dirty is True else "whether the code was changed is unknown"
        )
    place = training.get("output", UNKNOWN)
    step = given.get("checkpoint", UNKNOWN)
    kind = given.get("weights", "ema")
    usual = folder_name(step, kind, given.get("holdout", "test"))
    own = run.files.folder.name if run.files.folder.parent.name == OUTPUTS else usual
    config = f"{place}/{OUTPUTS}/{own}/config.yaml"
    command = ["nanodit", "evaluate", "run", "--checkpoint", f"{place}/checkpoints/{step}", "--config", config]
    command += ["--weights", kind] if kind != "ema" else []
    command += ["--output", f"{place}/{OUTPUTS}/{own}"] if own != usual else []
    return {
        "letter": run.letter,
        "style": run.style,
        "title": run.title,
        "checkpoint": step,
        "parameters": given.get("parameters"),
        "weights": given.get("weights", UNKNOWN),
        "weights_sha256": weights or UNKNOWN,
        "encoders": dataset.get("encoders", UNKNOWN),
        "base": dataset.get("base", UNKNOWN),
        "fingerprint": fingerprint or UNKNOWN,
        "train": counts.get("train", UNKNOWN),
        "holdout": counts.get("holdout", UNKNOWN),
        "images": len({row["key"] for row in run.files.samples}),
        "clusters": clusters(run),
        "degenerate": unscored(run),
        "drawn": drawn_with(run),
        "commit": commit,
        "state": state,
        "packages": given.get("packages") or {},
        "python": given.get("python", UNKNOWN),
        "machine": ", ".join(
            [given.get("machine", UNKNOWN), *(f"{name} on {on}" for name, on in given.get("judges", {}).items())]
        ),
        "doubts": doubts,
        "checkout": commit if commit != UNKNOWN else None,
        "command": shlex.join(command),
        "unfinished": run.files.unfinished,
        "configs": {name: _pretty(given.get(name, UNKNOWN)) for name in ("training", "evaluation")},
    }


def drawn_with(run: Run) -> str:
    """Say with which sampler and guidance the pictures were drawn; empty where none were."""
    drawn = [one["settings"] for one in run.files.metrics if "sampler" in one["settings"]]
    precision = {one.get("precision") for one in drawn} - {None}
    samplers = dict.fromkeys(f"{one['sampler']} in {one['steps']} steps" for one in drawn)
    guidance: dict[str, dict[str, None]] = {}
    for one in sorted(drawn, key=lambda one: condition_order(one["conditions"])):
        name = part_name(one["conditions"].partition("@")[0])
        guidance.setdefault(name, {})[guidance_words(one["guidance"])] = None
    given = ", ".join(f"{name} with {' and '.join(found)}" for name, found in guidance.items())
    computed = f", computed in {' and '.join(sorted(precision))}" if precision else ""
    captions = "short captions: " if any("given_captions" in one for one in drawn) else ""
    return f"{' and '.join(samplers)}{computed}, given {captions}{given}" if drawn else ""


def unscored(run: Run) -> str:
    """Say how many of the pictures drawn cannot be scored, and why; empty where all can."""
    drawn = [row["degenerate"] for row in run.files.samples if row["kind"] == MODEL]
    kinds = Counter(reason for reason in drawn if reason)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(kinds.items()))
    return f"{kinds.total():,} of {len(drawn):,} pictures drawn cannot be scored: {counts}" if kinds else ""


def tally(run: Run) -> dict[str, int]:
    """Return how many headline metrics are better or worse than their floor, or inconclusive."""
    groups = numbers.metric_groups(run.files.metrics)
    verdicts = [row["floor"]["verdict"] for group in groups for row in group["headline"] if row["floor"]]
    return {name: verdicts.count(name) for name in ("better", "worse", "inconclusive")} | {"total": len(verdicts)}


def missing(run: Run) -> dict[str, Any]:
    """Return what was skipped and which metrics have no value or no interval, by the reasons."""
    found: dict[str, dict[str, list[str]]] = {"skipped": {}, "unscored": {}}
    for kind, entries in (("skipped", run.files.report["skipped"]), ("unscored", run.files.metrics)):
        for one in entries:
            if one["reason"]:
                found[kind].setdefault(one["reason"], []).append(one["name"])
    return found


def report_json(files: EvaluationFiles | Sequence[EvaluationFiles], votes: Tally | None = None) -> dict[str, Any]:
    """Return what the page says: the report.json of one evaluation, or all of several with what was compared.

    Of several, ``metrics`` and ``skipped`` name their ``run``, ``provenance`` is by run, and ``comparisons`` hold what
    each has over the first: ``difference``, ``low``, ``high``, ``n`` (images) and ``verdict``, or ``not_compared``.
    ``votes`` is there where any were given (:func:`evaluate.report.votes.votes_json`).
    """
    runs = name_runs([files] if isinstance(files, EvaluationFiles) else list(files))
    if len(runs) == 1:
        return runs[0].files.report
    compared = numbers.comparisons(runs)
    entries = []
    for row in compared["rows"]:
        for run, difference in zip(runs[1:], row["differences"][1:]):
            entry = {"name": row["name"], "run": run.letter, "against": runs[0].letter}
            reasons = compared["objections"].get(run.letter) or row["differing"].get(run.letter)
            entries.append(entry | ({"not_compared": reasons} if reasons else _difference(difference)))
    return {
        "schema": SCHEMA_VERSION,
        "metrics": [{"run": run.letter, **metric} for run in runs for metric in run.files.metrics],
        "skipped": [{"run": run.letter, **one} for run in runs for one in run.files.report["skipped"]],
        "provenance": {run.letter: run.files.provenance for run in runs},
        "comparisons": entries,
        **({"votes": votes_json(votes)} if votes else {}),
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"not_compared": ["no values that could be paired"]}
    own = difference.interval
    bounds = {"difference": own.value, "low": own.low, "high": own.high, "n": own.n}
    return {**bounds, "verdict": difference.verdict, "more": difference.more}


def metrics_csv(files: EvaluationFiles | Sequence[EvaluationFiles], votes: Tally | None = None) -> str:
    """Write the metrics of report.json as CSV, and votes; baselines and settings are JSON in their cells."""
    runs = name_runs([files] if isinstance(files, EvaluationFiles) else list(files))
    columns = ("name", "value", "low", "high", "n", "unit", "better", "needed", "verdict", "reason", "objective")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["run"] if len(runs) > 1 else []), *columns, "baselines", "settings"])
    for run in runs:
        for metric in run.files.metrics:
            nested = [json.dumps(metric[name], sort_keys=True) for name in ("baselines", "settings")]
            cells = ["" if metric[name] is None else metric[name] for name in columns]
            writer.writerow([*([run.letter] if len(runs) > 1 else []), *cells, *nested])
    if votes:
        letter, cells, settings = votes_cells(votes)
        found = ["" if cells.get(name) is None else cells[name] for name in columns]
        writer.writerow([letter, *found, "{}", json.dumps(settings, sort_keys=True)])
    return text.getvalue()


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
