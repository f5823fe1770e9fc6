"""The subject of an evaluation: a model, the holdout it is tested on, and the batches both are read in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from nanodit.console import say
from nanodit.errors import PROBLEM_BREAK, DataError
from nanodit.rng import generator, noise
from prep.dataset.reader import Dataset
from prep.dataset.rows import Rows, by_key
from prep.encoders.halving import Halving
from prep.images.twins import altered_twins
from prep.passes.advice import ANEW
from train.data.samples import load_conditions
from train.hardware import Precision
from train.method.flow import FlowConfig
from train.model.conditions import Conditions, Subset
from train.model.modalities import present
from train.model.tread import TreadConfig

T = TypeVar("T")
Row = Mapping[str, Any]
HoldoutPart = Literal["test", "dev"]
NO_ROUTING = TreadConfig()
NAMED = 5  # holdout images that are named in a message
_told: WeakKeyDictionary[Dataset, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Batch:
    """Some holdout samples of one bucket: index rows, pixels uint8 (B, H, W, 3) and their stored conditions."""

    bucket: str
    rows: tuple[Row, ...]
    pixels: np.ndarray
    conditions: Conditions

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    @property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice) -> Batch:
        return Batch(self.bucket, self.rows[places], self.pixels[places], self.conditions.select(places))

    def select(self, indices: Sequence[int]) -> Batch:
        """Return some of the samples."""
        rows = tuple(self.rows[index] for index in indices)
        return Batch(self.bucket, rows, self.pixels[list(indices)], self.conditions.select(list(indices)))

    def noise(self, seed_index: int) -> Tensor:
        """Return the noise of each sample for one seed, float32 (B, 3, H, W).

        It is a function of key and seed index alone.
        """
        return torch.from_numpy(np.stack([noise(key, seed_index, self.height, self.width) for key in self.keys]))


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, how it was trained to be used, and the holdout samples to test it on.

    ``table`` is the dropout table it was trained with; ``rows`` are holdout rows of ``dataset``; ``losses`` are the
    perceptual networks that training used, ``lpips`` and ``dinov2``; ``tread`` is the routing for self-guidance.
    ``part`` is the part of the holdout that these are of, or all of it.
    ``precision`` is what the model computes in (:func:`train.hardware.computing_in`), ``weights`` which it has:
    ``ema``, ``model`` or ``posthoc:SIGMA_REL``.
    """

    model: nn.Module
    flow: FlowConfig
    table: Mapping[Subset, float]
    dataset: Dataset
    rows: tuple[Row, ...]
    part: HoldoutPart | Literal["holdout"] = "holdout"
    batch_size: int = 32
    device: str = "cpu"
    losses: frozenset[str] = frozenset()
    tread: TreadConfig = NO_ROUTING
    precision: Precision = "fp32"
    weights: str = "ema"

    @cached_property
    def _memory(self) -> Halving:
        return Halving("evaluation", self.device, own_thread=False)

    def as_fits(self, compute: Callable[[Batch], T], batch: Batch) -> Iterator[T]:
        """Yield ``compute`` of a batch, or of its parts in order where the GPU has no room for the whole; says so once.

        Raises :class:`MemoryShortage` where a single sample does not fit.
        """
        yield from self._memory.run(compute, batch)
        if note := self._memory.take_note():
            say(f"warning: {note}")

    def with_short_captions(self) -> Subject:
        """Return it with the short captions of its samples. Raises DataError where the dataset has none."""
        dataset = self.dataset.with_short_captions()
        rows = by_key(dataset.rows("holdout"))
        return replace(self, dataset=dataset, rows=tuple(rows[row["key"]] for row in self.rows))

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """The conditions that the dataset has."""
        return dataset_modalities(self.dataset)

    def batches(self) -> Iterator[Batch]:
        """Read all samples, buckets never mixed, one batch in memory at a time."""
        return read_batches(self.dataset, self.rows, self.batch_size)

    @cached_property
    def partners(self) -> dict[str, Row]:
        """For each sample of this part of the holdout another of its bucket, its random pair; a lone one has none."""
        holdout = {row["key"]: row for row in self.dataset.rows(self.part)}
        return {key: holdout[other] for key, other in random_pairs(list(holdout.values())).items()}


def dataset_modalities(dataset: Dataset) -> tuple[str, ...]:
    """Return the conditions that a dataset's layers provide, in the model's order."""
    return present(dataset.info["layers"])


def chunks(rows: Sequence[Row], size: int) -> Iterator[tuple[str, int, tuple[Row, ...]]]:
    """Cut rows into bucket, number within it and at most ``size`` rows: bucket by bucket, in key order."""
    buckets: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["bucket"], row["key"])):
        buckets[row["bucket"]].append(row)
    for bucket, members in buckets.items():
        for number, start in enumerate(range(0, len(members), size)):
            yield bucket, number, tuple(members[start : start + size])


def read_batch(dataset: Dataset, rows: tuple[Row, ...]) -> Batch:
    """Read some samples of one bucket."""
    pixels = np.stack([dataset.pixels(row) for row in rows])
    return Batch(rows[0]["bucket"], rows, pixels, load_conditions(dataset, rows))


def read_batches(dataset: Dataset, rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Read rows bucket by bucket, in key order, at most ``batch_size`` at a time."""
    for _, _, chunk in chunks(rows, batch_size):
        yield read_batch(dataset, chunk)


def select_holdout(
    dataset: Dataset, count: int, seed: int | None = None, part: HoldoutPart = "test"
) -> tuple[Row, ...]:
    """Return the first ``count`` rows of a part of the holdout, in key order: a random sample, as keys are hashes.

    A ``seed`` chooses others, and returns them in key order too.
    Raises :class:`DataError` when there is no such part, and when a holdout sample is also in the training split: as
    the same key, or as a member of the same duplicate group. Holdout samples that training has in an altered form are
    left out, counted and named.
    """
    holdout = dataset.rows("holdout")
    if not holdout:
        raise DataError(
            f"{dataset.root}: the dataset has no holdout samples. Run nanodit prep run with more images, some of which "
            f"are held out then; those that are published stay where they are. {ANEW}"
        )
    check_leaks(dataset.rows("train"), holdout)
    holdout = dataset.rows(part)
    if not holdout:
        raise DataError(
            f"{dataset.root}: nothing of the holdout is left for its part {part}: what shows the same is all in the "
            "other. Run nanodit prep run with more images, some of which are held out then; those that are published "
            f"stay where they are. {ANEW}"
        )
    twins = altered_twins(dataset)
    if twins is None:
        _tell_once(dataset, "nothing tells whether training has holdout images mirrored, brighter or cropped")
    if left_out := [row for row in holdout if row["key"] in (twins or {})]:
        names = ", ".join(f"{row['source']} ({row['key']})" for row in left_out[:NAMED])
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        _tell_once(
            dataset,
            f"{len(left_out)} of {len(holdout)} holdout images ({part}) are left out, as training has them mirrored, "
            f"brighter or cropped: {names}{more}. {ANEW}",
        )
        holdout = [row for row in holdout if row["key"] not in twins]
        if not holdout:
            raise DataError(
                f"{dataset.root}: training has all holdout images ({part}) mirrored, brighter or cropped. {ANEW}"
            )
    ordered = sorted(holdout, key=lambda row: row["key"])
    if seed is not None:
        chosen = generator("holdout sample", seed).permutation(len(ordered))[:count]
        ordered = [ordered[index] for index in sorted(chosen)]
    return tuple(ordered[:count])


def _tell_once(dataset: Dataset, line: str) -> None:
    """Warn of a dataset's holdout, but not again: a training asks for it at each of its validations."""
    told = _told.setdefault(dataset, set())
    if line not in told:
        told.add(line)
        say(f"warning: {dataset.root}: {line}")


def check_leaks(train: Sequence[Row], holdout: Sequence[Row]) -> None:
    """Raise :class:`DataError` listing every pair of a holdout and a training sample that are duplicates."""
    if not train or not holdout:
        return
    holdout = _twins(Rows.of(holdout), Rows.of(train))
    train = _twins(Rows.of(train), holdout)
    twins = {row["key"]: row for row in train}
    by_group = {row["duplicate_group"]: row for row in train if row["duplicate_group"] is not None}
    pairs = []
    for row in holdout:
        twin = twins.get(row["key"]) or by_group.get(row["duplicate_group"])
        if twin is not None:
            pairs.append(f"{row['key']} ({row['source']}) ~ {twin['key']} ({twin['source']})")
    if pairs:
        more = [f"... and {len(pairs) - 20} more"] if len(pairs) > 20 else []
        found = f"leak: {len(pairs)} holdout samples are also in the training split. Run nanodit prep run again"
        raise DataError(PROBLEM_BREAK.join([found, *pairs[:20], *more]))


def _twins(rows: Rows, others: Rows) -> Rows:
    """Return those that have the key or the duplicate group of one of the others."""
    same = []
    for name in ("key", "duplicate_group"):
        ours, theirs = (one.column(name).cast(pa.string()) for one in (rows, others))  # null, where nobody has one
        same.append(pc.is_in(ours, theirs, skip_nulls=True))
    return rows.take(pc.or_(*same))


def to_float(pixels: np.ndarray) -> Tensor:
    """Convert uint8 (B, H, W, 3) to the model's float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Round float (B, 3, H, W) in about [-1, 1] to uint8 (B, H, W, 3), clipped; non-finite values become 0."""
    pixels = ((images.float() + 1) * 127.5).nan_to_num(0, 0, 0).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def group_of(row: Mapping[str, Any]) -> str | None:
    """Return what of an index keeps a row's sample with others: its group by ``split.group_by``, or its duplicates."""
    return row.get("split_group") or row.get("duplicate_group")


def random_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Pair every sample with another of the same bucket: sample key -> partner's key.

    Within a bucket the keys, in an order shuffled once for all, form a ring and everybody gets the next one, so nobody
    is paired with itself. Partners come from another group (of duplicates, or by ``split.group_by``) where there is
    one. A bucket of one has no pair.
    """
    buckets: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["key"]):
        buckets[row["bucket"]].append(row)
    pairs = {}
    for bucket, members in buckets.items():
        order = generator("random pair", bucket).permutation(len(members))
        ring = [(members[index]["key"], group_of(members[index])) for index in order.tolist()]
        for index, (key, group) in enumerate(ring):
            others = (ring[place % len(ring)] for place in range(index + 1, index + len(ring)))
            foreign = (other for other, its in others if its != group)
            if len(ring) > 1:
                pairs[key] = next(foreign, ring[(index + 1) % len(ring)][0])
    return pairs
