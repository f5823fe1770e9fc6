"""Does a picture follow an edit of its text, and only there? Edited captions from the noise of the unedited picture.

Any other words change a picture a little, so an effect is held against a paraphrase that means the same: the null
edit. Where the new words name a colour, it is looked for at the garment on figures, and may be asked of CLIP on
photographs. What is outside of the garment should stay as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.edits import Edit, EditType, choose, of_figure
from evaluate.drawing.pictures import Picture
from evaluate.drawing.vocabulary import VOCABULARY, ChangeType, load_pairs
from evaluate.metrics.clip import NO_PROBE
from evaluate.metrics.colours import CHANCE
from evaluate.metrics.distances import SPACE_NAMES, SPACES, as_points
from evaluate.metrics.garments import UNCHANGED, garment, unchanged
from evaluate.metrics.joints import ALPHA, CONFIDENCE, PARTS, Box, hits
from evaluate.records import BASELINE, MODEL, REAL, Metric, Skipped, degenerate_reason
from evaluate.statistics import intervals
from evaluate.suite.declaration import Section, SuiteTest
from evaluate.suite.reconstruction import lpips_to_own
from nanodit.config import Config, Place
from nanodit.files import sha256_bytes, sha256_file

GIVEN = ("text", "text+pose", "all")  # the first of these that was trained
NULL: EditType = "paraphrase"
EXAMPLES = 8  # samples whose pictures are kept for the report
SHOWN = 12  # pairs on the page, of all types
Row = Mapping[str, Any]
Name = tuple[str, int]  # key and seed of a picture


class EditConfig(Config):
    """The number of captions edited, and the ways in which they are beside the paraphrase."""

    prompts: int = Field(default=64, gt=0)
    types: list[ChangeType] = Field(default=["attribute", "opposite"], min_length=1)
    edits: Place | None = None  # YAML of one's own pairs, brunette: blonde; they go before the built-in vocabulary


def pictures(context: DrawingContext, config: EditConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for some samples with their own text, with each edit of it, and with the paraphrase."""
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], [asked]
    arm, wanted = asked.arm, []
    for seed in range(context.config.seeds):
        for key in asked.keys:
            own = {type: edits[key] for type, edits in asked.edits.items() if key in edits}
            if own:
                wanted.append(Picture(key, arm.name, arm.subset, arm.guidance, seed))
            wanted += [
                Picture(key, _label(type), arm.subset, arm.guidance, seed, text=edit.text) for type, edit in own.items()
            ]
    return wanted, [
        Skipped(f"edit/{type}", f"an edit of this type applies to none of {len(asked.keys)} captions")
        for type, edits in asked.edits.items()
        if not edits
    ]


def summarise(rows: Rows, context: DrawingContext, config: EditConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return ``edit/NAME`` of another attribute, ``edit/NAME/opposite`` of the opposite; ``_pixels`` on mean colours.

    ``effect``: distance to the unedited picture less that of the paraphrase's picture. ``direction``: share of figures
    whose garment has the new colour; ``direction_gain``: less the share of the unedited pictures; ``direction_probe``:
    how much more probable CLIP finds the new words than the old (:mod:`evaluate.metrics.clip`). ``preserved``: share of
    cells of the grid outside of the garment that stay as they were; ``pose_kept``: share of joints that do. ``lpips``:
    perceptual distance to the sample's own image, beside that of the unedited picture.
    """
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], []  # named with the pictures
    spaces = SPACES if context.judge else SPACES[1:]
    skipped = [] if context.judge else [Skipped("edit/effect", context.no_judge)]
    if context.examiner.no_lpips:
        skipped.append(Skipped("edit/lpips", context.examiner.no_lpips))
    drawn = _EditedPictures(rows, asked)
    metrics: list[Metric] = []
    for type, edits in asked.edits.items():
        if type == NULL or not edits:
            continue
        settings = context.settings(asked.arm.name, asked.arm.guidance, edit=type, **asked.counts(type))
        test = _EditMetrics(type, drawn, settings, rows)
        for space in spaces:
            metrics.append(test.effect(space, context.judged if space == "feature" else {}))
        if type == "attribute":
            found, left_out = _attribute_metrics(test, context)
            metrics += found
            skipped += left_out
        if context.examiner.lpips_label:
            metrics.append(test.lpips(context.lpips))
        if context.probe is not None:
            metrics.append(test.probed(context.probe))
    if context.no_probe and not (context.figures and context.no_probe == NO_PROBE):  # figures are judged at the garment
        skipped.append(Skipped("edit/direction_probe", context.no_probe))
    context.extras["edit"] = _extras(context, asked, drawn, spaces)
    return metrics, skipped


def _attribute_metrics(test: _EditMetrics, context: DrawingContext) -> tuple[list[Metric], list[Skipped]]:
    """Measure where the new colour is, and what else has changed."""
    if not context.figures:
        why = "the dataset has no truth.parquet; only built-in figures have colours at known places"
        return [test.preserved(None), *test.pose_kept()], [Skipped("edit/direction", why)]
    if context.no_detector:
        return [test.preserved(None)], [Skipped("edit/direction", context.no_detector)]
    return [*test.direction(), test.preserved(garment), *test.pose_kept()], []


@dataclass(frozen=True)
class _Asked:
    """The pictures of the test: how they are given, the samples, and by type the edit of each sample that has one."""

    arm: DrawingArm
    keys: list[str]
    edits: dict[EditType, dict[str, Edit]]
    words: dict[str, str]  # hashes of the vocabulary and of the user's own pairs, as far as they say what is edited

    def counts(self, type: EditType) -> dict[str, Any]:
        """Return to how many captions an edit applies, and by whose words, for the settings."""
        return self.words | {
            "captions": len(self.keys),
            "edited": len(self.edits[type]),
            "null_edited": len(self.edits[NULL]),
        }


def _ask(context: DrawingContext, config: EditConfig) -> _Asked | Skipped:
    arms = [context.arm(name, test="edit") for name in GIVEN]
    arm = next((arm for arm in arms if not isinstance(arm, Skipped)), None)
    if arm is None:
        return Skipped("edit", arms[0].reason)
    if reason := context.texts.unavailable:
        return Skipped("edit", reason)
    keys = context.keys[: config.prompts]
    types: list[EditType] = [*dict.fromkeys(config.types), NULL]
    own = load_pairs(config.edits) if config.edits else ()
    edits = {type: {key: choose(context.rows[key]["caption"], type, key, own) for key in keys} for type in types}
    found = {type: {key: edit for key, edit in own.items() if edit is not None} for type, own in edits.items()}
    words = {"own_pairs": sha256_file(config.edits)[:16]} if config.edits else {}
    if not all(of_figure(context.rows[key]["caption"]) for key in keys):
        words["vocabulary"] = sha256_bytes(repr(VOCABULARY).encode())[:16]
    return _Asked(arm, keys, found, words)


def _label(type: EditType) -> str:
    """Return the condition of edited pictures in samples.parquet."""
    return f"edit/{type}"


class _EditedPictures:
    """The unedited pictures by key and seed, and by type the edited ones."""

    def __init__(self, rows: Rows, asked: _Asked):
        keys = set(asked.keys)
        self.edits = asked.edits
        self.unedited = _named(row for row in rows.select(MODEL, asked.arm.name) if row["key"] in keys)
        self.edited = {type: _named(rows.select(MODEL, _label(type))) for type in asked.edits}

    def distance(self, type: EditType, name: Name, space: str) -> float:
        """Return the distance between an edited picture and the unedited one."""
        pair = [own[name][space] for own in (self.edited[type], self.unedited)]
        one, other = as_points(np.stack(pair), space)
        return float(np.linalg.norm(one - other))


def _named(rows: Any) -> dict[Name, Row]:
    return {(row["key"], row["seed"]): row for row in rows}


class _EditMetrics:
    """The metrics of one type of edit."""

    def __init__(self, type: EditType, drawn: _EditedPictures, settings: Row, rows: Rows):
        self._type, self._drawn, self._settings, self._rows = type, drawn, settings, rows
        self._edited, self._null, self._unedited = drawn.edited[type], drawn.edited[NULL], drawn.unedited

    def effect(self, space: str, judged: Row) -> Metric:
        """Return how much further an edit moves a picture than the paraphrase of the same caption does."""
        names = [name for name in self._edited if name in self._null]
        settings = {**self._settings, "space": space, "null": NULL, **judged}
        name = self._name("effect", space)
        if reason := self._unfit(names, "caption has both an edit of this type and a paraphrase"):
            return Metric(name, None, n=_images(names), settings=settings, reason=reason)
        moved, null = ([self._drawn.distance(type, one, space) for one in names] for type in (self._type, NULL))
        baselines = {"null_edit": 0.0}
        if pairs := self._random_pairs(space):
            baselines["random_pair"] = float(np.mean(pairs) - np.mean(null))
        interval = intervals.paired_difference(moved, null, self._clusters(names))
        return Metric.of(name, interval, baselines=baselines, settings=settings)

    def direction(self) -> list[Metric]:
        """Return how often the garment has the new colour, and how much more often than in the unedited picture."""
        names = [name for name in self._edited if self._edit(name).attribute]
        metrics = {name: self._name(name) for name in ("direction", "direction_gain")}
        if reason := self._unfit(names, "caption names a colour that can be judged"):
            common = {"n": _images(names), "settings": self._settings, "reason": reason}
            return [Metric(name, None, **common) for name in metrics.values()]
        edited, unedited = ([self._has_new_colour(row[name], name) for name in names] for row in self._pictures)
        attributes = [self._edit(name).attribute for name in names]
        real = self._rows.select(REAL, "real")
        right = {one: np.mean([row[f"{one}_judged"] == row[f"{one}_true"] for row in real]) for one in set(attributes)}
        baselines = {
            "chance": float(np.mean([CHANCE[one] for one in attributes])),
            "unedited": float(np.mean(unedited)),
            "judge_on_real": float(np.mean([right[one] for one in attributes])),
        }
        keys = self._clusters(names)
        share = intervals.proportion(edited, [1] * len(names), keys)
        gain = intervals.paired_difference(edited, unedited, keys)
        return [
            Metric.of(metrics["direction"], share, baselines=baselines, settings=self._settings),
            Metric.of(metrics["direction_gain"], gain, baselines={"no_edit": 0.0}, settings=self._settings),
        ]

    def preserved(self, region: Any) -> Metric:
        """Return the share of cells that stay as they were, outside of the ``region`` of the garment if there is one.

        Left out: pictures without a figure in the unedited one, or with no cell that is certainly outside.
        """
        outside = {name: self._outside(name, region) for name in self._edited}
        names = [name for name, cells in outside.items() if cells is not None and cells.any()]
        where = "outside of the garment" if region else "the whole picture"
        settings = self._settings | {"cells": where, "unchanged_below": UNCHANGED}
        name = self._name("preserved")
        if reason := self._unfit(names, "unedited picture has cells that are certainly outside of the garment"):
            return Metric(name, None, n=_images(names), settings=settings, reason=reason)
        kept = [self._kept(self._edited[one], one, outside[one]) for one in names]
        paraphrased = [one for one in names if one in self._null]
        baselines = {}
        if paraphrased:
            null = [self._kept(self._null[one], one, outside[one]) for one in paraphrased]
            baselines["null_edit"] = float(np.mean(null))
        if real := self._real_pairs():
            shares = [unchanged(row["feature_pixels"], other["feature_pixels"]).mean() for row, other in real]
            baselines["random_pair"] = float(np.mean(shares))
        interval = intervals.mean(kept, self._clusters(names))
        return Metric.of(name, interval, baselines=baselines, settings=settings)

    def pose_kept(self) -> list[Metric]:
        """Return the share of the unedited picture's joints found again in their place; empty without a detector."""
        if not any(row["figure_found"] is not None for row in self._unedited.values()):
            return []
        names = [name for name in self._edited if self._unedited[name]["joints"] is not None]
        settings = self._settings | {"alpha": ALPHA, "confidence": CONFIDENCE}
        name = self._name("pose_kept")
        if reason := self._unfit(names, "unedited picture has a figure in it"):
            return [Metric(name, None, n=_images(names), settings=settings, reason=reason)]
        counts = [_joints_kept(self._unedited[one], self._edited[one]) for one in names]
        null = [_joints_kept(self._unedited[one], self._null[one]) for one in names if one in self._null]
        baselines = {}
        if total := sum(joints for _, joints in null):
            baselines["null_edit"] = sum(stayed for stayed, _ in null) / total
        stayed, asked = zip(*counts)
        if not any(asked):
            return [
                Metric(name, None, n=_images(names), settings=settings, reason="no joint was found with confidence")
            ]
        return [
            Metric.of(
                name,
                intervals.proportion(stayed, asked, self._clusters(names)),
                baselines=baselines,
                settings=settings,
            )
        ]

    def lpips(self, measured_with: Row) -> Metric:
        """Return the perceptual distance of the edited pictures to the samples' own images."""
        others = {"unedited": self._unedited, "null_edit": self._null}
        baselines = {label: [own[name] for name in self._edited if name in own] for label, own in others.items()}
        baselines |= {**self._rows.without_skill, "round_trip": self._rows.select(BASELINE, "round_trip")}
        reason = self._unfit(list(self._edited), "caption has an edit of this type")
        return lpips_to_own(
            self._name("lpips"), list(self._edited.values()), baselines, {**self._settings, **measured_with}, reason
        )

    def probed(self, probe: Any) -> Metric:
        """Return how much more probable the edit makes the new words than the old ones to CLIP."""
        names = [name for name in self._edited if self._edited[name]["feature_probe"] is not None]
        settings = self._settings | {"probe": probe.label}
        name = self._name("direction_probe")
        if reason := self._unfit(names, "picture was seen by the probe"):
            return Metric(name, None, n=_images(names), settings=settings, reason=reason)
        phrases = [self._edit(one).phrases for one in names]
        settings["phrases_cut"] = probe.cut(list(dict.fromkeys(phrase for pair in phrases for phrase in pair)))
        after, before = (
            probe.preference(np.stack([rows[one]["feature_probe"] for one in names]), phrases)
            for rows in self._pictures
        )
        interval = intervals.paired_difference(after, before, self._clusters(names))
        return Metric.of(name, interval, baselines={"no_edit": 0.0}, settings=settings)

    @property
    def _pictures(self) -> tuple[dict[Name, Row], dict[Name, Row]]:
        return self._edited, self._unedited

    def _clusters(self, names: Sequence[Name]) -> list[str]:
        return [self._rows.clusters[key] for key, _ in names]

    def _name(self, name: str, space: str | None = None) -> str:
        end = "" if self._type == "attribute" else f"/{self._type}"
        return f"edit/{name}{'_pixels' if space == 'feature_pixels' else ''}{end}"

    def _edit(self, name: Name) -> Edit:
        return self._drawn.edits[self._type][name[0]]

    def _unfit(self, names: Sequence[Name], need: str) -> str | None:
        """Return why these pictures carry no number, or None."""
        if not names:
            return f"no {need}"
        rows = [own[name] for own in (*self._pictures, self._null) for name in self._edited if name in own]
        return degenerate_reason(rows)

    def _has_new_colour(self, row: Row, name: Name) -> bool:
        edit = self._edit(name)
        return row[f"{edit.attribute}_judged"] == edit.words[0][1].lower()

    def _outside(self, name: Name, region: Any) -> np.ndarray | None:
        """Return the cells that should stay as they were."""
        row = self._unedited[name]
        if row["degenerate"]:
            return np.ones((1, 1), bool)  # no number comes of it
        side = math.isqrt(len(row["feature_pixels"]) // 3)
        attribute = self._edit(name).attribute
        if region is None or attribute is None:
            return np.ones((side, side), bool)
        if row["joints"] is None:
            return None
        inside = region(_body(row), attribute, row["width"], row["height"], side)
        return None if inside is None else ~inside

    def _kept(self, row: Row, name: Name, cells: np.ndarray) -> float:
        return float(unchanged(self._unedited[name]["feature_pixels"], row["feature_pixels"])[cells].mean())

    def _real_pairs(self) -> list[tuple[Row, Row]]:
        """Return Real images and others in their place."""
        keys = {key for key, _ in self._edited}
        others = [row for row in self._rows.select(BASELINE, "random_pair") if row["key"] in keys]
        return [(self._rows.real[row["key"]], row) for row in others]

    def _random_pairs(self, space: str) -> list[float]:
        """Return the distances between a real image and another in its place."""
        pairs = [as_points(np.stack([row[space], other[space]]), space) for row, other in self._real_pairs()]
        return [float(np.linalg.norm(one - other)) for one, other in pairs]


def _joints_kept(before: Row, after: Row) -> tuple[int, int]:
    """Return how many of the unedited picture's body joints are found again in their place, and how many it has."""
    joints, found = (np.zeros((17, 3)) if row["joints"] is None else _body(row) for row in (before, after))
    there = joints[:, 2] >= CONFIDENCE
    stayed = there & hits(found, joints, Box.around(joints[there, :2]).longer_side)
    return int(stayed.sum()), int(there.sum())


def _body(row: Row) -> np.ndarray:
    return np.reshape(row["joints"], (-1, 3))[PARTS["body"]]


def _keys(names: Sequence[Name]) -> list[str]:
    return [key for key, _ in names]


def _images(names: Sequence[Name]) -> int:
    return len(set(_keys(names)))


def _extras(context: DrawingContext, asked: _Asked, drawn: _EditedPictures, spaces: Sequence[str]) -> dict[str, Any]:
    """Return what the report shows: counts, mean distances, and some pairs of pictures, which are kept."""
    degenerate = {name for own in (drawn.unedited, *drawn.edited.values()) for name in own if own[name]["degenerate"]}

    def distances(type: EditType, name: Name) -> dict[str, float] | None:
        if name not in drawn.edited[type] or name in degenerate:
            return None
        return {space: drawn.distance(type, name, space) for space in spaces}

    means: dict[str, dict[str, float]] = {}
    for space in spaces:
        own = {
            type: [drawn.distance(type, name, space) for name in edited if name not in degenerate]
            for type, edited in drawn.edited.items()
        }
        means[space] = {type: float(np.mean(values)) for type, values in own.items() if values}
    pairs = []
    for key in asked.keys[:EXAMPLES]:
        for type, edits in asked.edits.items():
            if (edit := edits.get(key)) is None:
                continue
            name = key, 0
            context.show(MODEL, asked.arm.name, *name)
            context.show(MODEL, _label(type), *name)
            pairs.append(
                {
                    "key": key,
                    "seed": 0,
                    "type": type,
                    "kind": edit.kind,
                    "condition": _label(type),
                    "caption": edit.caption,
                    "text": edit.text,
                    "diff": [list(piece) for piece in edit.diff],
                    "words": [list(pair) for pair in edit.words],
                    "attribute": edit.attribute,
                    "judged": _judged(edit, drawn.unedited[name], drawn.edited[type][name], context),
                    "distance": distances(type, name),
                    "null_distance": distances(NULL, name),
                }
            )
    counts = {type: {"edited": len(edits), "none": len(asked.keys) - len(edits)} for type, edits in asked.edits.items()}
    return {
        "condition": asked.arm.name,
        "null": _label(NULL),
        "counts": counts,
        "distances": means,
        "pairs": pairs,
    }


def _judged(edit: Edit, unedited: Row, edited: Row, context: DrawingContext) -> dict[str, str | None] | None:
    if not context.figures or context.no_detector or edit.attribute is None:
        return None
    column = f"{edit.attribute}_judged"
    return {"unedited": unedited[column], "edited": edited[column]}


def pairs_shown(page: Any) -> dict[str, Any] | None:
    """Return pairs of pictures before and after an edit of the text, with the words that differ."""
    extra = page.extras("edit")
    if not extra:
        return None
    # of every type in turn, in the order in which the test chose them
    by_type: dict[str, list[dict[str, Any]]] = {}
    for pair in extra["pairs"]:
        by_type.setdefault(pair["type"], []).append(pair)
    room = max(1, SHOWN // max(1, len(by_type)))
    pairs = []
    for pair in (one for own in by_type.values() for one in own[:room]):
        judged = pair["judged"] or {}
        seen = {side: f"{pair['attribute']}: {judged[side] or 'not found'}" for side in judged}
        sides = {"unedited": extra["condition"], "edited": pair["condition"]}
        pictures = [
            page.drawn(condition, pair["key"], pair["seed"], side, seen.get(side, ""))
            for side, condition in sides.items()
        ]
        distances = [
            {"space": SPACE_NAMES.get(space, space), "value": value, "null": (pair["null_distance"] or {}).get(space)}
            for space, value in sorted((pair["distance"] or {}).items())  # none of a degenerate picture
        ]
        diff = [(kind, page.shorten(text)) for kind, text in pair["diff"]]
        pairs.append(
            {"type": pair.get("kind") or pair["type"], "pictures": pictures, "diff": diff, "distances": distances}
        )
    counts = [{"type": name, **count} for name, count in extra["counts"].items()]
    return {"condition": page.words(extra["condition"]), "pairs": pairs, "counts": counts, "total": len(extra["pairs"])}


TEST = SuiteTest(
    name="edit",
    title="Text edits",
    pictures=pictures,
    summarise=summarise,
    config=EditConfig,
    families={
        "edit/effect": "Effect beyond the null edit",
        "edit/direction": "Edited colour is there",
        "edit/direction_gain": "Edited colour gained",
        "edit/direction_probe": "Shift of the probe toward the edit",
        "edit/preserved": "Kept outside of the edit",
        "edit/pose_kept": "Joints kept under the edit",
        "edit/lpips": "LPIPS to the own image under the edit",
    },
    default_part="another attribute",
    parts={"opposite": "the opposite"},
    minimised={"edit/effect": "judge", "edit/lpips": "lpips"},
    roles={
        "edit/effect": (("null_edit",), ()),
        "edit/direction_": (("no_edit",), ()),
        "edit/direction": (("chance", "unedited"), ("judge_on_real",)),
        "edit/preserved": ((), ("null_edit",)),  # no floor: whoever ignores the text keeps everything
        "edit/pose_kept": ((), ("null_edit",)),
        "edit/lpips": (None, ("unedited",)),
    },
    terms=(
        (
            "Text edits",
            "The same noise under an edited caption. An edit's effect is the distance that it moves the picture less "
            "that of a paraphrase, the null edit.",
        ),
    ),
    section=Section(
        "Text edits",
        "The same noise before and after an edit of the caption on word boundaries. A paraphrase is the null edit: "
        "what it changes is what any change of words does.",
        pairs_shown,
        "edit.html",
    ),
)
