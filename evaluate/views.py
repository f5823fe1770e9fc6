"""What the report shows, as plain values: positions on scales, pictures, charts and tables."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluate.charts import Axes, Series, line_chart, smooth, thin
from evaluate.keypoints import PARTS
from evaluate.records import AGAIN, ATTRIBUTES, MODEL, REAL
from evaluate.suite.attributes import PALETTES
from evaluate.suite.heldout_loss import PREDICTORS, RATIO_FROM
from evaluate.suite.pose import ALPHA, CONFIDENCE
from prep.errors import DataError

Row = Mapping[str, Any]

CAPTION_LIMIT = 420  # characters shown; the whole caption is in samples.parquet
IMAGE_LIMIT = 384  # pixels of the longer side that the page embeds
CONDITION_STYLES = {"all": "c1", "text+pose": "c2", "text": "c3"}
PREDICTOR_STYLES = {"mean_image": "b1", "identity": "b2", "affine": "b3"}
FAMILIES = {  # metric names begin with these; in the order of the page
    "attribute_accuracy": "Attribute accuracy",
    "pose_pck": "Pose, PCK at 0.1",
    "reconstruction/psnr_gain": "PSNR gained over a random pair",
    "reconstruction/psnr": "PSNR",
    "reconstruction/ssim": "SSIM",
    "reconstruction/lpips": "LPIPS",
    "heldout_ratio": "Held-out error / best trivial",
    "heldout_loss": "Held-out flow loss",
}
BASELINE_NAMES = {
    "judge_on_real": "judge on real",
    "detector_on_real": "detector on real",
    "random_pair": "random pair",
    "mean_image": "mean image",
    "round_trip": "JPEG round trip",
    "identity": "x = z",
    "affine": "affine in z",
    "best_trivial": "best trivial",
}
BONES = ((5, 7), (7, 9), (6, 8), (8, 10), (5, 6), (11, 12), (5, 11), (6, 12), (11, 13), (13, 15), (12, 14), (14, 16))
FACE_BONES = ((0, 1), (0, 2), (1, 3), (2, 4))


def label(name: str) -> tuple[str, str, str]:
    """A metric's family, condition and detail as people say them: ("Attribute accuracy", "text + pose", "hair")."""
    family = next((known for known in FAMILIES if name == known or name.startswith(known + "/")), name)
    condition, _, detail = name[len(family) + 1 :].partition("/")
    return FAMILIES.get(family, family), condition_name(condition or "all"), detail


def condition_name(condition: str) -> str:
    """The name of a condition as people say it: ``text+pose`` becomes "text + pose"."""
    return "all conditions" if condition == "all" else condition.replace("+", " + ")


def condition_order(condition: str) -> tuple[int, str]:
    """A key to sort conditions by: the usual three first."""
    usual = list(CONDITION_STYLES)
    return (usual.index(condition) if condition in usual else len(usual), condition)


def headlines(metrics: Sequence[Row]) -> list[Row]:
    """The metrics with a bar, for the verdict box, each on a scale of its own."""
    result = []
    for metric in metrics:
        if metric["needed"] is not None:
            title, part, detail = label(metric["name"])
            part = ", ".join(filter(None, (part, detail)))
            result.append({**metric, "title": title, "part": part, "plot": forest(metric, *scale_of([metric]))})
    return sorted(result, key=lambda metric: list(FAMILIES.values()).index(metric["title"]))


def metric_groups(metrics: Sequence[Row]) -> list[Row]:
    """All metrics by family, each family on one scale; the held-out error by t has its chart instead."""
    groups: dict[str, list[Row]] = {title: [] for title in FAMILIES.values()}
    for metric in metrics:
        if not metric["name"].startswith("heldout_mse/"):
            groups.setdefault(label(metric["name"])[0], []).append(metric)
    return [
        {
            "title": title,
            "unit": members[0]["unit"],
            "better": members[0]["better"],
            "rows": [
                {
                    **metric,
                    "part": label(metric["name"])[1],
                    "detail": label(metric["name"])[2],
                    "plot": forest(metric, *scale_of(members)),
                }
                for metric in sorted(members, key=lambda metric: condition_order(metric["settings"]["conditions"]))
            ],
        }
        for title, members in groups.items()
        if members
    ]


def scale_of(metrics: Sequence[Row]) -> tuple[float, float]:
    """The range that shows all values, intervals, bars and baselines, and zero."""
    values = [0.0]
    for metric in metrics:
        values += [metric[name] for name in ("value", "low", "high", "needed") if metric[name] is not None]
        values += metric["baselines"].values()
    low, high = min(values), max(values)
    return (low, high) if high > low else (0.0, 1.0)


def forest(metric: Row, low: float, high: float) -> Row:
    """Positions in [0, 1] of a metric's dot, interval, bar and baselines on a scale from ``low`` to ``high``."""

    def place(value: float | None) -> float | None:
        return None if value is None else (value - low) / (high - low)

    ranked = sorted(metric["baselines"].items(), key=lambda item: item[1])
    return {
        **{name: place(metric[name]) for name in ("value", "low", "high", "needed")},
        "baselines": [
            {"name": BASELINE_NAMES.get(name, name), "value": value, "at": place(value)} for name, value in ranked
        ],
    }


def gallery(samples: Sequence[Row], folder: Path) -> list[Row]:
    """The samples whose pictures were kept: the real one, then what each condition drew with the first noise."""
    kept = [row for row in samples if row["image"] and not row["seed"]]
    entries = []
    for real in kept:
        if real["kind"] != REAL:
            continue
        drawn = [row for row in kept if row["kind"] == MODEL and row["key"] == real["key"]]
        drawn = [row for row in drawn if "/" not in row["condition"]]  # no variants, which single tests draw
        drawn.sort(key=lambda row: condition_order(row["condition"]))
        posed = [row for row in drawn if "pose" in row["condition"].split("+") and row["target_joints"]]
        caption = real["caption"] or ""
        entries.append(
            {
                "key": real["key"],
                "caption": caption if len(caption) <= CAPTION_LIMIT else caption[:CAPTION_LIMIT].rstrip() + " …",
                "stretch": math.sqrt(real["width"] / real["height"]),  # pictures of all shapes get equal areas
                "width": real["width"],
                "height": real["height"],
                "pose": skeleton(posed[0]) if posed else None,
                "pictures": [picture(row, folder) for row in (real, *drawn)],
            }
        )
    return entries


def picture(row: Row, folder: Path) -> Row:
    """A picture of the gallery with what the judge saw in it."""
    judged = []
    if row["top_true"] is not None:
        judged = [
            {"attribute": name, "judged": row[f"{name}_judged"], "true": row[f"{name}_true"]} for name in ATTRIBUTES
        ]
    return {
        "title": "real" if row["kind"] == REAL else condition_name(row["condition"]),
        "data": data_uri(folder / row["image"]),
        "degenerate": row["degenerate"],
        "psnr": row["psnr"],
        "judged": judged,
    }


def skeleton(row: Row) -> Row:
    """The joints that a picture was asked for, as lines and dots in its pixels, and which of them were found there."""
    target, found = (
        np.zeros((17, 3)) if joints is None else np.reshape(joints, (-1, 3))[PARTS["body"]]
        for joints in (row["target_joints"], row["joints"])
    )
    asked, detected = target[:, 2] >= CONFIDENCE, found[:, 2] >= CONFIDENCE
    distance = np.hypot(*(found - target)[:, :2].T)
    hit = detected & (distance <= ALPHA * row["box_side"])
    places = np.round(target[:, :2].astype(float), 2).tolist()
    return {
        "lines": [(*places[a], *places[b]) for a, b in BONES + FACE_BONES if asked[a] and asked[b]],
        "dots": [(*places[joint], bool(hit[joint])) for joint in np.flatnonzero(asked)],
        "hits": row["pose_hits"],
        "joints": row["pose_joints"],
    }


def heldout_charts(metrics: Sequence[Row]) -> Row | None:
    """Error by t against the trivial predictors, and the ratio to the best of them; None where nothing was measured."""
    bins: dict[str, list[Row]] = {}
    for metric in metrics:
        if metric["name"].startswith("heldout_mse/") and metric["value"] is not None:
            bins.setdefault(metric["settings"]["conditions"], []).append(metric)
    if not bins:
        return None
    members = {name: sorted(bins[name], key=_middle) for name in sorted(bins, key=condition_order)}
    first = next(iter(members.values()))
    errors = [
        Series(BASELINE_NAMES[name], [(_middle(m), m["baselines"][name]) for m in first], PREDICTOR_STYLES[name])
        for name in PREDICTORS
    ]
    ratios = []
    for condition, own in members.items():
        name, style = condition_name(condition), CONDITION_STYLES.get(condition, "c4")
        band = [(_middle(m), m["low"], m["high"]) for m in own if m["low"] is not None]
        errors.append(Series(name, [(_middle(m), m["value"]) for m in own], style, band, markers=True))
        ratio = [(_middle(m), m["value"] / min(m["baselines"].values())) for m in own]
        ratios.append(Series(name, ratio, style, markers=True))
    needed = next((m["needed"] for m in metrics if m["name"] == "heldout_ratio/all"), None)
    axes = Axes("t (1 is noise)", "mean squared error", log=True, span=(0.0, 1.0))
    gated = replace(axes, y="error / best trivial error", line=needed, line_name="needed", shaded=(RATIO_FROM, 1.0))
    return {
        "error": line_chart(errors, axes),
        "ratio": line_chart(ratios, gated),
        "legend": [(series.name, series.style) for series in (*errors[len(PREDICTORS) :], *errors[: len(PREDICTORS)])],
    }


def _middle(metric: Row) -> float:
    return (metric["settings"]["t_low"] + metric["settings"]["t_high"]) / 2


def training_charts(curves: Sequence[Row]) -> list[Row]:
    """Loss, gradient norm and learning rate over the steps."""
    charts = []
    for tag, title, noisy in (
        ("train/loss", "training loss", True),
        ("train/grad_norm", "gradient norm", True),
        ("train/learning_rate", "learning rate", False),
    ):
        points = [(record["step"], record[tag]) for record in curves if tag in record]
        if len(points) < 2:
            continue
        series = [Series(title, thin(points), "faint" if noisy else "c1")]
        if noisy:
            series.append(Series(f"{title}, smoothed", thin(smooth(points, len(points) // 20)), "c1"))
        charts.append({"title": title, "svg": line_chart(series, Axes("step", title, log=noisy, width=340))})
    return charts


def confusions(samples: Sequence[Row]) -> list[Row]:
    """For each condition and attribute, how often a colour of the caption (row) was judged to be which (column)."""
    result = []
    drawn = [row for row in samples if row["kind"] == MODEL and row["top_true"] is not None]
    for condition in sorted({row["condition"] for row in drawn}, key=condition_order):
        rows = [row for row in drawn if row["condition"] == condition]
        tables = []
        for name in ATTRIBUTES:
            pairs = [(row[f"{name}_true"], row[f"{name}_judged"]) for row in rows]
            columns = [*PALETTES[name], *([None] if any(judged is None for _, judged in pairs) else [])]
            lines = []
            for true in PALETTES[name]:
                counts = [pairs.count((true, judged)) for judged in columns]
                lines.append({"true": true, "counts": counts, "total": sum(counts)})
            right = sum(true == judged for true, judged in pairs)
            tables.append({"name": name, "columns": columns, "lines": lines, "right": right, "n": len(pairs)})
        result.append({"condition": condition_name(condition), "tables": tables})
    return result


def colour(attribute: str, name: str) -> str:
    """The CSS colour of a palette name."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTES[attribute][name])


def data_uri(path: Path) -> str:
    """A picture as a ``data:`` URI: its PNG as it is, or a smaller WebP when it is large.

    Raises :class:`DataError` for a file that is missing or damaged.
    """
    try:
        data, kind = path.read_bytes(), "png"
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {AGAIN}") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise DataError(f"{path} is damaged ({error}). {AGAIN}") from error
    with image:
        if max(image.size) > IMAGE_LIMIT:
            image.thumbnail((IMAGE_LIMIT, IMAGE_LIMIT), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=90)
            data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
