"""The records of an evaluation: one row per judged picture, one metric per claim, and the schema of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from evaluate.statistics.intervals import MIN_CLUSTERS, Interval

SCHEMA_VERSION = 1
AGAIN = "Run nanodit evaluate run again"  # what mends files that are missing or damaged
ATTRIBUTES = ("top", "trousers", "background", "hair")  # judged on figures, in this order everywhere

# what a row of samples.parquet is: a picture of the model, a baseline in its place, or the holdout image itself
MODEL, BASELINE, REAL = "model", "baseline", "real"
# baselines that are pictures, drawn without any model
NO_SKILL = ("random_pair", "mean_image", "nearest_train", "nearest_features")
FEATURES = ("feature", "feature_pixels", "feature_probe")

SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("cluster", pa.string()),  # group of near duplicates, the unit of every interval; null: the sample alone
        ("seed", pa.int32()),  # seed index of the noise; null where nothing was drawn
        ("kind", pa.string()),  # model, baseline or real
        ("condition", pa.string()),  # all, text+pose, ...; or the baseline's name; or real
        ("guidance", pa.float64()),  # null: not one scale for all conditions; report.json says which
        ("bucket", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("degenerate", pa.string()),  # why the picture cannot be scored, or null
        ("mse", pa.float64()),
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),
        ("lpips", pa.float64()),
        ("dino_similarity", pa.float64()),  # cosine of ``feature`` with the real image's
        ("feature", pa.list_(pa.float32())),  # the judge's class token; null without a judge
        ("feature_pixels", pa.list_(pa.float32())),  # 16 x 16 x 3 mean colours in [0, 1]
        ("feature_probe", pa.list_(pa.float32())),  # CLIP's embedding of drawn pictures; null without a probe
        ("donor", pa.string()),  # key of the sample that gave a condition, or whose image stands here
        ("text", pa.string()),  # what was given in place of the caption
        ("figure_found", pa.bool_()),  # null: not looked for
        ("persons", pa.int32()),  # how many were found, the largest of whom has ``joints``; null: not looked for
        ("joints", pa.list_(pa.float32())),  # 133 x (x, y, confidence) re-detected, pixels
        ("target_joints", pa.list_(pa.float32())),  # 133 x (x, y, confidence) asked for, pixels
        ("box_side", pa.float32()),  # longer side of the person's box, pixels: what PCK is relative to
        ("box_area", pa.float32()),  # of the person, square pixels: what OKS is relative to
        ("pose_hits", pa.int32()),  # of the body
        ("pose_joints", pa.int32()),
        *((f"{name}_true", pa.string()) for name in ATTRIBUTES),
        *((f"{name}_judged", pa.string()) for name in ATTRIBUTES),  # null: no figure found
        ("image", pa.string()),  # path below the output folder, for the pictures of the grid
    ]
)


ITSELF = "the objective itself"  # the squared error, which training minimises
RELATED = "related to a loss of training"  # by a network that the model was trained to please
ROUNDING = 1e-6  # of a metric: so much one picture may differ in two batches
DEV = "-dev"  # ends the name of the folder of an evaluation of that part of the holdout


@dataclass(frozen=True)
class Metric:
    """One claim: a value with its interval, its number of images and what it is to be compared with.

    ``value`` is None where it could not be computed, and ``reason`` says why. ``needed`` is the bar that the
    configuration sets, if any. ``objective`` says what the metric has to do with the losses of training: ITSELF,
    RELATED, or nothing. It is a label and no setting: models with other losses are compared by the metric all the same.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    baselines: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    better: str = "higher"
    unit: str = ""
    needed: float | None = None
    reason: str | None = None
    objective: str = ""

    def __post_init__(self) -> None:
        """Keep out what is no number: files that hold one cannot be written, and a page would show it as a value."""
        finite = {name: number for name, number in self.baselines.items() if math.isfinite(number)}
        object.__setattr__(self, "baselines", finite)
        if any(number is not None and not math.isfinite(number) for number in (self.value, self.low, self.high)):
            for name in ("value", "low", "high"):
                object.__setattr__(self, name, None)
            object.__setattr__(self, "reason", "degenerate: what was measured has no finite value")

    @classmethod
    def of(cls, name: str, interval: Interval, **details: Any) -> Metric:
        """Make a metric from an interval; too few images leave the bounds empty and say so."""
        few = f"inconclusive: {interval.n} independent images, and below {MIN_CLUSTERS} there is no interval"
        reason = few if interval.low is None else None
        return cls(name, interval.value, interval.low, interval.high, interval.n, reason=reason, **details)

    @property
    def verdict(self) -> str | None:
        """``met``, ``missed`` or ``inconclusive`` against ``needed``; None where no bar is set."""
        if self.needed is None:
            return None
        if self.value is None:
            return "inconclusive"
        return Interval(self.value, self.low, self.high, self.n).verdict(self.needed, self.better)

    def to_dict(self) -> dict[str, Any]:
        """Return the metric as an entry of report.json."""
        return {
            "name": self.name,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "baselines": dict(self.baselines),
            "settings": dict(self.settings),
            "better": self.better,
            "unit": self.unit,
            "needed": self.needed,
            "verdict": self.verdict,
            "reason": self.reason,
            "objective": self.objective,
        }


def upgraded(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of report.json as this version writes it.

    Earlier evaluations had LPIPS in the settings of every drawn metric, and what is ``objective`` now behind its name
    and the judge's.
    """
    settings, suffix = dict(entry["settings"]), f", {RELATED}"
    named = [name for name in ("lpips", "judge") if str(settings.get(name, "")).endswith(suffix)]
    settings |= {name: settings[name].removesuffix(suffix) for name in named}
    seen = {"lpips": "lpips" in entry["name"]}
    seen["judge"] = settings.get("space") == "feature" or any(one in entry["name"] for one in ("similarity", "distrib"))
    related = any(seen[name] for name in named)
    if not seen["lpips"]:
        settings.pop("lpips", None)
    return {"objective": RELATED if related else "", **entry, "settings": settings}


@dataclass(frozen=True)
class Skipped:
    """A metric that was not computed, and why."""

    name: str
    reason: str


def folder_name(checkpoint: str, weights: str, part: str = "test") -> str:
    """Return the name of an evaluation's folder: the checkpoint's, the weights unless ``ema``, and ``dev`` for that."""
    name = checkpoint if weights == "ema" else f"{checkpoint}-{weights.replace(':', '-')}"
    return name + DEV if part == "dev" else name


def to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as samples.parquet has them."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=SAMPLES_SCHEMA)


def from_table(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of samples.parquet, or some of its columns, with FEATURES as float32 arrays."""
    columns = [name for name in table.column_names if name not in FEATURES]
    rows = table.select(columns).to_pylist()
    for name in [name for name in FEATURES if name in table.column_names]:
        for row, value in zip(rows, table[name]):
            row[name] = value.values.to_numpy(zero_copy_only=False) if value.is_valid else None
    return [{name: row[name] for name in table.column_names} for row in rows]


def select(samples: Iterable[Mapping[str, Any]], kind: str, condition: str) -> list[Mapping[str, Any]]:
    """Return the rows of one arm."""
    return [row for row in samples if row["kind"] == kind and row["condition"] == condition]


def cluster_of(row: Mapping[str, Any]) -> str:
    """Return what a row is resampled with: the group of near duplicates in the index, the sample where it names none.

    Rows of evaluations before there were clusters have the sample alone.
    """
    return row.get("cluster") or row["key"]


def degenerate_reason(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why an arm cannot be scored, or None.

    One degenerate picture is enough: leaving it out would flatter the model, and counting it as zero would invent a
    number.
    """
    bad = [row for row in rows if row["degenerate"]]
    if not bad:
        return None
    kinds = ", ".join(sorted({row["degenerate"] for row in bad}))
    return f"degenerate: {len(bad)} of {len(rows)} pictures are {kinds}, the first for sample {bad[0]['key']}"


def average(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """Return Plain mean of a column over the rows that have it; None where none has."""
    numbers = [number for row in rows if (number := value(row)) is not None]
    return sum(numbers) / len(numbers) if numbers else None


MEASURES = {
    "psnr": ("higher", "dB"),
    "ssim": ("higher", ""),
    "lpips": ("lower", ""),
    "dino_similarity": ("higher", ""),
}
