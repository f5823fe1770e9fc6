"""Does a picture follow the image features that it is given? One sample's text with the DINO features of another.

The donor is one of a few candidates that might as well have been it: a model that ignores the features cannot do
better than chance in telling which. Drawn without guidance, from the noise of the sample's own picture, with the
donor's class token, its patches, or both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.colours import CHANCE
from evaluate.metrics.distances import SPACES, as_points, unit
from evaluate.records import (
    ATTRIBUTES,
    BASELINE,
    MODEL,
    REAL,
    Metric,
    Skipped,
    average,
    cluster_of,
    degenerate_reason,
)
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS
from evaluate.subject import group_of
from evaluate.suite.declaration import Section, SuiteTest
from evaluate.suite.reconstruction import lpips_to_own
from nanodit.config import Config
from nanodit.rng import generator

# what the donor gives -> what the model is given, the first that was trained
GIVEN = {
    "both": ("text+dino", "all"),
    "cls": ("text+cls", "text+cls+pose"),
    "patches": ("text+patches", "text+patches+pose"),
}
SWAPPED = {"both": ("cls", "patches"), "cls": ("cls",), "patches": ("patches",)}
MODE_NAMES = {"both": "CLS and patches", "cls": "CLS alone", "patches": "patches alone"}
POOL = 64  # samples of a bucket that candidates are looked for among
EXAMPLES = 4  # samples whose pictures are kept for the report


class SwapConfig(Config):
    """The number of samples given another's features, and of candidates among which the donor has to be told."""

    prompts: int = Field(default=64, gt=0)
    candidates: int = Field(default=8, ge=2)
    matrix: int = Field(default=4, ge=2)  # samples of the matrix of all texts and all features


@dataclass(frozen=True)
class Pair:
    """A sample, the donor of its features, and all that might have been, the donor among them, in key order."""

    key: str
    donor: str
    candidates: tuple[str, ...]


def choose_donor(key: str, others: Sequence[str], likeness: Sequence[float], count: int) -> Pair:
    """Choose ``count`` candidates among the half of ``others`` least like the sample, and of these the donor.

    ``likeness`` of each of the others to the sample. The donor is drawn from the candidates blindly: whatever is drawn
    without knowing it hits it in one of ``count`` cases.
    """
    unlike = sorted(range(len(others)), key=lambda index: (likeness[index], others[index]))
    pool = sorted(others[index] for index in unlike[: max(count, len(others) // 2)])
    chosen = [pool[index] for index in generator("swap", key).permutation(len(pool))[:count]]
    return Pair(key, chosen[0], tuple(sorted(chosen)))


def pictures(context: DrawingContext, config: SwapConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for each sample with its own and with the donor's features, and for the matrix."""
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], [asked]
    wanted = []
    for mode, arm in asked.arms.items():
        for seed in range(context.config.seeds):
            for pair in asked.pairs:
                donors = dict.fromkeys(SWAPPED[mode], pair.donor)
                wanted.append(Picture(pair.key, arm.name, arm.subset, arm.guidance, seed))
                wanted.append(Picture(pair.key, _label(mode), arm.subset, arm.guidance, seed, donors))
    mode, keys = _matrix(context, asked)
    arm = asked.arms[mode]
    for key in keys:
        for column, donor in enumerate(keys):
            if donor != key:
                donors = dict.fromkeys(SWAPPED[mode], donor)
                wanted.append(Picture(key, _label(mode, column), arm.subset, arm.guidance, 0, donors))
    return wanted, asked.skipped


def summarise(rows: Rows, context: DrawingContext, config: SwapConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return ``swap/NAME``, and ``/cls`` or ``/patches`` where only these are the donor's.

    ``_pixels`` is measured on mean colours.

    ``gain``: similarity to the donor's image (cosine of the judge's features; less the distance, on mean colours) above
    that of the picture with the sample's own features. ``identified``: share in which the donor's image is the nearest
    of the candidates'. ``text_kept``: on figures, attributes that are still as the text says. ``similarity_kept``:
    elsewhere, likeness to the sample's own image. ``lpips``: perceptual distance to the sample's own image, which the
    donor's features should take the picture away from.
    """
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], []  # named with the pictures
    spaces, judged_text = SPACES if context.judge else SPACES[1:], context.figures and not context.no_detector
    skipped = [] if context.judge else [Skipped(f"swap/{name}", context.no_judge) for name in ("gain", "identified")]
    if context.figures and context.no_detector:
        skipped.append(Skipped("swap/text_kept", context.no_detector))
    if context.examiner.no_lpips:
        skipped.append(Skipped("swap/lpips", context.examiner.no_lpips))
    references = {**rows.without_skill, "round_trip": rows.select(BASELINE, "round_trip")}
    metrics: list[Metric] = []
    nearest: dict[str, dict[str, dict[str, str]]] = {}  # mode -> sample -> space -> whose image it was taken for
    for mode, arm in asked.arms.items():
        drawn = _SwappedPictures(rows, asked, mode)
        settings = context.settings(arm.name, arm.guidance, swapped="+".join(SWAPPED[mode]), **asked.counts)
        reason = degenerate_reason([*drawn.swapped, *drawn.unswapped])
        nearest[mode] = {}
        for space in spaces:
            own = settings | {"space": space, **(context.judged if space == "feature" else {})}
            names = [_name(name, mode, space) for name in ("gain", "identified")]
            if reason:
                metrics += [Metric(name, None, n=len(asked.pairs), settings=own, reason=reason) for name in names]
                continue
            toward = _TowardDonor(rows, drawn, space)
            metrics += toward.metrics(names, own)
            for key, found in toward.nearest().items():
                nearest[mode].setdefault(key, {})[space] = found
        if context.examiner.lpips_label:
            others = {"unswapped": drawn.unswapped, **references}
            metrics.append(lpips_to_own(_name("lpips", mode), drawn.swapped, others, settings | context.lpips, reason))
        if judged_text:
            metrics.append(_text_kept(rows, drawn, mode, settings, reason))
        elif context.judge and not context.figures:
            metrics.append(_similarity_kept(rows, drawn, mode, settings | context.judged, reason))
    context.extras["swap"] = _extras(context, asked, nearest)
    return metrics, skipped


@dataclass(frozen=True)
class _Asked:
    """The pictures of the test: how each mode is given, the pairs, the samples of the matrix, and what is left out."""

    arms: dict[str, DrawingArm]
    pairs: list[Pair]
    matrix: int
    skipped: list[Skipped]

    @property
    def counts(self) -> dict[str, Any]:
        """The numbers of the pairs and their candidates, for the settings."""
        sizes = sorted({len(pair.candidates) for pair in self.pairs})
        return {"prompts": len(self.pairs), "candidates": sizes[0] if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"}


def _ask(context: DrawingContext, config: SwapConfig) -> _Asked | Skipped:
    arms, skipped = {}, []
    for mode, names in GIVEN.items():
        found = [context.arm(name, 1.0, test="swap") for name in names]
        arm = next((arm for arm in found if not isinstance(arm, Skipped)), None)
        if arm is None:
            skipped.append(found[0])
        else:
            arms[mode] = arm
    if not arms:
        return Skipped("swap", "; ".join(dict.fromkeys(one.reason for one in skipped)))
    pairs = _pairs(context, config)
    if len(pairs) < MIN_CLUSTERS:
        return Skipped(
            "swap", f"inconclusive, about {MIN_CLUSTERS - len(pairs)} more samples with others of their size"
        )
    return _Asked(arms, pairs, config.matrix, skipped)


def _pairs(context: DrawingContext, config: SwapConfig) -> list[Pair]:
    """Choose a donor for each of the first samples; one without two others of its bucket, no duplicates, has none."""
    dataset = context.subject.dataset
    buckets: dict[str, list[str]] = {}
    for key in context.keys:  # content hashes: the first of them are a random sample
        buckets.setdefault(context.rows[key]["bucket"], []).append(key)
    pools = {bucket: keys[:POOL] for bucket, keys in buckets.items()}
    looks: dict[str, np.ndarray] = {}

    def look(key: str) -> np.ndarray:
        if key not in looks:
            looks[key] = unit(np.asarray(dataset.cls(context.rows[key]), np.float64)[None])[0]
        return looks[key]

    pairs = []
    for key in context.keys:
        row, groups, others = context.rows[key], set(), []
        groups.add(group_of(row))
        for other in pools[row["bucket"]]:
            group = group_of(context.rows[other])
            if other != key and (group is None or group not in groups):
                groups.add(group)
                others.append(other)
        if len(others) >= 2:
            likeness = [float(look(key) @ look(other)) for other in others]
            pairs.append(choose_donor(key, others, likeness, min(config.candidates, len(others))))
        if len(pairs) == config.prompts:
            break
    return pairs


def _label(mode: str, column: int | None = None) -> str:
    """Return the condition of swapped pictures in samples.parquet."""
    return f"swap/{mode}" + ("" if column is None else f"/{column}")


def _name(name: str, mode: str, space: str | None = None) -> str:
    return f"swap/{name}{'_pixels' if space == 'feature_pixels' else ''}{'' if mode == 'both' else f'/{mode}'}"


class _SwappedPictures:
    """The pictures of one mode, and beside each the one from the same noise with the sample's own features."""

    def __init__(self, rows: Rows, asked: _Asked, mode: str):
        self.pairs = {pair.key: pair for pair in asked.pairs}
        own = {(row["key"], row["seed"]): row for row in rows.select(MODEL, asked.arms[mode].name)}
        self.swapped = rows.select(MODEL, _label(mode))
        self.unswapped = [own[row["key"], row["seed"]] for row in self.swapped]
        self.keys = [row["key"] for row in self.swapped]
        self.clusters = [cluster_of(row) for row in self.swapped]


class _TowardDonor:
    """The nearness of one mode's pictures to the candidates' images, in one space."""

    def __init__(self, rows: Rows, drawn: _SwappedPictures, space: str):
        self._drawn, self._space = drawn, space
        keys = sorted({key for pair in drawn.pairs.values() for key in pair.candidates})
        self._images = dict(zip(keys, self._points([rows.real[key] for key in keys])))
        self._swapped, self._unswapped = self._points(drawn.swapped), self._points(drawn.unswapped)

    def metrics(self, names: Sequence[str], settings: Mapping[str, Any]) -> list[Metric]:
        """Return ``gain`` and ``identified`` under these names."""
        keys, pairs = self._drawn.keys, [self._drawn.pairs[key] for key in self._drawn.keys]
        donors = np.stack([self._images[pair.donor] for pair in pairs])
        before, after = self._similarity(self._unswapped, donors), self._similarity(self._swapped, donors)
        gain = intervals.paired_difference(after, before, self._drawn.clusters)
        most = float(np.mean(self._similarity(donors, donors) - before))
        hits = {
            name: [found == pair.donor for found, pair in zip(self._found(points), pairs)]
            for name, points in (("swapped", self._swapped), ("unswapped", self._unswapped))
        }
        chance = float(np.mean([1 / len(pair.candidates) for pair in pairs]))
        told = {"chance": chance, "unswapped": float(np.mean(hits["unswapped"])), "donor_itself": 1.0}
        share = intervals.proportion(hits["swapped"], [1] * len(keys), self._drawn.clusters)
        return [
            Metric.of(names[0], gain, baselines={"no_swap": 0.0, "donor_itself": most}, settings=settings),
            Metric.of(names[1], share, baselines=told, settings=settings),
        ]

    def nearest(self) -> dict[str, str]:
        """Return the candidate whose image is nearest to each sample's picture from the first noise."""
        found = zip(self._drawn.swapped, self._found(self._swapped))
        return {row["key"]: key for row, key in found if row["seed"] == 0}

    def _points(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return as_points(np.stack([row[self._space] for row in rows]), self._space)

    def _similarity(self, points: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return of each pair (n,) the cosine of the judge's features; on mean colours less the distance."""
        if self._space == "feature":
            return np.einsum("nd,nd->n", points, others)
        return -np.linalg.norm(points - others, axis=1)

    def _found(self, points: np.ndarray) -> list[str]:
        found = []
        for key, point in zip(self._drawn.keys, points):
            candidates = self._drawn.pairs[key].candidates
            distances = [np.linalg.norm(self._images[other] - point) for other in candidates]
            found.append(candidates[int(np.argmin(distances))])
        return found


def _text_kept(
    rows: Rows, drawn: _SwappedPictures, mode: str, settings: Mapping[str, Any], reason: str | None
) -> Metric:
    """Return the share of attributes as the text says, beside the share of those as in the donor's image."""
    name = _name("text_kept", mode)
    if reason:
        return Metric(name, None, n=len(drawn.pairs), settings=settings, reason=reason)
    right = [_right(row, row) for row in drawn.swapped]
    donors = [rows.real[drawn.pairs[key].donor] for key in drawn.keys]
    real = rows.select(REAL, "real")
    near = [row for row in rows.without_skill["nearest_train"] if row["key"] in drawn.pairs]
    nearest = {"nearest_train": float(np.mean([_right(row, row) for row in near])) / len(ATTRIBUTES)} if near else {}
    baselines = nearest | {
        "chance": float(np.mean([CHANCE[attribute] for attribute in ATTRIBUTES])),
        "unswapped": float(np.mean([_right(row, row) for row in drawn.unswapped])) / len(ATTRIBUTES),
        "donor": float(np.mean([_right(row, donor) for row, donor in zip(drawn.swapped, donors)])) / len(ATTRIBUTES),
        "judge_on_real": float(np.mean([_right(row, row) for row in real])) / len(ATTRIBUTES),
    }
    interval = intervals.proportion(right, [len(ATTRIBUTES)] * len(right), drawn.clusters)
    return Metric.of(name, interval, baselines=baselines, settings=settings)


def _right(row: Mapping[str, Any], truth: Mapping[str, Any]) -> int:
    """Return how many attributes of a picture were judged to be what they are in ``truth``."""
    return sum(row[f"{name}_judged"] == truth[f"{name}_true"] for name in ATTRIBUTES)


def _similarity_kept(
    rows: Rows, drawn: _SwappedPictures, mode: str, settings: Mapping[str, Any], reason: str | None
) -> Metric:
    """Return the likeness of the swapped pictures to the sample's own image."""
    name = _name("similarity_kept", mode)
    if reason:
        return Metric(name, None, n=len(drawn.pairs), settings=settings, reason=reason)
    others = {"unswapped": drawn.unswapped, **rows.without_skill}
    means = {label: average(own, lambda row: row["dino_similarity"]) for label, own in others.items()}
    interval = intervals.mean([row["dino_similarity"] for row in drawn.swapped], drawn.clusters)
    baselines = {label: mean for label, mean in means.items() if mean is not None}
    return Metric.of(name, interval, baselines=baselines, settings=settings)


def _matrix(context: DrawingContext, asked: _Asked) -> tuple[str, list[str]]:
    """Return the mode of the matrix and its samples: the first of the bucket that most of the samples are of."""
    buckets: dict[str, list[str]] = {}
    for pair in asked.pairs:
        buckets.setdefault(context.rows[pair.key]["bucket"], []).append(pair.key)
    largest = max(sorted(buckets), key=lambda bucket: len(buckets[bucket]))
    return next(iter(asked.arms)), buckets[largest][: asked.matrix]


def _extras(context: DrawingContext, asked: _Asked, nearest: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the report shows: the matrix and some examples, whose pictures are kept."""
    mode, keys = _matrix(context, asked)
    cells = [
        [
            {"condition": asked.arms[mode].name if key == donor else _label(mode, column), "key": key, "seed": 0}
            for column, donor in enumerate(keys)
        ]
        for key in keys
    ]
    for cell in (cell for row in cells for cell in row):
        context.show(MODEL, **cell)
    examples = []
    for pair in asked.pairs[:EXAMPLES]:
        for own in asked.arms:
            context.show(MODEL, _label(own), pair.key, 0)
            context.show(MODEL, asked.arms[own].name, pair.key, 0)
        examples.append(
            {
                "key": pair.key,
                "seed": 0,
                "donor": pair.donor,
                "candidates": list(pair.candidates),
                "pictures": {own: _label(own) for own in asked.arms},
                "nearest": {own: found[pair.key] for own, found in nearest.items() if pair.key in found},
            }
        )
    for key in {*keys, *(key for pair in asked.pairs[:EXAMPLES] for key in (pair.key, pair.donor))}:
        context.show(REAL, "real", key)
    return {
        "modes": [
            {"mode": own, "condition": _label(own), "unswapped": arm.name, "given": arm.name}
            for own, arm in asked.arms.items()
        ],
        "candidates": asked.counts["candidates"],
        "matrix": {"mode": mode, "keys": keys, "cells": cells},
        "examples": examples,
    }


def matrix_and_examples(page: Any) -> dict[str, Any] | None:
    """Return the matrix of texts and DINO features, and for each mode whose features a picture shows."""
    extra = page.extras("swap")
    if not extra:
        return None
    matrix = extra["matrix"]
    result: dict[str, Any] = {"candidates": extra["candidates"], "matrix": None, "examples": []}
    if matrix:
        keys = matrix["keys"]
        rows = [
            {
                "caption": page.caption(key),
                "real": page.real(key),
                "cells": [
                    page.drawn(one["condition"], one["key"], one["seed"], "") | {"own": place == column}
                    for column, one in enumerate(cells)
                ],
            }
            for place, (key, cells) in enumerate(zip(keys, matrix["cells"]))
        ]
        result["matrix"] = {"mode": MODE_NAMES.get(matrix["mode"], matrix["mode"]), "rows": rows}
    unswapped = {mode["mode"]: mode["unswapped"] for mode in extra["modes"]}
    for example in extra["examples"]:
        key, seed, donor = example["key"], example["seed"], example["donor"]
        pictures = [page.real(key, "real", "gives the text"), page.real(donor, "donor", "gives DINO")]
        before = next((unswapped[mode] for mode in example["pictures"] if mode in unswapped), None)
        pictures += [page.drawn(before, key, seed, "unswapped", "own DINO")] if before else []
        for mode, condition in example["pictures"].items():
            taken = example.get("nearest", {}).get(mode, {})
            right = sum(found == donor for found in taken.values())
            note = f"donor told in {right} of {len(taken)} spaces" if taken else ""
            pictures.append(page.drawn(condition, key, seed, f"donor's {MODE_NAMES.get(mode, mode)}", note))
        result["examples"].append({"caption": page.caption(key), "pictures": pictures})
    return result


TEST = SuiteTest(
    name="swap",
    title="DINO swap",
    pictures=pictures,
    summarise=summarise,
    config=SwapConfig,
    families={
        "swap/gain": "Likeness gained toward the donor",
        "swap/identified": "Donor identified",
        "swap/text_kept": "Text kept under the swap",
        "swap/similarity_kept": "Likeness to the own image kept",
        "swap/lpips": "LPIPS to the own image under the swap",
    },
    default_part=MODE_NAMES["both"],
    minimised={"swap": "judge", "swap/text_kept": "", "swap/lpips": "lpips"},
    roles={
        "swap/identified": (("chance", "unswapped"), ("donor_itself",)),
        "swap/lpips": (None, ("unswapped",)),
    },
    parts={mode: MODE_NAMES[mode] for mode in ("cls", "patches")},
    terms=(
        (
            "DINO swap",
            "The text of one sample with the image features of another. “Donor identified”: among K real images, "
            "chance 1 / K.",
        ),
    ),
    section=Section(
        "DINO swap",
        "One sample's text with the DINO features of another, from the sample's own noise: what changes along a row "
        "comes from the image features, along a column from the text. Framed: a sample with its own features.",
        matrix_and_examples,
        "swap.html",
    ),
)
