"""Grids of pictures, arm by step, that start from the same noise: what the runs drew while they trained."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from evaluate.records import MODEL
from evaluate.report.files import step_of
from evaluate.sweep.analysis import Cohort, ticks_even
from evaluate.sweep.files import AGAIN, RecordedSweep, RecordedTrial, evaluated
from nanodit.errors import DataError
from prep.dataset.layout import read_parquet
from train.loop.visual import cut_out

SIDE = 160  # pixels of the longer side that the page embeds
STEPS, SAMPLES = 6, 2  # shown of each arm
REAL = "real"

Pictures = dict[str, Image.Image]  # key of the sample -> picture


@dataclass(frozen=True)
class Grid:
    """One sample: a row of pictures for each arm, a column for each step."""

    key: str
    given: str
    steps: Sequence[int]
    rows: Sequence[tuple[str, int, Sequence[str]]]  # arm, training seed, data URIs, empty where there is none
    size: tuple[int, int]


def grids(sweep: RecordedSweep, cohort: Cohort) -> tuple[list[Grid], str]:
    """Return the grids, and why there are none.

    Of each arm the finished trial of its lowest training seed: from ``visual_debug`` where all arms have steps in
    common there, otherwise from the pictures that their evaluations kept. All of these start from the noise of the
    sample's key, so that pictures of one column differ by the model alone.
    """
    trials = {arm: min(cohort.of(arm), key=lambda trial: trial.seed) for arm in sweep.arms if cohort.of(arm)}
    if not trials:
        return [], "no trial has finished"
    for read in (_watched, _evaluated):
        drawn = {arm: read(trial) for arm, trial in trials.items()}
        drawn = {arm: steps for arm, steps in drawn.items() if steps}
        common = sorted(set.intersection(*map(set, drawn.values()))) if drawn else []
        if len(drawn) < min(2, len(trials)) or not common:
            continue
        steps = ticks_even(common, STEPS)
        found = _assemble({arm: (trials[arm], drawn[arm]) for arm in drawn}, steps)
        if found:
            return found, ""
    return [], "no pictures of the same samples at the same steps: set visual_debug.every_steps, or grid_images above 0"


def _assemble(drawn: Mapping[str, tuple[RecordedTrial, Mapping[int, Any]]], steps: Sequence[int]) -> list[Grid]:
    opened = {arm: {step: load[step]() for step in steps} for arm, (_, load) in drawn.items()}
    given = sorted(set.intersection(*(set(sheets) for own in opened.values() for sheets in own.values())))
    given = next((name for name in ("all", *given) if name in given), None)
    if given is None:
        return []
    keys = [list(own[steps[-1]][given]) for own in opened.values()]
    common = [key for key in keys[0] if all(key in other for other in keys)]
    found = []
    for key in common[:SAMPLES]:
        rows = [
            (
                arm,
                drawn[arm][0].seed,
                [encode(sheets[given][key]) if key in sheets[given] else "" for sheets in own.values()],
            )
            for arm, own in opened.items()
        ]
        found.append(Grid(key, given, steps, rows, next(iter(opened.values()))[steps[-1]][given][key].size))
    return found


def _watched(trial: RecordedTrial) -> dict[int, Any]:
    """Return step -> how to open what ``visual_debug`` drew: by condition and key, without the real images."""
    files = {step_of(path.parent): path for path in trial.folder.glob("visual_debug/step-*/grid.png")}

    def load(path: Path) -> dict[str, Pictures]:
        return {label: row for label, row in cut_out(open_picture(path)).items() if label != REAL}

    return {step: lambda path=path: load(path) for step, path in sorted(files.items())}


def _evaluated(trial: RecordedTrial) -> dict[int, Any]:
    """Return step -> how to open what an evaluation kept of the first noise: by condition and key."""
    kept = evaluated(trial.folder, trial.record, "samples.parquet")
    folders = {step: path.parent for step, path in kept.items()}

    def load(folder: Path) -> dict[str, Pictures]:
        path, found = folder / "samples.parquet", {}
        try:
            rows = read_parquet(path.read_bytes()).select(["kind", "condition", "key", "seed", "image"]).to_pylist()
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error
        for row in rows:
            if row["kind"] == MODEL and row["image"] and not row["seed"] and "/" not in row["condition"]:
                found.setdefault(row["condition"], {})[row["key"]] = open_picture(folder / row["image"])
        return found

    return {step: lambda folder=folder: load(folder) for step, folder in sorted(folders.items())}


def open_picture(path: Path) -> Image.Image:
    """Read a PNG. Raises :class:`DataError` for one that is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise DataError(f"{path} is missing or damaged ({error}). {AGAIN}") from error


def encode(image: Image.Image) -> str:
    """Return a picture as a data URI, its longer side at most SIDE pixels."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=88, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
