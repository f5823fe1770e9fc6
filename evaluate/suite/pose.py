"""Are the joints where they were asked for? PCK and OKS of the joints re-detected in the picture drawn.

By part of the body, between pictures of no model (floor) and the detector on the real image (ceiling). A pose and
its mirror image tell whether the model looks at it: a picture has to meet the pose that it was given better than the
mirror image of that, and a picture drawn from the mirror image has to miss the pose itself. Pictures without a person,
or with several, are counted; a person who was not found misses all joints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.joints import ALPHA, AREA_OF_BOX, CONFIDENCE, HEADLINE, PARTS, Joints
from evaluate.records import MODEL, REAL, Metric, Skipped, degenerate_reason, select
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval, more_samples
from evaluate.suite.declaration import Section, SuiteTest, Values
from evaluate.suite.gain import gain, undrawn
from nanodit.config import Config
from nanodit.keypoints import BONES
from nanodit.svg import joints_overlay

MIRRORED = "mirrored"  # what follows the name of a condition in that of pictures from the pose's mirror image
CEILING = "detector_on_real"
OVERLAYS = {"worst": 0.0, "median": 0.5, "best": 1.0}  # pictures shown, by their quantile of the body's OKS
# bones of COCO-WholeBody's body and feet; its other joints are drawn as specks
LINKS = (*BONES, (15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22))
NOBODY_ASKED = "no sample has a pose to ask for"


class PoseTestConfig(Config):
    """The pictures drawn for this test alone."""

    conditions: list[str] = Field(default=["pose"])  # without guidance, beside the configured ones
    mirrored: int = Field(default=64, ge=0)  # samples drawn from the mirror image of their pose too, one noise each


def pictures(context: DrawingContext, config: PoseTestConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for every sample under each condition with a pose, and some from the mirror image of their pose."""
    drawn, skipped = context.configured()
    if context.no_detector:
        return drawn, skipped
    arms, left_out = _arms(context, config)
    drawn += [picture for arm in arms if arm not in context.arms for picture in context.of_all(arm)]
    return drawn + _mirrored(context, arms, config.mirrored), skipped + left_out


def _arms(context: DrawingContext, config: PoseTestConfig) -> tuple[list[DrawingArm], list[Skipped]]:
    """Return the configured conditions with a pose, then those of this test."""
    arms = {arm.name: arm for arm in context.arms if "pose" in arm.subset}
    skipped = []
    for conditions in config.conditions:
        arm = context.arm(conditions, 1.0, test="pose")
        if isinstance(arm, Skipped):
            skipped.append(arm)
        elif "pose" not in arm.subset:
            skipped.append(Skipped(f"pose/{conditions}", "it gives no pose"))
        else:
            arms.setdefault(arm.name, arm)
    return list(arms.values()), skipped


def _mirrored(context: DrawingContext, arms: Sequence[DrawingArm], count: int) -> list[Picture]:
    """Ask for some samples with a person, given the mirror image of their pose and as little beside it as possible."""
    keys = [key for key in context.keys if context.rows[key]["persons"]][:count]
    arm = min(arms, key=lambda arm: (len(arm.subset), arm.name), default=None)
    return [Picture(key, _turned(arm), arm.subset, arm.guidance, mirrored_pose=True) for key in keys] if arm else []


def _turned(arm: DrawingArm) -> str:
    """Return the label of an arm's pictures from the mirror image of the pose."""
    return f"{arm.name}/{MIRRORED}"


def summarise(rows: Rows, context: DrawingContext, config: PoseTestConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return ``pose_pck/CONDITION`` and ``pose_oks/CONDITION`` of the body, and of its parts behind a further /.

    ``pose_wanted/CONDITION``: see :func:`wanted`.
    ``pose_persons/CONDITION/nobody`` and ``/several``: the share of pictures asked for a person in which so many were
    found. ``pose_mirror/CONDITION``: PCK against the pose given, less that of the same pictures against its mirror
    image. ``pose_mirror/CONDITION/mirrored``: PCK against the pose itself, less that of pictures drawn from its mirror
    image. Both are above zero for a model that looks at the pose. ``pose_gain/CONDITIONS``: what the pose adds to PCK,
    see :func:`evaluate.suite.gain.gain`. Baselines: another sample's joints in their place,
    those found in the mean image and those of the nearest training image (the best of them is the floor), and the
    detector on the real image (ceiling), against the truth where there is one.
    """
    if context.no_detector:
        return [], [Skipped("pose_pck", context.no_detector)]
    arms, _ = _arms(context, config)
    if not arms:
        return [], [Skipped("pose_pck", "no condition with a pose can be drawn")]
    references = rows.without_skill | {CEILING: rows.select(REAL, "real")}
    metrics: list[Metric] = []
    counts, overlays = {}, []
    for arm in arms:
        drawn = PosedPictures(arm.name, rows.select(MODEL, arm.name), references, _settings(context, arm))
        turned = PosedPictures(
            _turned(arm), rows.select(MODEL, _turned(arm)), references, _settings(context, arm, turned=True)
        )
        metrics += [*accuracy(drawn), wanted(drawn), *persons(drawn), margin(drawn)]
        if turned.rows:
            metrics += [*accuracy(turned, [HEADLINE]), *persons(turned), drop(drawn, turned)]
        for one in (drawn, turned):
            if one.rows:
                counts[one.name] = count(one.rows, context.rows)
                overlays += _overlays(one)
    skipped: list[Skipped] = []
    real = PosedPictures(CEILING, [row for row in references[CEILING] if row["target_joints"] is not None], {}, {})
    if real.rows and not real.reason:
        right, asked = _pck(real, PARTS[HEADLINE])
        judged = {**_judged(context), "box": context.examiner.box, "alpha": ALPHA, "joints": HEADLINE}
        hits, joints = np.sum([(0, 0), *map(_score, rows.without_skill["random_pair"])], axis=0)
        marks = {"random_pair": float(hits / joints)} if joints else {}
        marks["ceiling_on_real"] = float(right.sum() / asked.sum())
        gained = gain("pose_gain", "pose", context, rows, _score, marks, **judged)
        metrics, skipped = metrics + gained, undrawn("pose_gain", "pose", gained, context)
    for one in overlays:
        context.show(MODEL, one["condition"], one["key"], one["seed"])
    context.extras["pose"] = {
        "rule": "the worst, the median and the best picture of each condition by the body's OKS, over all noises",
        "box": context.examiner.box,
        "alpha": ALPHA,
        **_judged(context),
        "parts": {name: [part.start, part.stop] for name, part in PARTS.items()},
        "counts": counts,
        "overlays": overlays,
    }
    return metrics, skipped


def _settings(context: DrawingContext, arm: DrawingArm, turned: bool = False) -> dict[str, Any]:
    more = {"pose": MIRRORED, "seeds": 1} if turned else {}
    return context.settings(arm.name, arm.guidance, **_judged(context), box=context.examiner.box, **more)


def _judged(context: DrawingContext) -> dict[str, Any]:
    """Return the settings of what finds the joints."""
    return {"detector": context.detector, "confidence": CONFIDENCE}


@dataclass(frozen=True)
class PosedPictures:
    """The rows of one condition, the rows of all samples that stand for floor and ceiling, and the settings."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    references: Mapping[str, Sequence[Mapping[str, Any]]]
    settings: Mapping[str, Any]

    @cached_property
    def keys(self) -> set[str]:
        """The samples of these pictures."""
        return {row["key"] for row in self.rows}

    @cached_property
    def reason(self) -> str | None:
        """Why these pictures give no number, or None."""
        return degenerate_reason(self.rows) or (None if self.joints.asked.any() else NOBODY_ASKED)

    @cached_property
    def joints(self) -> Joints:
        """Against the pose that was given."""
        return Joints.read(self.rows)

    @cached_property
    def turned(self) -> Joints:
        """Against the mirror image of what was given."""
        return Joints.read(self.rows, mirrored=True)

    @cached_property
    def baselines(self) -> dict[str, PosedPictures]:
        """Floor and ceiling on the same samples, where there are any."""
        members = {
            label: [row for row in rows if row["key"] in self.keys and row["target_joints"] is not None]
            for label, rows in self.references.items()
        }
        return {label: PosedPictures(label, rows, {}, {}) for label, rows in members.items() if rows}

    def metric(
        self, name: str, share: Share, pool: Pool = intervals.proportion, better: str = "higher",
        nothing: str = "none of these was asked for", **settings: Any,
    ) -> Metric:  # fmt: skip
        """Pool a share over these pictures, and over those of the baselines; a reason where there is none.

        ``pool`` is :func:`intervals.ratio` for differences, which may be below zero. ``nothing`` is the reason where
        all pictures together have nothing that a share could be of.
        """
        found = {label: share(other) for label, other in self.baselines.items() if not other.reason}
        baselines = {label: float(tops.sum() / whole) for label, (tops, of) in found.items() if (whole := of.sum())}
        details = {"baselines": baselines, "settings": {**self.settings, **settings}, "better": better}
        tops, of = (np.zeros(1), np.zeros(1)) if self.reason else share(self)
        if not of.any():
            return Metric(name, None, n=len(self.keys), reason=self.reason or nothing, **details)
        metric = Metric.of(name, pool(tops, of, self.joints.clusters), **details)
        if metric.low is None:
            return replace(metric, reason=f"inconclusive, about {MIN_CLUSTERS - metric.n} more samples")
        return metric


Share = Callable[[PosedPictures], tuple[np.ndarray, np.ndarray]]  # of each picture: how much of how much, (n,) and (n,)
Pool = Callable[[np.ndarray, np.ndarray, Sequence[str]], Interval]


def accuracy(drawn: PosedPictures, parts: Sequence[str] = tuple(PARTS)) -> list[Metric]:
    """Return ``pose_pck`` (pooled over joints) and ``pose_oks`` (mean over pictures) of one condition by part."""
    box = drawn.settings["box"]
    scales = {
        "pck": {"alpha": ALPHA, "of": f"longer side of the {box}; of face and hands, of their own joints asked for"},
        "oks": {"sigmas": "COCO-WholeBody", "area": f"{AREA_OF_BOX:g} x that of the {box}"},
    }
    return [
        drawn.metric(
            f"pose_{measure}/{drawn.name}{'' if part == HEADLINE else f'/{part}'}",
            partial(_pck if measure == "pck" else _oks, part=PARTS[part]),
            joints=part,
            **scale,
        )
        for measure, scale in scales.items()
        for part in parts
    ]


def _pck(drawn: PosedPictures, part: slice) -> tuple[np.ndarray, np.ndarray]:
    return drawn.joints.hit[:, part].sum(1), drawn.joints.counted[:, part].sum(1)


def _oks(drawn: PosedPictures, part: slice) -> tuple[np.ndarray, np.ndarray]:
    values = drawn.joints.oks(part)
    there = np.isfinite(values)
    return np.where(there, values, 0), there


def wanted(drawn: PosedPictures) -> Metric:
    """Return ``pose_wanted/CONDITION``: of the body's joints that were found, the share that was asked for and met.

    A limb that nobody asked for costs nothing in PCK; here it does.
    """
    return drawn.metric(
        f"pose_wanted/{drawn.name}", _wanted, joints=HEADLINE, alpha=ALPHA, nothing="no joint was found"
    )


def _wanted(drawn: PosedPictures) -> tuple[np.ndarray, np.ndarray]:
    body, somebody = PARTS[HEADLINE], drawn.joints.asked.any(1)
    return drawn.joints.hit[:, body].sum(1) * somebody, drawn.joints.seen[:, body].sum(1) * somebody


def persons(drawn: PosedPictures) -> list[Metric]:
    """Return ``pose_persons/CONDITION/nobody`` and ``/several``, of the pictures that were asked for a person."""
    return [
        drawn.metric(f"pose_persons/{drawn.name}/{label}", partial(_share, few=few, many=many), better="lower")
        for label, few, many in (("nobody", 0, 0), ("several", 2, np.inf))
    ]


def _share(drawn: PosedPictures, few: float, many: float) -> tuple[np.ndarray, np.ndarray]:
    """Count the pictures in which ``few`` to ``many`` were found, of those asked for a person and looked at."""
    looked = drawn.joints.asked.any(1) & [row["persons"] is not None for row in drawn.rows]
    return looked & [few <= (row["persons"] or 0) <= many for row in drawn.rows], looked


def margin(drawn: PosedPictures) -> Metric:
    """Return ``pose_mirror/CONDITION``: PCK against the pose given less that against its mirror image."""
    return _clear(drawn.metric(f"pose_mirror/{drawn.name}", _margin, intervals.ratio, joints=HEADLINE, alpha=ALPHA))


def _margin(drawn: PosedPictures) -> tuple[np.ndarray, np.ndarray]:
    body = PARTS[HEADLINE]
    gained = drawn.joints.hit[:, body].sum(1) - drawn.turned.hit[:, body].sum(1)
    return gained, drawn.joints.asked[:, body].sum(1)


def drop(straight: PosedPictures, turned: PosedPictures) -> Metric:
    """Return ``pose_mirror/CONDITION/mirrored``: PCK against the pose, less that of pictures from its mirror image.

    The same samples and noises, in pairs.
    """
    names = {(row["key"], row["seed"]) for row in turned.rows}
    rows = [row for row in straight.rows if (row["key"], row["seed"]) in names]
    pairs = PosedPictures(turned.name, sorted(rows, key=_name), {}, turned.settings)
    other = replace(turned, rows=sorted(turned.rows, key=_name), references={})

    def lost(pairs: PosedPictures) -> tuple[np.ndarray, np.ndarray]:
        body = PARTS[HEADLINE]
        return pairs.joints.hit[:, body].sum(1) - other.turned.hit[:, body].sum(1), pairs.joints.asked[:, body].sum(1)

    one = other if other.reason else pairs  # either without a number leaves none
    metric = one.metric(f"pose_mirror/{turned.name}", lost, intervals.ratio, joints=HEADLINE, alpha=ALPHA)
    return _clear(replace(metric, baselines={"pose_ignored": 0.0}))


def _clear(metric: Metric) -> Metric:
    """Say of a difference that should be above zero, where it may be nothing, how many samples would tell."""
    if metric.low is None or metric.value <= 0:
        return metric
    more = more_samples(Interval(metric.value, metric.low, metric.high, metric.n))
    return metric if more is None else replace(metric, reason=f"inconclusive, about {more} more samples")


def _name(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["key"], row["seed"]


def count(rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Count how many pictures of one condition were asked for a person, and what was found: every picture is in it.

    ``sources`` are the index rows by key: how many people prep found in the image whose pose was given.
    """
    seen = [row for row in rows if not row["degenerate"]]
    joints = Joints.read(seen)
    asked = joints.asked.any(1)
    wanted = [row for row, there in zip(seen, asked) if there]
    unasked = [row for row, there in zip(seen, asked) if not there]
    return {
        "pictures": len(rows),
        "degenerate": len(rows) - len(seen),
        "asked": len(wanted),
        "nobody_asked": len(unasked),
        "several_in_source": sum(sources[row["key"]]["persons"] > 1 for row in wanted),
        "nobody_found": sum(row["joints"] is None for row in wanted),
        "several_found": sum((row["persons"] or 0) > 1 for row in wanted),
        "found_unasked": sum(row["joints"] is not None for row in unasked),
        "outside": int(joints.outside.sum()),
    }


def _overlays(drawn: PosedPictures) -> list[dict[str, Any]]:
    """Return the joints asked for and found in the pictures at OVERLAYS of OKS, ties in the order of keys."""
    if drawn.reason:
        return []
    values = drawn.joints.oks(PARTS[HEADLINE])
    order = sorted(np.flatnonzero(np.isfinite(values)), key=lambda place: (values[place], _name(drawn.rows[place])))
    overlays = []
    for label, quantile in OVERLAYS.items() if order else ():
        place = order[round(quantile * (len(order) - 1))]
        row, asked, body = drawn.rows[place], drawn.joints.asked[place], PARTS[HEADLINE]
        overlays.append(
            {
                **{name: row[name] for name in ("condition", "key", "seed", "width", "height", "persons")},
                "label": label,
                "quantile": quantile,
                "oks": round(float(values[place]), 4),
                "hits": int(drawn.joints.hit[place, body].sum()),
                "joints": int(asked[body].sum()),
                "given": _places(drawn.joints.target[place] * asked[:, None]),
                "found": None if row["joints"] is None else _places(drawn.joints.found[place]),
            }
        )
    return overlays


def _places(joints: np.ndarray) -> list[list[float]]:
    return np.round(joints.astype(np.float64), 2).tolist()


def _score(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["pose_hits"] or 0, row["pose_joints"] or 0


def values_of(name: str, evidence: Any) -> Values | None:
    """Return the pictures that the body's PCK is pooled over: joints met, and asked for; None for other metrics."""
    family, _, rest = name.partition("/")
    condition, _, part = rest.partition("/")
    if family != "pose_pck" or part:
        return None
    rows = [row for row in select(evidence.samples, MODEL, condition or "all") if row["pose_joints"]]
    return {(row["key"], row["seed"]): (row["pose_hits"], row["pose_joints"]) for row in rows}


def overlays_shown(page: Any) -> dict[str, Any] | None:
    """Return pictures at quantiles of OKS with the pose given and the joints found, and how many people there were."""
    extra = page.extras("pose")
    if not extra:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in extra["overlays"]:
        note = f"OKS {one['oks']:.2f}, {one['hits']} of {one['joints']} joints"
        shown = page.drawn(one["condition"], one["key"], one["seed"], one["label"], note)
        found = [joint if joint[2] >= extra["confidence"] else (0, 0, 0) for joint in one["found"] or ()]
        drawing = joints_overlay(one["given"], found, LINKS, (one["width"], one["height"]))
        groups.setdefault(one["condition"], []).append(shown | {"drawing": drawing})
    grouped = [{"condition": page.words(name), "pictures": groups[name]} for name in sorted(groups, key=page.order)]
    counts = [{"condition": page.words(name), **extra["counts"][name]} for name in extra["counts"]]
    return {name: extra.get(name) for name in ("rule", "detector", "alpha")} | {"groups": grouped, "counts": counts}


TEST = SuiteTest(
    name="pose",
    title="Pose",
    pictures=pictures,
    summarise=summarise,
    config=PoseTestConfig,
    families={
        "pose_pck": f"Pose, PCK at {ALPHA}",
        "pose_oks": "Pose, OKS",
        "pose_wanted": "Joints found that were asked for",
        "pose_gain": "PCK gained by the pose",
        "pose_mirror": "Pose met less its mirror image met",
        "pose_persons": "Persons drawn",
    },
    isolated="pose_gain",
    headline=("text+pose", "pose"),
    values=values_of,
    terms=(
        (
            f"Pose, PCK at {ALPHA} and OKS",
            f"PCK: the share of the joints asked for (confidence at least {CONFIDENCE}) that are found in the picture "
            f"within {ALPHA} of the longer side of the person's box, those of the face and of a hand within {ALPHA} of "
            "that of the face or the hand; a joint not found is wrong (Yang & Ramanan 2013). OKS: object keypoint "
            "similarity with the constants of COCO-WholeBody (Jin et al. 2020). “Random pair” is another sample's "
            "pose, “detector on real” the detector on the real image; of photographs, where the target is what it "
            "found there before, on the mirror image of the real image. Gained by the "
            "pose: PCK of an arm without image features, which alone say where joints are, less that of the same arm "
            "without the pose, from the same noises.",
        ),
    ),
    section=Section(
        "Poses",
        "The pose that was given, over the picture drawn from it, and the joints that the detector found there.",
        overlays_shown,
        "pose.html",
    ),
)
