"""The built-in dataset: drawings of people with a caption and the known truth beside each.

Everything can be run and judged with it before any photograph is at hand. Figure ``i`` of a set is a pure function of
the set's seed, ``i`` and the size: the scene (:mod:`prep.figures.pose`), its 133 keypoints
(:mod:`prep.figures.keypoints`), the picture (:mod:`prep.figures.drawing`) and the caption
(:mod:`prep.figures.captions`).
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nanodit.console import Progress
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import canonical_json, write_atomic
from prep.figures.captions import VOCABULARY, scene_caption
from prep.figures.drawing import render
from prep.figures.keypoints import scene_keypoints
from prep.figures.mirror import mirror_scene
from prep.figures.pose import sample_scene
from prep.figures.scene import (
    BACKGROUND_COLOURS,
    HAIR_COLOURS,
    TOP_COLOURS,
    TROUSERS_COLOURS,
    Dice,
    body_circles,
    union_box,
)

__all__ = [
    "BACKGROUND_COLOURS",
    "HAIR_COLOURS",
    "TOP_COLOURS",
    "TROUSERS_COLOURS",
    "VOCABULARY",
    "Figure",
    "draw_figure",
    "write_figures",
]

DRAWING_VERSION = 1  # raise it when the same seed draws or says something else
_BATCH = 32  # figures per task of a worker process
_MARKER, _TRUTH = "figures.json", "truth.parquet"


@dataclass(frozen=True)
class Figure:
    """A drawn figure and its truth.

    ``keypoints`` is float32 (133, 3): x and y in continuous pixels of the picture (the centre of the first pixel is at
    .5, .5), then visibility: 0 outside the picture, 1 hidden, 2 visible. ``box`` is (x0, y0, x1, y1) of the person
    without the held object, clipped to the picture. ``attributes`` are words: top, trousers, background, hair, skin,
    held_object, held_colour, held_hand, light, ...
    """

    image: Image.Image
    caption: str
    attributes: dict[str, str]
    keypoints: np.ndarray
    box: tuple[float, float, float, float]


def draw_figure(seed: int, index: int, size: int, short_caption: bool = False, mirrored: bool = False) -> Figure:
    """Draw figure ``index`` of the set ``seed``, with an area of about ``size`` * ``size`` pixels.

    The scene depends on (seed, index) alone, so that every size shows the same picture; ``mirrored`` gives its mirror
    image, with joints and words of the mirrored scene.
    """
    original = sample_scene(seed, index)
    scene = mirror_scene(original) if mirrored else original
    width, height = round(size * math.sqrt(scene.aspect)), round(size / math.sqrt(scene.aspect))
    scale = np.array([width / scene.aspect, height])
    positions, visibility = scene_keypoints(scene)
    pixels = positions * scale
    outside = ((pixels < 0) | (pixels > (width, height))).any(1)
    visibility = np.where(outside, 0, visibility)
    x0, y0, x1, y1 = union_box(body_circles(scene))
    box = (max(0.0, x0 * scale[0]), max(0.0, y0 * scale[1]), min(width, x1 * scale[0]), min(height, y1 * scale[1]))
    image = render(original, width, height)  # which is not exact in a mirrored scene
    return Figure(
        image=image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image,
        caption=scene_caption(scene, Dice("caption", seed, index), short_caption),
        attributes=scene.attributes,
        keypoints=np.concatenate([pixels, visibility[:, None]], 1).astype(np.float32),
        box=tuple(float(v) for v in box),
    )


def write_figures(
    out: Path, count: int, size: int, seed: int, short_captions: bool = False, workers: int | None = None
) -> None:
    """Write ``figure-NNNNNN.png`` and ``.txt`` for each figure, then ``truth.parquet``, into the folder ``out``.

    ``figures.json`` keeps the parameters: the same call again redoes an interrupted set, and does nothing when it is
    complete. Raises ConfigError for a folder that holds anything else.
    """
    out = Path(out)
    parameters = {
        "drawing_version": DRAWING_VERSION,
        "count": count,
        "size": size,
        "seed": seed,
        "short_captions": short_captions,
    }
    _check(out, parameters)
    if (out / _TRUTH).exists():
        return
    write_atomic(out / _MARKER, canonical_json(parameters))
    workers = min(math.ceil(count / _BATCH), workers or os.cpu_count() or 1)
    batches = [range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)]
    draw = partial(_write_batch, out, size, seed, short_captions)
    rows: list[dict] = []
    with Progress("figures", count) as progress:
        for part in _in_processes(draw, batches, workers):
            rows += part
            progress.advance(len(part))
    write_atomic(out / _TRUTH, _truth_bytes(rows))


def _check(out: Path, parameters: dict) -> None:
    """Refuse parameters out of range, and folders that something else wrote."""
    if parameters["count"] < 1 or parameters["size"] < 32 or parameters["seed"] < 0:
        raise ConfigError(
            f"prep figures: count {parameters['count']}, size {parameters['size']}, seed {parameters['seed']}: "
            "need a count of at least 1, a size of at least 32 pixels and a seed that is not negative"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; prep figures writes a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        found = json.loads((out / _MARKER).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} is not empty and was not made by prep figures; name another folder") from error
    if found != parameters:
        raise ConfigError(f"{out} holds figures made with {found}, not {parameters}; name another folder or delete it")


def _in_processes(draw: Callable[[range], list[dict]], batches: list[range], workers: int) -> Iterator[list[dict]]:
    """Yield the results of ``draw`` over ``batches``, in order, computed by ``workers`` processes."""
    if workers == 1:
        yield from map(draw, batches)
        return
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(draw, batches)
    except BrokenProcessPool as error:
        raise ResourceError(
            "prep figures: a process that draws has ended, killed from outside, or by the system for lack of memory. "
            "Run the same command again"
        ) from error


def _write_batch(out: Path, size: int, seed: int, short_captions: bool, indices: range) -> list[dict]:
    """Draw and write some figures, and return their rows of truth."""
    return [_write_one(out, draw_figure(seed, index, size, short_captions), index) for index in indices]


def _write_one(out: Path, figure: Figure, index: int) -> dict:
    name = f"figure-{index:06d}"
    buffer = io.BytesIO()
    figure.image.save(buffer, "PNG", compress_level=1)
    # truth.parquet, written last, commits the set; these files are rewritten by a run that did not get there
    (out / f"{name}.png").write_bytes(buffer.getvalue())
    (out / f"{name}.txt").write_text(figure.caption + "\n", encoding="utf-8")
    size = {"width": figure.image.width, "height": figure.image.height}
    geometry = {"keypoints": figure.keypoints.ravel(), "box": np.array(figure.box, np.float32)}
    return {"file": f"{name}.png"} | size | figure.attributes | geometry


def _truth_bytes(rows: list[dict]) -> bytes:
    """Return the bytes of ``truth.parquet``: one row per figure, in order."""
    kinds = {
        "width": pa.int32(),
        "height": pa.int32(),
        "keypoints": pa.list_(pa.float32()),
        "box": pa.list_(pa.float32()),
    }
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()
