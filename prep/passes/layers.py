"""Computing the layers: one method per kind of layer turns a committed upstream layer into the next one.

No Ray here: a :class:`LayerWorker` lives in the child process of a ``prep/passes/supervisor.py``, or in a test.
Encoders are built when the first shard needs them. Batches have a fixed size and never span shards, so the bytes of a
unit depend on its members alone and not on who computes it when, nor on how many threads prepare batches beside a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np

from nanodit.errors import ConfigError, DataError
from nanodit.faults import fault
from nanodit.storage import open_storage
from prep.captions.sidecar import BadCaption, text_sample
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket, crop_to_bucket
from prep.dataset.codecs import encode_pixels
from prep.dataset.layout import Part, Unit, fingerprint_of, members_of, read_members, read_part
from prep.dataset.writer import LayerWriter
from prep.encoders.registry import build_encoder, encoder_of
from prep.images.duplicates import perceptual_hash, thumbnail
from prep.images.filters import blur_problem, persons_problem, sharpness
from prep.images.sources import BadImage, Source, load_canonical
from prep.passes.crops import Batch, CropCache, Sample, decode_batch, encode_beside
from prep.passes.reuse import CommittedBatches, inputs_hash
from prep.passes.sidecars import came_with_images
from prep.passes.text_features import LONG, caption_features, short_features


@dataclass(frozen=True)
class ShardTask:
    """The missing layers of one shard, in the order of the data flow, with their recipes.

    ``again`` names those that are computed although a part of the same recipe is committed.
    """

    bucket: str
    shard: int
    sources: tuple[Source, ...]
    recipes: dict[str, dict[str, Any]]
    again: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write the task as text; Ray carries it as a cell of a table."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the task that :meth:`to_json` wrote."""
        fields = json.loads(text)
        sources = tuple(Source(**source) for source in fields["sources"])
        return cls(**fields | {"sources": sources, "again": tuple(fields["again"])})


@dataclass(frozen=True)
class Job:
    """One unit to compute.

    ``guilty`` maps keys to the (reason, detail) for which they are rejected unseen: they ended a worker. ``only``
    names the single sample of a probe, which is computed and thrown away.
    """

    task: ShardTask
    layer: str
    guilty: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    only: str | None = None

    @property
    def unit(self) -> Unit:
        """What is going to be committed."""
        return Unit(self.task.bucket, self.task.shard, self.layer)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the unit is made from."""
        return self.task.recipes[self.layer]


class LayerWorker:
    """Computes and commits the units of shard tasks on one device.

    ``watch`` is told the keys of every batch before work on it begins, and ``[]`` after the last. ``threads`` prepare
    batches beside the device; 0 where the device is the CPU, which would only be shared.
    """

    def __init__(
        self,
        config: PrepConfig,
        device: str = "cpu",
        watch: Callable[[list[str]], None] = lambda keys: None,
        threads: int = 0,
    ) -> None:
        self.config, self.device, self.watch, self.threads = config, device, watch, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare") if threads else None
        self._crops = CropCache()
        self.root, self.source = open_storage(config.output), Path(config.source)
        self._encoders: dict[str, Any] = {}
        self._rejected = 0  # by the unit computed last

    def run(self, task: ShardTask) -> list[dict[str, Any]]:
        """Compute and commit the layers of the task, but those committed meanwhile; returns what each took."""
        return [self.compute(Job(task, layer)) for layer in task.recipes]

    def compute(self, job: Job) -> dict[str, Any]:
        """Compute and commit one unit, unless it was committed meanwhile; a probe always computes, never commits."""
        compute = {"px": self.px, "text": self.text, "t5": self.t5}.get(job.layer, self.encode_crops)
        start = time.monotonic()
        part = None if job.only or job.layer in job.task.again else read_part(self.root, job.unit)
        if part is None or part.fingerprint != fingerprint_of(job.recipe):
            compute(job)
        else:
            self._rejected = len(part.rejects)
        done = {"layer": job.layer, "device": self.device, "samples": len(job.task.sources)}
        done |= {"rejected": self._rejected, "seconds": round(time.monotonic() - start, 3)}
        encoder = self._encoders.get(job.layer)
        note = encoder and encoder.memory.take_note()
        return done | ({"note": note} if note else {})

    @contextmanager
    def _writing(self, job: Job, facts: dict[str, Any]) -> Iterator[LayerWriter]:
        """Open a writer for the unit, and commit it at the end."""
        with LayerWriter(self.root, job.unit, job.recipe, facts) as writer:
            yield writer
            self.watch([])  # from here on no sample is to blame
            self._rejected = writer.rejected
            if not job.only:
                writer.commit()

    def _wanted(self, job: Job, writer: LayerWriter, items: Iterable[Any], key: Callable[[Any], str]) -> Iterator[Any]:
        """Yield the items to compute; those whose key is guilty become rejects."""
        for item in items:
            if guilt := job.guilty.get(key(item)):
                writer.reject(key(item), *guilt)
            elif job.only in (None, key(item)):
                yield item

    def px(self, job: Job) -> None:
        """Source files -> crops, lossless unless ``image.format`` is JPEG. The only place where a source is decoded."""
        bucket, (member,) = Bucket.parse(job.task.bucket), members_of("px", job.recipe)
        lossless, wanted_again = member == "webp", self._wanted_again(job)
        reduced = bucket if "reduced" in job.recipe else None
        self._crops.open(fingerprint_of(job.recipe))
        with self._writing(job, facts={}) as writer:
            for source in self._wanted(job, writer, job.task.sources, lambda source: source.key):
                begin = partial(self._begin_decoding, source.key)
                try:
                    image = load_canonical(self.source, source, self.config.image.max_pixels, begin, reduced)
                except BadImage as bad:
                    writer.reject(source.key, bad.reason, bad.detail)
                    continue
                pixels = np.asarray(crop_to_bucket(image, bucket))
                sharp = sharpness(pixels)
                if problem := blur_problem(sharp, self.config.filters):
                    writer.reject(source.key, *problem)
                    continue
                columns = {"phash": perceptual_hash(pixels), "sharpness": sharp, "thumbnail": thumbnail(pixels)}
                members = {member: encode_pixels(pixels, member)}
                if lossless and wanted_again:
                    self._crops.keep(source.key, pixels)
                self.watch([])  # waiting for storage, here and before decoding, is nobody's fault
                writer.add(source.key, members, **columns)

    def _begin_decoding(self, key: str) -> None:
        self.watch([key])
        fault("px.decode", key)

    def text(self, job: Job) -> None:
        """Sidecars -> captions with their provenance."""
        with self._writing(job, facts={}) as writer:
            keys = self._wanted(job, writer, self._upstream(job).table["key"].to_pylist(), str)
            before = read_part(self.root, job.unit)
            for key, caption in came_with_images(self.config, job.task, before, keys):
                if isinstance(caption, BadCaption):
                    writer.reject(key, caption.reason, caption.detail)
                    continue
                members, columns = text_sample(caption, job.recipe)
                writer.add(key, members, **columns)

    def t5(self, job: Job) -> None:
        """Captions -> T5 features of the valid tokens, of each text once: flipped and short captions may be no others.

        Batches whose captions are those of the committed unit are taken from it, and so are, where nothing but short
        captions is new, the features of the long ones.
        """
        encoder, flips, short = self._encoder(job), "flip" in job.recipe, "short" in job.recipe
        table = self._upstream(job).table
        names = ["key", "caption", "caption_flip" if flips else "caption"]
        names += ["caption_short", "caption_short_flip" if flips else "caption_short"] * short
        rows = zip(*(table[name].to_pylist() for name in names))
        with self._writing(job, self._facts(job)) as writer:
            committed = None if job.only else CommittedBatches(self.root, job.unit, job.recipe)
            for batch in batched(self._wanted(job, writer, rows, itemgetter(0)), self.config.t5.batch_size):
                long = [row[:LONG] for row in batch]
                digests = [inputs_hash(long), *([inputs_hash(batch)] if short else [])]
                writer.batches.append((digests[0], len(batch), *digests[1:]))
                found = [committed and committed.get(digest, kind) for kind, digest in enumerate(digests)]
                if not all(found):
                    self.watch([key for key, *_ in batch])
                made = [found[0] or caption_features(encoder, long, flips)]
                made += [found[1] or short_features(encoder, batch, flips)] if short else []
                for (key, *_), (members, columns), *more in zip(batch, *made, strict=True):
                    for other_members, other_columns in more:
                        members, columns = members | other_members, columns | other_columns
                    writer.add(key, members, **columns)

    def encode_crops(self, job: Job) -> None:
        """Crops -> what the layer's encoder makes of them."""
        encoder, batch_size = self._encoder(job), getattr(self.config, job.layer).batch_size
        with self._writing(job, self._facts(job)) as writer:
            for keys, samples in self._encoded(job, encoder, self._batches(job, writer, batch_size)):
                for key, (members, columns) in zip(keys, samples, strict=True):
                    problem = "persons" in columns and persons_problem(columns["persons"], self.config.filters)
                    if problem:
                        writer.reject(key, *problem)
                    else:
                        writer.add(key, members, **columns)

    def _upstream(self, job: Job) -> Part:
        """Return the committed part that the unit is made from."""
        upstream = Unit(job.task.bucket, job.task.shard, self.config.upstream(job.layer))
        part = read_part(self.root, upstream)
        if part is None:
            raise DataError(
                f"{upstream} disappeared while {job.unit} was computed. Run nanodit prep run again to restore it."
            )
        return part

    def _wanted_again(self, job: Job) -> bool:
        """Whether a later layer of the task is made from the same crops."""
        layers = list(job.task.recipes)
        later = layers[layers.index(job.layer) + 1 :]
        return not job.only and any(layer != "text" and self.config.upstream(layer) == "px" for layer in later)

    def _batches(self, job: Job, writer: LayerWriter, size: int) -> Iterator[Batch]:
        """Batches of the shard's crops, as files or as the pixels that an earlier layer decoded."""
        part = self._upstream(job)
        self._crops.open(part.fingerprint)
        known = {} if job.only else self._crops.known()  # a probe does all by itself
        files = read_members(self.root, part, *members_of("px", part.recipe), known)
        for batch in batched(self._wanted(job, writer, files, itemgetter(0)), size):
            yield [(key, known.get(key, data)) for key, data in batch]

    def _encoded(
        self, job: Job, encoder: Any, batches: Iterator[Batch]
    ) -> Iterator[tuple[list[str], Iterable[Sample] | Sequence[Sample]]]:
        """Keys and samples of each batch, computed here or, a few batches at a time, in threads beside a GPU."""
        encode, again = partial(encoder.samples, flips="flip" in job.recipe), self._wanted_again(job)

        def keep(keys: list[str], images: np.ndarray) -> None:
            for key, pixels in zip(keys, images):
                self._crops.keep(key, pixels)

        if self._pool and not job.only:
            for keys, images, samples in encode_beside(batches, encode, self._pool, self.threads, self.watch):
                if again:
                    keep(keys, images)
                yield keys, samples
            return
        for batch in batches:
            keys = [key for key, _ in batch]
            self.watch(keys)
            images = decode_batch(batch)
            if again:
                keep(keys, images)
            yield keys, encode(images)
            self.watch([])  # while the next batch is read

    def _encoder(self, job: Job) -> Any:
        """Return a layer's encoder, built once. Raises ConfigError when it is not the one of the plan."""
        if job.layer not in self._encoders:
            encoder = build_encoder(self.config, job.layer, self.device)
            if encoder.fingerprint() != job.recipe["encoder"]:
                raise ConfigError(
                    f"the {job.layer} encoder of this worker is {encoder.fingerprint()}, but the plan was made with "
                    f"{job.recipe['encoder']}. Give all machines the same models and the same code, and run again"
                )
            self._encoders[job.layer] = encoder
        return self._encoders[job.layer]

    def _facts(self, job: Job) -> dict[str, Any]:
        """Return what a layer's encoder says of itself in dataset.json."""
        encoder = self._encoder(job)
        return {name: getattr(encoder, name) for name in encoder_of(job.layer).facts}


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """``items`` in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
