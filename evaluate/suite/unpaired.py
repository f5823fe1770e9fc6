"""How good are pictures from text alone, as a set? Against training images, and against the holdout, without pairs.

A caption allows many pictures, so that none is held against the image that the caption is of: the sets are compared, in
the judge's features. The captions are those of holdout images, for half of the pictures as far as they go, and of
training images, one noise each; the training images are the first ``training_features``. Of near duplicates one counts,
in each set.

Beside every number stands what real images score in the pictures' place: the holdout against training, and training
against the holdout. These know nothing of the other side, and are no bound: pictures are given captions of images
that they are held against, for which the settings say how many there are, and may come nearer. So the KID of a model
that draws what captions say is below zero against the holdout, unbiased as it is for sets that are independent. It
takes all of both sets. FD depends on n, which is equal on both sides and for the real images; so do recall and
coverage, for which there are no more pictures than real images.
Only features of the pictures are kept: they are no rows of samples.parquet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.draw import draw_features
from evaluate.drawing.finished import FinishedBatches
from evaluate.drawing.pictures import Picture
from evaluate.metrics.clip import NO_PROBE
from evaluate.metrics.distances import frechet, frechet_needs, kid
from evaluate.metrics.manifolds import COUNT_K, GROUPS, NEEDED, SHARE_K, Balls, fidelity
from evaluate.records import Metric, Skipped, degenerate_reason
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval
from evaluate.subject import Row, group_of
from evaluate.suite.declaration import SuiteTest
from nanodit.config import Config
from nanodit.console import waiting
from nanodit.rng import generator
from prep.captions.sentences import sentences

GIVEN = "text"
CLIP_SCORE = f"unpaired/clip_score/{GIVEN}"
BALLS = {"precision": SHARE_K, "recall": SHARE_K, "density": COUNT_K, "coverage": COUNT_K}  # neighbours of each
NAMES = ("kid", "fd", *BALLS)
BY_SIZE = ("recall", "coverage")  # of the set of pictures, too
BY_IMAGE = "jackknife over images"
BY_GROUP = f"jackknife over {GROUPS} groups of clusters"


class UnpairedConfig(Config):
    """The number of pictures, and which captions they are drawn from."""

    samples: int = Field(default=2048, gt=0, le=10_000)
    seed: int = Field(default=0, ge=0)  # chooses the captions


@dataclass(frozen=True)
class Images:
    """A set of images or pictures: the judge's features, float32 (n, width), and the cluster of each."""

    features: np.ndarray
    clusters: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clusters)

    def first(self, count: int) -> Images:
        """Return the first ``count`` of them: keys are content hashes, so a random sample."""
        return self if count >= len(self) else Images(self.features[:count], self.clusters[:count])

    @cached_property
    def balls(self) -> Balls:
        """The set as balls."""
        return Balls.of(self.features, self.clusters)


def pictures(context: DrawingContext, config: UnpairedConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for no rows of samples.parquet; name what keeps the pictures of :func:`measure` from being drawn."""
    arm = context.arm(GIVEN, test="unpaired")
    return [], [arm] if isinstance(arm, Skipped) else []


def prompts(context: DrawingContext, config: UnpairedConfig) -> list[str]:
    """Return the keys of the samples whose captions are given, sorted: a random sample of both splits.

    Half are of the holdout, as far as it goes, and more only where training has too few.
    """
    training = _apart(context.subject.dataset.rows("train"))
    random = generator("unpaired", config.seed)
    held = min(len(context.apart), max(config.samples // 2, config.samples - len(training)))
    chosen = [context.apart[place] for place in random.permutation(len(context.apart))[:held].tolist()]
    chosen += [training[place] for place in random.permutation(len(training))[: config.samples - held].tolist()]
    return sorted(chosen)


def measure(context: DrawingContext, config: UnpairedConfig, parts: FinishedBatches) -> None:
    """Draw the pictures, each of the bucket of its caption's image, and keep their features."""
    arm = context.arm(GIVEN, test="unpaired")
    if isinstance(arm, Skipped) or (context.judge is None and context.probe is None):
        return
    asked = [Picture(key, "unpaired", arm.subset, arm.guidance) for key in prompts(context, config)]
    context.unpaired = draw_features(context, asked, parts)


def summarise(rows: Rows, context: DrawingContext, config: UnpairedConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return ``unpaired/NAME`` against training images, ``unpaired/NAME/holdout``, and ``unpaired/clip_score/text``.

    NAME is ``kid``, ``fd`` (:mod:`evaluate.metrics.distances`), ``precision``, ``recall``, ``density`` or ``coverage``
    (:mod:`evaluate.metrics.manifolds`, with the reason for its intervals). The best of each is about ``real``.
    ``clip_score`` is the cosine of pictures and the sentences of their captions (:meth:`ClipProbe.captions`), with an
    interval over clusters; ``real`` are the captions' own images, ``random_pair`` other captions.
    """
    arm, drawn = context.arm(GIVEN, test="unpaired"), context.unpaired
    if isinstance(arm, Skipped):
        return [], []  # named with the pictures
    metrics, skipped = [], []
    held = sum(context.rows[row["key"]]["split"] == "holdout" for row in drawn)
    asked = f"{held} holdout and {len(drawn) - held} training captions"
    settings = context.settings(arm.name, arm.guidance, seeds=1, prompts=asked, prompts_seed=config.seed)
    reason = degenerate_reason(drawn)
    if context.probe is not None:
        metrics.append(_clip_score(context, drawn, settings, reason))
    elif context.no_probe and not (context.figures and context.no_probe == NO_PROBE):  # judged at the garment
        skipped.append(Skipped(CLIP_SCORE, context.no_probe))
    if context.judge is None:
        return metrics, [*skipped, Skipped("unpaired", context.no_judge)]
    details = {"settings": settings | context.judged}
    if reason:
        names = [_name(name, against) for name in NAMES for against in ("training", "holdout")]
        return [*metrics, *(Metric(name, None, n=len(drawn), reason=reason, **details) for name in names)], skipped
    sets = _sets(rows, context, drawn)
    needed = max(MIN_CLUSTERS, NEEDED)
    if few := [f"{needed - len(own)} more {name}" for name, own in sets.items() if len(own) < needed]:
        return metrics, [*skipped, Skipped("unpaired", f"inconclusive, about {' and '.join(few)}")]
    with waiting("comparing sets of pictures", at_once=False):
        for name in (_kid, _fd, _balls):
            found = name(sets, details)
            metrics += [one for one in found if isinstance(one, Metric)]
            skipped += [one for one in found if isinstance(one, Skipped)]
    return metrics, skipped


def _sets(rows: Rows, context: DrawingContext, drawn: Sequence[Mapping[str, Any]]) -> dict[str, Images]:
    """Return the pictures and both sets of real images, each in key order and without near duplicates."""
    train, places = context.train_features, {key: place for place, key in enumerate(context.train_features.keys)}
    keys = {
        "pictures": [row["key"] for row in drawn],
        "holdout images": context.apart,
        "training images": _apart(context.rows[key] for key in train.keys),
    }
    features = {
        "pictures": [row["feature"] for row in drawn],
        "holdout images": [rows.real[key]["feature"] for key in keys["holdout images"]],
        "training images": train.feature[[places[key] for key in keys["training images"]]],
    }
    width = train.feature.shape[1]
    return {
        name: Images(
            np.reshape(np.asarray(features[name], np.float32), (-1, width)),
            tuple(_cluster(context.rows[key]) for key in own),
        )
        for name, own in keys.items()
    }


def _kid(sets: Mapping[str, Images], details: Mapping[str, Any]) -> list[Metric]:
    possible = kid(sets["holdout images"].features, sets["training images"].features).value
    found = []
    for against, _, reference in _references(sets):
        distance = kid(sets["pictures"].features, reference.features)
        settings = _settings(details, sets["pictures"], reference, against, interval_by=BY_IMAGE)
        more = {"baselines": {"real": possible}, "settings": settings, "better": "lower"}
        found.append(Metric.of(_name("kid", against), distance.interval(), **more))
    return found


def _fd(sets: Mapping[str, Images], details: Mapping[str, Any]) -> list[Metric | Skipped]:
    n = min(map(len, sets.values()))
    pictures, held, train = (sets[name].first(n) for name in ("pictures", "holdout images", "training images"))
    needed = frechet_needs(pictures.features.shape[1])
    if n < needed:
        few = " and ".join(f"{needed - len(own)} more {name}" for name, own in sets.items() if len(own) < needed)
        return [Skipped("unpaired/fd", f"inconclusive, about {few}: FD takes {needed} of each")]
    possible = frechet(held.features, train.features).value
    return [
        Metric.of(
            _name("fd", against),
            frechet(pictures.features, reference.features).interval(),
            baselines={"real": possible},
            settings=_settings(details, pictures, reference, against, interval_by=BY_IMAGE),
            better="lower",
        )
        for against, reference in (("training", train), ("holdout", held))
    ]


def _balls(sets: Mapping[str, Images], details: Mapping[str, Any]) -> list[Metric]:
    metrics = []
    for against, real, reference in _references(sets):
        every = sets["pictures"]
        equal = every.first(len(real))
        of_every = fidelity(every.balls, reference.balls)
        of_equal = of_every if equal is every else fidelity(equal.balls, reference.balls)
        possible = fidelity(real.first(len(equal)).balls, reference.balls)
        for name, neighbours in BALLS.items():
            own, interval = (equal, of_equal[name]) if name in BY_SIZE else (every, of_every[name])
            settings = _settings(details, own, reference, against, interval_by=BY_GROUP, neighbours=neighbours)
            baselines = {"real": possible[name].value}
            metrics.append(Metric.of(_name(name, against), interval, baselines=baselines, settings=settings))
    return metrics


def _name(name: str, against: str) -> str:
    return f"unpaired/{name}{'' if against == 'training' else f'/{against}'}"


def _references(sets: Mapping[str, Images]) -> list[tuple[str, Images, Images]]:
    """Return for each reference its name, the real images that stand in the pictures' place, and the reference."""
    held, train = sets["holdout images"], sets["training images"]
    return [("training", held, train), ("holdout", train, held)]


def _settings(details: Mapping[str, Any], own: Images, reference: Images, against: str, **more: Any) -> dict[str, Any]:
    return details["settings"] | {"images": len(own), "reference": f"{len(reference)} {against} images", **more}


def _clip_score(
    context: DrawingContext, drawn: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], reason: str | None
) -> Metric:
    captions = [context.rows[row["key"]]["caption"] for row in drawn]
    every = [sentence for caption in captions for sentence in sentences(caption)]
    settings = dict(settings) | {"probe": context.probe.label, "images": len(drawn), "sentences": len(every)}
    settings["sentences_cut"] = context.probe.cut(every)
    if reason or not drawn:
        return Metric(CLIP_SCORE, None, n=len(drawn), settings=settings, reason=reason or "no captions")
    with waiting("CLIP reads the sentences of the captions", at_once=False):
        texts = context.probe.captions(captions)
    seen, real = (np.stack([row[name] for row in drawn]) for name in ("probe", "probe_real"))
    clusters = [_cluster(context.rows[row["key"]]) for row in drawn]
    baselines = {"real": float(_dots(real, texts).mean())}
    if len(drawn) > 1:  # each caption with the next one's picture, in an order without meaning
        baselines["random_pair"] = float(_dots(np.roll(seen, 1, axis=0), texts).mean())
    interval: Interval = intervals.mean(_dots(seen, texts), clusters)
    return Metric.of(CLIP_SCORE, interval, baselines=baselines, settings=settings)


def _dots(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return np.einsum("bd,bd->b", pictures.astype(np.float64), texts.astype(np.float64))


def _apart(rows: Iterable[Row]) -> list[str]:
    """Return the keys of the rows, of each group of near duplicates the first."""
    groups: dict[str, str] = {}
    for row in rows:
        groups.setdefault(row.get("duplicate_group") or row["key"], row["key"])
    return list(groups.values())


def _cluster(row: Row) -> str:
    return group_of(row) or row["key"]


TEST = SuiteTest(
    name="unpaired",
    title="Pictures from text alone, against sets of real images",
    pictures=pictures,
    summarise=summarise,
    config=UnpairedConfig,
    measure=measure,
    default=False,
    families={
        "unpaired/kid": "KID from text alone",
        "unpaired/fd": "FD from text alone",
        "unpaired/precision": "Precision",
        "unpaired/recall": "Recall",
        "unpaired/density": "Density",
        "unpaired/coverage": "Coverage",
        "unpaired/clip_score": "CLIP score by sentence",
    },
    headline=(GIVEN,),
    default_part="text, against training images",
    parts={"holdout": "text, against the holdout"},
    minimised=dict.fromkeys((f"unpaired/{name}" for name in NAMES), "judge"),  # and CLIP is in no loss
    roles={
        "unpaired/clip_score": (("random_pair",), ("real",)),
        "unpaired": ((), ("real",)),  # no floor: retrieved training images are as near as real ones
    },
    terms=(
        (
            "Precision, recall",
            "Precision is the share of pictures that are as near to a real image as its third neighbour is, recall the "
            "share of real images that are as near to a picture (Kynkäänniemi et al. 2019), in the judge's features. "
            "Few kinds of picture, all good, have precision without recall; recall also grows where bad pictures "
            "scatter, which coverage does not. Beside them stand real images of the other side of the split, at the "
            "same n. These are no bound: pictures are given captions of images that they are held against.",
        ),
        (
            "Density, coverage",
            "Density is the number of real images that have a picture within their fifth neighbour, over five and for "
            "each picture; coverage the share of real images that have one (Naeem et al. 2020). They react less to a "
            "single odd image than precision and recall do.",
        ),
        (
            "CLIP score by sentence",
            "The cosine of a picture and the sentences of its caption in CLIP's space (Radford et al. 2021), the mean "
            "over the sentences: CLIP reads 77 tokens, and captions are longer. How many sentences were cut even so "
            "stands in the settings.",
        ),
    ),
)
