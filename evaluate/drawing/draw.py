"""The drawing of the pictures asked for, each once and in batches, and their scores beside the baselines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from evaluate.drawing.arms import DrawingArm, draw
from evaluate.drawing.baselines import nearest, round_trip
from evaluate.drawing.context import DrawingContext
from evaluate.drawing.finished import FinishedBatches
from evaluate.drawing.pictures import Picture, PictureBatch, batches, compose
from evaluate.metrics.distances import SPACES, as_points
from evaluate.metrics.distances import nearest as nearest_points
from evaluate.metrics.likeness import pixel_features
from evaluate.records import BASELINE, MODEL, REAL, from_table, to_table
from evaluate.subject import Batch, Row, chunks, read_batch
from nanodit.console import Progress, waiting

ORDER = {REAL: 0, BASELINE: 1, MODEL: 2}
PROMPTS, ARMS = 4, ("text", "text+pose")  # samples and conditions that a report shows first


@dataclass(frozen=True)
class Album:
    """The folder in which pictures are kept for the report, and the samples of which all are."""

    folder: Path
    keys: Collection[str]

    def keep(self, rows: Sequence[dict[str, Any]], pictures: np.ndarray) -> None:
        """Save the pictures of its samples as PNG and note their paths in the rows."""
        for row, picture in zip(rows, pictures):
            if row["key"] in self.keys:
                self.save(row, picture)

    def save(self, row: dict[str, Any], picture: np.ndarray) -> None:
        """Save one picture."""
        seed = "" if row["seed"] is None else f"-{row['seed']}"
        row["image"] = f"images/{row['key']}-{row['condition'].replace('/', '_')}{seed}.png"
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(self.folder / row["image"])


def draw_and_examine(
    context: DrawingContext, pictures: Sequence[Picture], parts: FinishedBatches, folder: Path
) -> list[dict[str, Any]]:
    """Draw every picture and score it beside the real image and the baselines.

    Returns the rows of samples.parquet, sorted; keeps the pictures of the first ``grid_images`` samples.
    """
    subject, config = context.subject, context.config
    context.texts.encode(picture.text for picture in pictures if picture.text is not None)
    if context.looks:
        _ = context.train_features  # read with a progress of its own
    album = Album(folder, set(context.keys[: config.grid_images]))
    buckets = _buckets(context, pictures)
    size = subject.batch_size
    rows: list[dict[str, Any]] = []
    with Progress("pictures", len(subject.rows) + len(pictures), "pictures") as progress:
        for bucket, number, members in chunks(subject.rows, size):
            compute = partial(_references, context, members, album)
            keys = [row["key"] for row in members]
            own = from_table(parts.get(f"references-{bucket}-{number:04d}", keys, compute))
            context.examiner.remember(own)  # so that the judge saw each in the same batch, resumed or not
            rows += own
            progress.advance(len(members))
        for asked in batches(pictures, buckets, size):
            content = [picture.to_dict() for picture in asked.pictures]
            rows += from_table(parts.get(asked.name, content, partial(_drawn, context, asked, album)))
            progress.advance(len(asked.pictures))
    return sorted(rows, key=lambda row: (row["key"], ORDER[row["kind"]], row["condition"], row["seed"] or 0))


def _buckets(context: DrawingContext, pictures: Sequence[Picture]) -> dict[str, str]:
    return {key: context.rows[key]["bucket"] for key in dict.fromkeys(picture.key for picture in pictures)}


def _drawn(context: DrawingContext, asked: PictureBatch, album: Album) -> pa.Table:
    """Draw and score one batch."""
    batch, images, reasons = _draw(context, asked)
    first = asked.pictures[0]
    scale = first.guidance.value
    labels = {"kind": MODEL, "condition": asked.condition, "seed": asked.seed}
    labels |= {"guidance": scale if isinstance(scale, float) else None}
    rows = context.examiner.rows(batch, images, degenerate=reasons, posed=_posed(asked, batch), **labels)
    for row, picture in zip(rows, asked.pictures):
        row["donor"], row["text"] = picture.donor, picture.text
    album.keep(rows, images)
    return to_table(rows)


def draw_features(context: DrawingContext, pictures: Sequence[Picture], parts: FinishedBatches) -> list[dict[str, Any]]:
    """Draw pictures that are held against no image of their own, and keep nothing of them but features.

    Returns rows in key order: ``key``, ``degenerate``, ``feature`` of the judge; with a probe also ``probe``, and
    ``probe_real`` of the sample's own image. Features are float32 (width,), or None.
    """
    rows: list[dict[str, Any]] = []
    with Progress("pictures compared as a set", len(pictures), "pictures") as progress:
        for asked in batches(pictures, _buckets(context, pictures), context.subject.batch_size):
            content = [picture.to_dict() for picture in asked.pictures]
            table = parts.get(asked.name, content, partial(_drawn_features, context, asked))
            rows += [dict(zip(table.column_names, values)) for values in zip(*map(_column, table.columns))]
            progress.advance(len(asked.pictures))
    return sorted(rows, key=lambda row: row["key"])


def _drawn_features(context: DrawingContext, asked: PictureBatch) -> pa.Table:
    """Draw one batch and return its features."""
    batch, images, reasons = _draw(context, asked, real=context.probe is not None)
    seen = {
        "feature": context.judge.features(images) if context.judge else None,
        "probe": context.probe.features(images) if context.probe else None,
        "probe_real": context.probe.features(batch.pixels) if context.probe else None,
    }
    columns = {"key": pa.array(batch.keys, pa.string()), "degenerate": pa.array(reasons, pa.string())}
    for name, features in seen.items():
        rows = [None] * len(batch) if features is None else list(features.astype(np.float32))
        columns[name] = pa.array(rows, pa.list_(pa.float32()))
    return pa.table(columns)


def _column(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column, lists as arrays."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    return [value.values.to_numpy() if value.is_valid else None for value in column]


def _draw(
    context: DrawingContext, asked: PictureBatch, real: bool = True
) -> tuple[Batch, np.ndarray, list[str | None]]:
    batch = compose(context.subject.dataset, context.rows, asked.pictures, context.texts.embed, real)
    first = asked.pictures[0]
    arm = DrawingArm(asked.condition, first.subset, first.guidance)
    return batch, *draw(context.subject, batch, arm, asked.seed, context.config.sampler)


def _posed(asked: PictureBatch, batch: Batch) -> list[tuple[str, np.ndarray]] | None:
    """Return the poses given, where any is not the sample's own."""
    if not any("pose" in picture.donors or picture.mirrored_pose for picture in asked.pictures):
        return None
    if batch.conditions.pose is None:
        return None
    return [(picture.giver("pose"), pose.numpy()) for picture, pose in zip(asked.pictures, batch.conditions.pose)]


def _references(context: DrawingContext, members: tuple[Row, ...], album: Album) -> pa.Table:
    """Score what needs no model: the real images under the judges, and where tests look, the baselines."""
    subject, examiner = context.subject, context.examiner
    batch = read_batch(subject.dataset, members)
    rows = examiner.rows(batch, batch.pixels, kind=REAL, condition="real")
    album.keep(rows, batch.pixels)
    if not context.looks:
        return to_table(rows)
    features = [row["feature"] for row in rows]
    mean_image = np.rint(context.training.mean_image(batch.bucket)).astype(np.uint8)
    stand_ins = {"mean_image": np.stack([mean_image] * len(batch.rows)), "round_trip": round_trip(batch.pixels)}
    # whoever is found in the one mean image of the bucket: a floor of poses and colours, too
    found = [pose.keypoints if pose.persons else None for pose in examiner.detect(mean_image[None])] * len(batch)
    for name, pictures in stand_ins.items():
        joints = found if name == "mean_image" else []
        rows += examiner.rows(batch, pictures, kind=BASELINE, condition=name, joints=joints)
    training = context.train_features
    near = nearest(pixel_features(batch.pixels), batch.bucket, training, training.feature_pixels)
    donors = {
        "random_pair": [subject.partners[key]["key"] if key in subject.partners else None for key in batch.keys],
        "nearest_train": near,
    }
    if training.feature is not None:  # what retrieval by features would give
        donors["nearest_features"] = [
            None if feature is None else nearest(feature[None], batch.bucket, training, training.feature)[0]
            for feature in features
        ]
    for name, keys in donors.items():
        there = [index for index, key in enumerate(keys) if key is not None]
        if there:
            others = [context.rows[keys[index]] for index in there]
            pictures = np.stack([subject.dataset.pixels(row) for row in others])
            joints = examiner.stored_joints(others, batch.width, batch.height) or None  # without poses: detected
            stand_in = examiner.rows(batch.select(there), pictures, kind=BASELINE, condition=name, joints=joints)
            rows += [row | {"donor": other["key"]} for row, other in zip(stand_in, others)]
    return to_table(rows)


def shown_first(conditions: Iterable[str]) -> list[str]:
    """Return the two conditions that a report shows first: ARMS, and in the place of missing ones the first others."""
    names = list(conditions)
    usual = [next((name for name in names if name.partition("@")[0] == one), None) for one in ARMS]
    usual = [name for name in usual if name is not None]
    return [*usual, *(name for name in names if name not in usual)][: len(ARMS)]


def keep_nearest(context: DrawingContext, rows: Sequence[dict[str, Any]]) -> None:
    """Keep the training images nearest to the pictures that a report shows first, as the judge sees them.

    Of each of the first PROMPTS samples of the grid, the last of :func:`shown_first`; in mean colours without a judge.
    """
    keys = context.keys[: min(PROMPTS, context.config.grid_images)]
    conditions = shown_first(arm.name for arm in context.arms)[-1:]
    drawn = [
        row
        for row in rows
        if row["kind"] == MODEL and row["key"] in keys and row["condition"] in conditions and not row["seed"]
    ]
    drawn = [row for row in drawn if not row["degenerate"]]
    if not drawn or not len(training := context.train_features):  # which are read only if something was drawn
        return
    space = next(space for space in SPACES if getattr(training, space) is not None)
    points = as_points(np.stack([row[space] for row in drawn]), space)
    distances, places = nearest_points(points, as_points(getattr(training, space), space), 1)
    context.extras["nearest"] = {
        "space": space,
        "training_images": len(training),
        "pictures": [
            {
                **{name: row[name] for name in ("key", "condition")},
                "training_key": training.keys[place],
                "training_image": context.show_training(training.keys[place]),
                "distance": float(distance),
            }
            for row, distance, place in zip(drawn, distances[:, 0], places[:, 0])
        ],
    }


def show(context: DrawingContext, pictures: Sequence[Picture], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Save the pictures that tests want shown (:meth:`DrawingContext.show`), drawn again where they were not kept."""
    named = {(row["kind"], row["condition"], row["key"], row["seed"] or 0): row for row in rows}
    wanted = [named[name] for name in sorted(context.shown) if named[name]["image"] is None]
    album = Album(folder, ())
    names = {(row["condition"], row["key"], row["seed"]): row for row in wanted if row["kind"] == MODEL}
    again = [picture for picture in pictures if picture.name in names]
    buckets = _buckets(context, again)
    with waiting("drawing pictures for the report", at_once=False):
        for asked in batches(again, buckets, context.subject.batch_size):
            _, images, _ = _draw(context, asked)
            for picture, image in zip(asked.pictures, images):
                album.save(names[picture.name], image)
    for row in wanted:
        key = row["key"] if row["kind"] == REAL else row["donor"]
        if row["kind"] != MODEL and key is not None:
            album.save(row, context.subject.dataset.pixels(context.rows[key]))
    for key, path in sorted(context.shown_training.items()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(context.subject.dataset.pixels(context.rows[key])).save(folder / path)
