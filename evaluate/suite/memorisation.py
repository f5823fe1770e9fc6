"""Are the drawn pictures copies of training images? An indicator: nearest neighbours in two feature spaces.

A holdout image has a nearest training image too, at a distance that shows what "near" means without copying. A drawn
picture counts as a likely copy where it is nearer to a training image than all but 5 % of the holdout's images are, and
where that image stands out among its neighbours just as rarely: a blurred picture is near to all images, a copy to one
(the ratio of Carlini et al. 2023, "Extracting training data from diffusion models", section 5.1, without its factor).
Mirrored and shifted copies, and single ones among many pictures, do not show there. So pictures are also compared with
the training images as the holdout was (``prep/images/altered.py``), where two different images hardly ever match.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field
from scipy import special

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.distances import SPACE_NAMES, SPACES, as_points, nearest
from evaluate.records import BASELINE, MODEL, REAL, Metric, Skipped, degenerate_reason
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval
from evaluate.suite.declaration import Section, SuiteTest
from nanodit.config import Config
from prep.images.altered import altered_between

QUANTILE = 0.05  # of the holdout's distances
NEIGHBOURS = 50  # next ones that the nearest is held against, as in the paper
TRAINING = "training"  # what follows the name of a condition where it was that of a training image
CLOSEST, NEAREST = 16, 6  # pairs shown: of drawn pictures and of the holdout
OWN = 2048  # training images whose nearest other one is looked up
AT_ONCE = 2**22  # numbers held at once while resampling
FEWEST, POWER = 2, 0.8  # images with a match that raise the alarm, and how surely a share is found
WORDING = "an indicator, not a proof: nearness in two feature spaces, to the training images that were searched"


@dataclass(frozen=True)
class Nearness:
    """Of n pictures: the nearest training image, its distance, and that over the mean of the next NEIGHBOURS."""

    index: np.ndarray  # (n,)
    distance: np.ndarray  # (n,)
    isolation: np.ndarray  # (n,), about 0 for a copy and 1 for a picture that is equally far from everything

    def take(self, places: Sequence[int]) -> Nearness:
        """Return those of some of the pictures."""
        return Nearness(*(values[list(places)] for values in vars(self).values()))


def nearness(points: np.ndarray, training: np.ndarray) -> Nearness:
    """Look up ``points`` (n, width) among ``training`` (m, width), m >= 2; Euclidean."""
    distances, indices = nearest(points, training, min(NEIGHBOURS + 1, len(training)))
    others = distances[:, 1:].mean(1)
    isolation = np.divide(distances[:, 0], others, out=np.ones(len(points)), where=others > 0)
    return Nearness(indices[:, 0], distances[:, 0], isolation)


def share_of_copies(
    drawn: Nearness,
    keys: Sequence[str],
    holdout: Nearness,
    holdout_keys: Sequence[str],
    clusters: Mapping[str, str] | None = None,
) -> Interval:
    """Return the share of pictures below the QUANTILE of the holdout in both distance and isolation.

    By chance it is at most QUANTILE. Every picture belongs to the holdout image of its key: images are resampled in
    their ``clusters`` (key -> cluster; each alone without), with their pictures, and the quantile with them, so that
    the interval knows how uncertain it is. It is never shorter than the exact interval of the share itself, which
    resampling misses near zero.
    """
    place = {key: index for index, key in enumerate(holdout_keys)}
    owners = np.array([place[key] for key in keys])
    counts = np.bincount(owners, minlength=len(place))
    clusters = clusters or {key: key for key in holdout_keys}
    names, members = np.unique([clusters[key] for key in holdout_keys], return_inverse=True)

    def below(weights: np.ndarray) -> np.ndarray:
        near = drawn.distance < intervals.weighted_quantile(holdout.distance, weights, QUANTILE)[:, None]
        return near & (drawn.isolation < intervals.weighted_quantile(holdout.isolation, weights, QUANTILE)[:, None])

    def share_of(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, members]  # of the images, from those of their clusters
        return (below(weights) * weights[:, owners]).sum(1) / (weights @ counts)

    def share(weights: np.ndarray) -> np.ndarray:
        parts = math.ceil(len(weights) * max(len(keys), len(members)) / AT_ONCE)  # few clusters may hold many images
        return np.concatenate([share_of(part) for part in np.array_split(weights, parts)])

    interval = intervals.bootstrap(share, len(names))
    copies = below(np.ones((1, len(place))))[0]
    exact = intervals.proportion(copies, np.ones(len(keys)), [clusters[key] for key in keys])
    bounds = [[one.low for one in (interval, exact)], [one.high for one in (interval, exact)]]
    known = [[bound for bound in own if bound is not None] for own in bounds]
    low, high = (min(known[0]), max(known[1])) if all(known) else (None, None)
    return Interval(interval.value, low, high, interval.n)


class MemorisationTestConfig(Config):
    """The pictures drawn for this test alone."""

    training: int = Field(default=64, ge=0)  # pictures drawn from what training images were given, one noise each


def pictures(context: DrawingContext, config: MemorisationTestConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for every sample under each of the configured conditions, and for some with what training images were given.

    What was memorised comes back most easily where the model is asked for it.
    """
    drawn, skipped = context.configured()
    return drawn + _of_training(context, config.training), skipped


def _of_training(context: DrawingContext, count: int) -> list[Picture]:
    """Ask for some noises of the holdout with the text, and as little beside it as possible, of a training image.

    Each takes another training image of its bucket, in the order of those searched.
    """
    arm = _least(context)
    if arm is None or not count:
        return []
    training = context.train_features
    waiting = {bucket: deque() for bucket in set(training.buckets)}
    for key, bucket in zip(training.keys, training.buckets):
        waiting[bucket].append(key)
    asked = []
    for key in context.keys[:count]:
        if own := waiting.get(context.rows[key]["bucket"]):
            donors = dict.fromkeys(sorted(arm.subset), own[0])
            own.rotate(-1)
            asked.append(Picture(key, f"{arm.name}/{TRAINING}", arm.subset, arm.guidance, donors=donors))
    return asked


def _least(context: DrawingContext) -> DrawingArm | None:
    """Return the configured arm with a text and the fewest conditions beside it."""
    arms = [arm for arm in context.arms if "text" in arm.subset]
    return min(arms, key=lambda arm: (len(arm.subset), arm.name), default=None)


def summarise(
    rows: Rows, context: DrawingContext, config: MemorisationTestConfig | None = None
) -> tuple[list[Metric], list[Skipped]]:
    """Return ``memorisation/copies``, ``/distance_ratio`` and ``/matches`` of each condition.

    ``_pixels`` is on mean colours. ``copies``: see :func:`share_of_copies`. ``distance_ratio``: distance to the nearest
    training image over that of the sample's own holdout image, pooled. ``matches``: the share of pictures of which a
    training image is an altered form. The alarm is for a condition whose share of copies is above chance, the interval
    too, in both spaces, or with FEWEST images that have a match, more than the holdout has. ``detectable`` beside it is
    the smallest share of images with a match of which that many are met with probability POWER. The closest pairs of
    all pictures, whatever they were given, are kept for the report.
    """
    training = context.train_features
    needed = max(MIN_CLUSTERS, round(1 / QUANTILE))  # with fewer, no image is below the quantile
    lacks = [("samples", needed - len(context.keys)), ("training images", 2 - len(training))]
    for what, more in lacks:
        if more > 0:
            return [], [Skipped("memorisation", f"inconclusive, about {more} more {what}")]
    spaces = {space: features for space in SPACES if (features := getattr(training, space)) is not None}
    names = ("copies", "distance_ratio")
    skipped = [Skipped(f"memorisation/{name}", context.no_judge) for name in names if "feature" not in spaces]
    drawn = [row for row in rows if row["kind"] == MODEL and not row["degenerate"]]
    searches = [_Search(space, features, drawn) for space, features in spaces.items()]
    metrics = [metric for arm in context.arms for search in searches for metric in _metrics(rows, context, arm, search)]
    real = float(matched(rows.select(REAL, "real"), training.feature_pixels).mean())
    arms = list(context.arms)
    if (least := _least(context)) and rows.select(MODEL, f"{least.name}/{TRAINING}"):
        arms.append(replace(least, name=f"{least.name}/{TRAINING}"))
    metrics += [_matches(rows, context, arm, training, real) for arm in arms]
    context.extras["memorisation"] = {
        "wording": WORDING,
        "training_images": len(training),
        "quantile": QUANTILE,
        "alarms": _alarms(metrics, [arm.name for arm in arms]),
        "closest": _closest(rows, context, searches),
        "holdout": _closest_of_holdout(rows, context, searches[0]),
    }
    return metrics, skipped


class _Search:
    """The training images in one space, and what is near to the pictures drawn."""

    def __init__(self, space: str, features: np.ndarray, drawn: Sequence[Mapping[str, Any]]):
        self.space, self.drawn = space, drawn
        self._training = as_points(features, space)
        self.found = self(drawn) if drawn else None
        self._places: dict[str, list[int]] = {}
        for place, row in enumerate(drawn):
            self._places.setdefault(row["condition"], []).append(place)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Nearness:
        return nearness(self._points(rows), self._training)

    def own(self) -> np.ndarray:
        """Return the distance of training images, of OWN of them at most, to the nearest other one, (n,)."""
        some = self._training[:: 1 + len(self._training) // OWN]
        return nearest(some, self._training, 2)[0][:, 1]

    def of(self, condition: str) -> tuple[list[str], Nearness]:
        """Return the pictures drawn under one condition: keys, and what is near."""
        places = self._places[condition]
        return [self.drawn[place]["key"] for place in places], self.found.take(places)

    def distance(self, row: Mapping[str, Any], index: int) -> float:
        """Return the distance between a picture and a training image."""
        return float(np.linalg.norm(self._points([row])[0] - self._training[index]))

    def _points(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return as_points(np.stack([row[self.space] for row in rows]), self.space)


def _metrics(rows: Rows, context: DrawingContext, arm: DrawingArm, search: _Search) -> list[Metric]:
    """Return ``copies`` and ``distance_ratio`` of one condition in one space."""
    end = f"{'' if search.space == 'feature' else '_pixels'}{'' if arm.name == 'all' else f'/{arm.name}'}"
    names = {name: f"memorisation/{name}{end}" for name in ("copies", "distance_ratio")}
    judged = context.judged if search.space == "feature" else {}
    searched = {"training_images": len(context.train_features), "space": search.space}
    settings = context.settings(arm.name, arm.guidance, **searched, **judged)
    if reason := degenerate_reason(rows.select(MODEL, arm.name)):
        return [Metric(name, None, n=len(context.keys), settings=settings, reason=reason) for name in names.values()]
    real = rows.select(REAL, "real")
    holdout, mean = search(real), search(rows.select(BASELINE, "mean_image"))
    holdout_keys = [row["key"] for row in real]
    own = dict(zip(holdout_keys, holdout.distance))
    keys, found = search.of(arm.name)
    return [
        Metric.of(
            names["copies"],
            share_of_copies(found, keys, holdout, holdout_keys, rows.clusters),
            baselines={
                "chance": QUANTILE,
                "real": share_of_copies(holdout, holdout_keys, holdout, holdout_keys).value,
                "mean_image": share_of_copies(mean, holdout_keys, holdout, holdout_keys).value,
            },
            settings=settings | {"quantile": QUANTILE, "neighbours": NEIGHBOURS},
            better="lower",
        ),
        Metric.of(
            names["distance_ratio"],
            intervals.ratio(found.distance, [own[key] for key in keys], [rows.clusters[key] for key in keys]),
            baselines={"real": 1.0, "mean_image": float(mean.distance.sum() / holdout.distance.sum())},
            settings=settings,
        ),
    ]


def _matches(rows: Rows, context: DrawingContext, arm: DrawingArm, training: Any, real: float) -> Metric:
    """Return the share of one condition's pictures that training images are altered forms of; ``real``: of holdout."""
    name = f"memorisation/matches{'' if arm.name == 'all' else f'/{arm.name}'}"
    settings = context.settings(arm.name, arm.guidance, training_images=len(training), space="feature_pixels")
    pictures = rows.select(MODEL, arm.name)
    if reason := degenerate_reason(pictures):
        return Metric(name, None, n=len(context.keys), settings=settings, reason=reason)
    drawn = [row for row in pictures if not row["degenerate"]]
    found = matched(drawn, training.feature_pixels)
    clusters = [rows.clusters[row["key"]] for row in drawn]
    return Metric.of(
        name,
        intervals.proportion(found, np.ones(len(found)), clusters),
        baselines={"real": real},
        settings=settings
        | {
            "images": len({row["key"] for row in drawn}),
            "images_with_a_match": len({row["key"] for row, one in zip(drawn, found) if one}),
        },
        better="lower",
    )


def matched(rows: Sequence[Mapping[str, Any]], training: np.ndarray) -> np.ndarray:
    """Return of which pictures one of ``training``, (m, 768) in [0, 1], is an altered form, bool (n,)."""
    pixels = np.stack([row["feature_pixels"] for row in rows])
    found = np.zeros(len(pixels), bool)
    found[altered_between(255 * pixels, 255 * training)[:, 0]] = True
    return found


def detectable_share(count: int) -> float:
    """Return the smallest share of ``count`` images of which FEWEST are met with probability POWER.

    The binomial's tail is a beta distribution function (Clopper and Pearson 1934).
    """
    return float(special.betaincinv(FEWEST, count - FEWEST + 1, POWER))


def _alarms(metrics: Sequence[Metric], conditions: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each condition whether there are likely copies or matches, or None where nobody can tell."""
    lows = {metric.name: metric.low for metric in metrics}
    found = {metric.name: metric for metric in metrics}
    alarms = []
    for condition in conditions:
        suffix = "" if condition == "all" else f"/{condition}"
        spaces = [f"memorisation/{name}{suffix}" for name in ("copies", "copies_pixels")]
        own = [lows.get(name) for name in spaces]
        matches = found[f"memorisation/matches{suffix}"]
        fired = None if None in own else all(low > QUANTILE for low in own)
        if not any(name in found for name in spaces):  # where matches alone are looked for
            fired = None if matches.value is None else False
        if matches.value is not None and matches.settings["images_with_a_match"] >= FEWEST:
            fired = matches.value > matches.baselines["real"] or fired
        told = {} if matches.value is None else {"detectable": detectable_share(matches.settings["images"])}
        alarms.append({"name": "memorisation", "condition": condition, "fired": fired, **told})
    return alarms


def _closest(rows: Rows, context: DrawingContext, searches: Sequence[_Search]) -> list[dict[str, Any]]:
    """Return the CLOSEST pairs of a drawn picture and its nearest training image, in the judge's space if there is one.

    Of pictures of one sample with one training image in common only the nearest counts. ``distance`` is that of the
    pair in each space, ``relative`` that over the distance from the sample's own holdout image to its nearest training
    image. The pictures of both sides are kept for the report.
    """
    drawn, found = searches[0].drawn, searches[0].found
    if found is None:
        return []
    pairs: dict[tuple[str, int], int] = {}
    for place in np.argsort(found.distance, kind="stable").tolist():
        pairs.setdefault((drawn[place]["key"], int(found.index[place])), place)
        if len(pairs) == CLOSEST:
            break
    closest = []
    for (key, index), place in pairs.items():
        row, training_key = drawn[place], context.train_features.keys[index]
        own = {search.space: float(search([rows.real[key]]).distance[0]) for search in searches}
        distance = {search.space: search.distance(row, index) for search in searches}
        context.show(MODEL, row["condition"], key, row["seed"])
        closest.append(
            {
                **{name: row[name] for name in ("key", "condition", "seed")},
                "training_key": training_key,
                "training_image": context.show_training(training_key),
                "distance": distance,
                "relative": {space: distance[space] / own[space] if own[space] else None for space in own},
            }
        )
    return closest


def _closest_of_holdout(rows: Rows, context: DrawingContext, search: _Search) -> dict[str, Any]:
    """Return the holdout images that are nearest to a training image, in the judge's space if there is one.

    ``rank`` is the share of training images whose own nearest other one is at least as near: where it is not small, the
    holdout is no nearer to training than training is to itself. ``own`` are the 5 %, 50 % and 95 % quantiles of that.
    """
    real = rows.select(REAL, "real")
    found, own = search(real), search.own()
    pairs = []
    for place in np.argsort(found.distance, kind="stable")[:NEAREST].tolist():
        key, distance = real[place]["key"], float(found.distance[place])
        training_key = context.train_features.keys[found.index[place]]
        context.show(REAL, "real", key)
        pairs.append(
            {
                "key": key,
                "training_key": training_key,
                "training_image": context.show_training(training_key),
                "distance": distance,
                "rank": float(np.mean(own <= distance)),
            }
        )
    return {"space": search.space, "own": np.quantile(own, (0.05, 0.5, 0.95)).tolist(), "pairs": pairs}


def closest_pairs(page: Any) -> dict[str, Any] | None:
    """Return the closest pairs of a drawn picture and a training image."""
    extra = page.extras("memorisation")
    if not extra or not extra["closest"]:
        return None
    pairs = []
    for one in extra["closest"]:
        drawn = page.drawn(one["condition"], one["key"], one["seed"], "drawn", f"given {page.words(one['condition'])}")
        relative = [
            {"space": SPACE_NAMES.get(space, space), "value": value}
            for space, value in one["relative"].items()
            if value is not None
        ]
        training = page.stored(one["training_image"], "training image")
        pairs.append({"pictures": [drawn, training], "relative": relative})
    holdout = extra.get("holdout")  # an evaluation of before has none
    if holdout:
        shown = [
            {
                "pictures": [page.real(one["key"]), page.stored(one["training_image"], "training image")],
                **{name: one[name] for name in ("distance", "rank")},
            }
            for one in holdout["pairs"]
            if page.kept(one["key"])
        ]
        holdout = holdout | {"pairs": shown, "space": SPACE_NAMES.get(holdout["space"], holdout["space"])}
    return {name: extra[name] for name in ("wording", "training_images")} | {"pairs": pairs, "holdout": holdout}


TEST = SuiteTest(
    name="memorisation",
    title="Memorisation (an indicator)",
    pictures=pictures,
    summarise=summarise,
    config=MemorisationTestConfig,
    families={
        "memorisation/copies": "Likely copies",
        "memorisation/distance_ratio": "Distance to training / that of the holdout",
        "memorisation/matches": "Matches with a training image, also mirrored or shifted",
    },
    minimised={"memorisation": "judge"},
    roles={"memorisation": ((), ("real",))},
    alarms={
        "memorisation": "memorisation: copies of training images, or more likely copies than by chance",
    },
    terms=(
        (
            "Memorisation",
            "An indicator: a likely copy is nearer to a training image than all but 5 % of the holdout's images are, "
            "and nearer to that one than to the next ones by a margin as rare in the holdout (after Carlini et al. "
            "2023). A match is a training image as it is, mirrored, shifted a little, cropped, brighter or darker. It "
            "cannot prove that nothing was memorised, nor that something was.",
        ),
    ),
    section=Section(
        "Nearest training images",
        "The closest pairs of a drawn picture and a training image, and of a holdout and a training image.",
        closest_pairs,
        "memorisation.html",
    ),
)
