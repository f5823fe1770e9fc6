"""The pictures that a test asks for: each a sample's noise, and what the model is given instead of the sample's own.

Tests name pictures, the run draws each of them once (:mod:`evaluate.run`), and tests read the rows that come of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np

from evaluate.subject import Batch, Row
from prep.dataset.reader import Dataset
from train.method.sampling import NO_GUIDANCE, Guidance
from train.model.conditions import Conditions, Subset, collate
from train.model.modalities import MODALITIES, Modality

Embed = Callable[[str], np.ndarray]  # a text to its T5 features, float16 (L, width)


@dataclass(frozen=True)
class Picture:
    """One picture to draw: the sample whose noise and bucket it takes, and what the model is given.

    ``condition`` is its label in samples.parquet: all, text+pose, swap/cls, edit/opposite/0, pose/mirrored; the same
    label means the same kind of picture for every sample. ``subset`` are the conditions kept, ``seed`` the index of the
    noise. ``donors`` maps a modality to the key of the sample that gives it, ``text`` takes the place of the caption;
    the rest is the sample's own. Donors of ``patches`` must be of the same bucket.
    """

    key: str
    condition: str
    subset: Subset
    guidance: Guidance = NO_GUIDANCE
    seed: int = 0
    donors: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    mirrored_pose: bool = False

    def __post_init__(self) -> None:
        if unknown := self.donors.keys() - set(MODALITIES):
            raise ValueError(f"picture {self.condition}: donor of {min(unknown)}, which is no condition")
        if self.text is not None and "text" in self.donors:
            raise ValueError(f"picture {self.condition}: both a text and a donor of one")

    @property
    def name(self) -> tuple[str, str, int]:
        """The condition, key and seed, which tell it from all other pictures."""
        return self.condition, self.key, self.seed

    @property
    def donor(self) -> str | None:
        """The key of the sample that gives something, if one does."""
        return next((self.donors[name] for name in MODALITIES if name in self.donors), None)

    def giver(self, modality: str) -> str:
        """Return the key of the sample that gives a modality."""
        return self.donors.get(modality, self.key)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {
            **vars(self),
            "subset": sorted(self.subset),
            "guidance": self.guidance.value,
            "donors": dict(self.donors),
        }


@dataclass(frozen=True)
class PictureBatch:
    """Pictures drawn together: of one condition, seed and bucket; ``number`` counts the batches of these."""

    condition: str
    seed: int
    bucket: str
    number: int
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return f"{quote(self.condition, safe='+@')}-{self.seed}-{self.bucket}-{self.number:04d}"


def once(pictures: Iterable[Picture]) -> list[Picture]:
    """Return each picture once, sorted; raises ``ValueError`` for two that differ under one name."""
    named: dict[tuple[str, str, int], Picture] = {}
    for picture in pictures:
        if named.setdefault(picture.name, picture) != picture:
            raise ValueError(f"two different pictures are called {picture.name}")
    return [named[name] for name in sorted(named)]


def batches(pictures: Sequence[Picture], buckets: Mapping[str, str], size: int) -> Iterator[PictureBatch]:
    """Cut pictures (each once) into batches of at most ``size``; ``buckets`` maps a key to its bucket."""
    groups: dict[tuple[str, int, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.condition, picture.seed, buckets[picture.key]].append(picture)
    for condition, seed, bucket in sorted(groups):
        members = sorted(groups[condition, seed, bucket], key=lambda picture: picture.key)
        if len({(picture.subset, picture.guidance) for picture in members}) > 1:
            raise ValueError(f"pictures called {condition} differ in what is kept or in guidance")
        for number, start in enumerate(range(0, len(members), size)):
            yield PictureBatch(condition, seed, bucket, number, tuple(members[start : start + size]))


def compose(
    dataset: Dataset,
    rows: Mapping[str, Row],
    pictures: Sequence[Picture],
    embed: Embed | None,
    real: bool = True,
) -> Batch:
    """Read the samples of some pictures of one bucket, with the conditions that the model is given.

    ``rows`` maps keys to index rows, of donors too. ``embed`` is needed only where a picture has a text of its own.
    Without the ``real`` images, which nobody looks at then, the pixels are zeros.
    """
    samples = tuple(rows[picture.key] for picture in pictures)
    bucket = samples[0]["bucket"]
    if real:
        pixels = np.stack([dataset.pixels(row) for row in samples])
    else:
        width, height = map(int, bucket.split("x"))
        pixels = np.broadcast_to(np.uint8(0), (len(samples), height, width, 3))
    return Batch(bucket, samples, pixels, _conditions(dataset, rows, pictures, embed))


def _conditions(
    dataset: Dataset, rows: Mapping[str, Row], pictures: Sequence[Picture], embed: Embed | None
) -> Conditions:
    """Read the conditions that the pictures are given, cut down to what each keeps."""
    kept = frozenset().union(*(picture.subset for picture in pictures))

    def read(picture: Picture, modality: Modality) -> np.ndarray:
        if modality.name == "text" and picture.text is not None:
            return embed(picture.text)
        mirrored = modality.name == "pose" and picture.mirrored_pose
        return modality.load(dataset, rows[picture.giver(modality.name)], mirrored)

    features = {name: [read(picture, MODALITIES[name]) for picture in pictures] for name in MODALITIES if name in kept}
    for name, arrays in features.items():
        if not MODALITIES[name].ragged and len({array.shape for array in arrays}) > 1:
            raise ValueError(f"pictures called {pictures[0].condition}: a donor of {name} is of another bucket")
    conditions = collate(**features, count=len(pictures))
    return conditions.keeping([picture.subset for picture in pictures])
