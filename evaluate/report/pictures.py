"""The report's pictures: made small enough for one file, and the grid of samples at stated quantiles."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluate.records import AGAIN, ATTRIBUTES, MODEL, REAL
from evaluate.report.files import Name, Run
from evaluate.report.metrics import condition_order, part_name
from evaluate.suite.pose import ALPHA, CONFIDENCE
from nanodit.errors import DataError
from nanodit.keypoints import BODY_JOINTS, BONES

Row = Mapping[str, Any]

CAPTION_LIMIT = 420  # characters shown; the whole caption is in samples.parquet
FIRST = 3  # samples shown that are first in the order of their keys
SIDES = (384, 256, 192, 128, 96, 64)  # pixels of the longer side, tried in turn until the page is small enough


@dataclass
class EmbeddedImages:
    """Pictures as data URIs, their longer side at most ``side`` pixels.

    What is smaller stays the PNG that it is, unless ``lossless`` is false.
    """

    side: int = SIDES[0]
    lossless: bool = True
    _made: dict[Path, tuple[str, tuple[int, int]]] = field(default_factory=dict)

    def make(self, path: Path) -> str:
        """Return the picture in a file. Raises :class:`DataError` for one that is missing or damaged."""
        return self._get(path)[0]

    def size(self, path: Path) -> tuple[int, int]:
        """Return the width and height of the picture in a file, as it is there."""
        return self._get(path)[1]

    def _get(self, path: Path) -> tuple[str, tuple[int, int]]:
        if path not in self._made:
            self._made[path] = self._encode(path)
        return self._made[path]

    def _encode(self, path: Path) -> tuple[str, tuple[int, int]]:
        try:
            data, kind = path.read_bytes(), "png"
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            image.load()
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist. {AGAIN}") from error
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
            raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error
        with image:
            size = image.size
            if max(image.size) > self.side or not self.lossless:
                image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=90 if self.lossless else 80, method=4)
                data, kind = buffer.getvalue(), "webp"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size


def picture(run: Run, name: Name, images: EmbeddedImages, title: str, note: str = "") -> dict[str, Any]:
    """Return a picture of samples.parquet for the page: ``data`` is empty where it was not kept."""
    row = run.files.rows[name]
    return {
        "title": title,
        "note": row["degenerate"] or note,
        "data": images.make(run.files.folder / row["image"]) if row["image"] else "",
        "width": row["width"],
        "height": row["height"],
        "stretch": math.sqrt(row["width"] / row["height"]),  # pictures of all shapes get equal areas
        "judged": judged(row),
    }


def judged(row: Row) -> list[dict[str, Any]]:
    """Return the colours that the judge of figures saw, and those asked for."""
    if row["top_true"] is None:
        return []
    return [{"attribute": name, "judged": row[f"{name}_judged"], "true": row[f"{name}_true"]} for name in ATTRIBUTES]


def real_of(run: Run, key: str, images: EmbeddedImages, title: str = "real", note: str = "holdout") -> dict[str, Any]:
    """Return the real image of a sample."""
    return picture(run, (REAL, "real", key, 0), images, title, note)


def shorten(caption: str | None, limit: int = CAPTION_LIMIT) -> str:
    """Cut a caption to what the page shows, between words."""
    caption = caption or ""
    if len(caption) <= limit:
        return caption
    cut = caption[:limit]
    return (cut.rsplit(None, 1)[0] if " " in cut else cut).rstrip() + " …"


def gallery(runs: Sequence[Run], images: EmbeddedImages) -> dict[str, Any] | None:
    """Choose samples at quantiles of a measure, by each run's own ranking, then the first by their keys."""
    chosen: dict[str, list[str]] = {}
    rules = []
    for run in runs:
        ranked = run.files.extras.get("reconstruction", {}).get("quantiles")
        if ranked:
            rules.append({"run": run.letter, "rule": ranked["rule"]})
            for one in ranked["samples"]:
                words = f"{one['label']}{f' of {run.letter}' if run.letter else ''}: {one['value']:.1f} dB"
                chosen.setdefault(one["key"], []).append(words)
    kept = [row["key"] for row in runs[0].files.samples if row["kind"] == REAL and row["image"]]
    # without a ranking (one without pictures of the reconstruction test) all that were kept
    first = [key for key in kept if key not in chosen][: FIRST if chosen else None]
    entries = [_entry(runs, key, chosen.get(key, []), images) for key in (*chosen, *first)]
    entries = [entry for entry in entries if entry["rows"]]
    return {"rules": rules, "first": len(first), "entries": entries} if entries else None


def _entry(runs: Sequence[Run], key: str, words: Sequence[str], images: EmbeddedImages) -> dict[str, Any]:
    rows, pose, caption, real = [], None, None, None
    for run in runs:
        own = run.files.rows.get((REAL, "real", key, 0))
        if own is None:
            continue
        if real is None and own["image"]:
            caption, real = own["caption"], real_of(run, key, images)
        drawn = [
            row
            for row in run.files.samples
            if row["key"] == key and row["kind"] == MODEL and not row["seed"] and row["image"]
        ]
        drawn = [row for row in drawn if row["donor"] is None and row["text"] is None and "/" not in row["condition"]]
        drawn.sort(key=lambda row: condition_order(row["condition"]))
        posed = [row for row in drawn if "pose" in row["condition"].split("+") and row["target_joints"]]
        pose = pose or (skeleton(posed[0]) if posed else None)
        pictures = [
            picture(
                run,
                (MODEL, row["condition"], key, 0),
                images,
                part_name(row["condition"]),
                f"{row['psnr']:.1f} dB" if row["psnr"] is not None else "",
            )
            for row in drawn
        ]
        rows += [{"run": run.letter, "pictures": pictures}] if pictures else []
    return {"key": key, "words": words, "caption": shorten(caption), "real": real, "pose": pose, "rows": rows}


def skeleton(row: Row) -> dict[str, Any]:
    """Return the joints that a picture was asked for, as lines and dots in its pixels, and which of them were found."""
    target = np.reshape(row["target_joints"], (-1, 3))[:BODY_JOINTS]
    found = np.zeros_like(target) if row["joints"] is None else np.reshape(row["joints"], (-1, 3))[:BODY_JOINTS]
    asked, detected = target[:, 2] >= CONFIDENCE, found[:, 2] >= CONFIDENCE
    distance = np.hypot(*(found - target)[:, :2].T)
    hit = detected & (distance <= ALPHA * row["box_side"])
    places = np.round(target[:, :2].astype(float), 2).tolist()
    return {
        "condition": part_name(row["condition"]),
        "lines": [(*places[a], *places[b]) for a, b in BONES if asked[a] and asked[b]],
        "dots": [(*places[joint], bool(hit[joint])) for joint in np.flatnonzero(asked)],
        "hits": row["pose_hits"],
        "joints": row["pose_joints"],
    }
