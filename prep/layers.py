"""Computing the layers: one function per layer turns a committed upstream layer into the next one.

No Ray here: a :class:`LayerWorker` lives in an actor of ``prep/pipeline.py``, or in a test. Encoders are built when the
first shard needs them. Batches have a fixed size and never span shards, so the bytes of a unit depend on its members
alone and not on who computes it when.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from prep.buckets import Bucket, crop_to_bucket
from prep.caption import BadCaption, SidecarCaptions
from prep.dedup import perceptual_hash, thumbnail
from prep.encoders import build_encoder
from prep.errors import ConfigError, DataError
from prep.files import canonical_json
from prep.settings import PrepConfig
from prep.shards import (
    LayerWriter,
    Part,
    Unit,
    fingerprint_of,
    load_webp,
    npy_bytes,
    read_members,
    read_part,
    webp_bytes,
)
from prep.sources import BadImage, Source, load_canonical


@dataclass(frozen=True)
class ShardTask:
    """The missing layers of one shard, in the order of the data flow, with their recipes."""

    bucket: str
    shard: int
    sources: tuple[Source, ...]
    recipes: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """The task as text; Ray carries it as a cell of a table."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"sources": tuple(Source(**source) for source in fields["sources"])})


class LayerWorker:
    """Computes and commits the units of shard tasks on one device."""

    def __init__(self, config: PrepConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device
        self.root, self.source = Path(config.output), Path(config.source)
        self._encoders: dict[str, Any] = {}

    def run(self, task: ShardTask) -> list[dict[str, Any]]:
        """Compute and commit the layers of the task, but those committed meanwhile; returns what each took."""
        compute = {"px": self.px, "text": self.text, "t5": self.t5, "dino": self.dino, "pose": self.pose}
        done = []
        for layer, recipe in task.recipes.items():
            start = time.monotonic()
            unit = Unit(task.bucket, task.shard, layer)
            part = read_part(self.root, unit)
            if part is None or part.fingerprint != fingerprint_of(recipe):
                compute[layer](task, unit, recipe)
            done.append({"layer": layer, "samples": len(task.sources), "seconds": round(time.monotonic() - start, 3)})
        return done

    def px(self, task: ShardTask, unit: Unit, recipe: dict[str, Any]) -> None:
        """Source files -> lossless crops. The only place where a source is decoded."""
        bucket = Bucket.parse(task.bucket)
        with LayerWriter(self.root, unit, recipe, facts={}) as writer:
            for source in task.sources:
                try:
                    image = load_canonical(self.source, source, self.config.image.max_pixels)
                except BadImage as bad:
                    writer.reject(source.key, bad.reason, bad.detail)
                    continue
                pixels = np.asarray(crop_to_bucket(image, bucket))
                columns = {"phash": perceptual_hash(pixels), "thumbnail": thumbnail(pixels)}
                writer.add(source.key, {"webp": webp_bytes(pixels)}, **columns)
            writer.commit()

    def text(self, task: ShardTask, unit: Unit, recipe: dict[str, Any]) -> None:
        """Sidecars -> captions with their provenance."""
        captions = SidecarCaptions(self.source)
        names = {source.key: source.name for source in task.sources}
        with LayerWriter(self.root, unit, recipe, facts={}) as writer:
            for key in self._part(unit, "px").table["key"].to_pylist():
                try:
                    caption = captions.caption(names[key])
                    if caption.provenance["sha256"] != recipe["captions"][key]:
                        raise BadCaption("changed_during_run", "the sidecar changed after the run had begun")
                except BadCaption as bad:
                    writer.reject(key, bad.reason, bad.detail)
                    continue
                members = {"txt": caption.text.encode(), "json": canonical_json(caption.provenance).encode()}
                writer.add(key, members, caption=caption.text)
            writer.commit()

    def t5(self, task: ShardTask, unit: Unit, recipe: dict[str, Any]) -> None:
        """Captions -> T5 features of the valid tokens."""
        encoder = self._encoder("t5", recipe)
        table = self._part(unit, "text").table
        rows = list(zip(table["key"].to_pylist(), table["caption"].to_pylist()))
        facts = {"width": encoder.width, "max_tokens": encoder.max_tokens}
        with LayerWriter(self.root, unit, recipe, facts) as writer:
            for batch in batched(rows, self.config.t5.batch_size):
                for (key, _), tokens in zip(batch, encoder.encode([caption for _, caption in batch])):
                    members = {"t5.npy": npy_bytes(tokens.embedding)}
                    columns = {"t5_tokens": len(tokens.embedding), "t5_truncated": tokens.truncated}
                    writer.add(key, members, **columns)
            writer.commit()

    def dino(self, task: ShardTask, unit: Unit, recipe: dict[str, Any]) -> None:
        """Crops -> the DINOv3 class token and quantised patch tokens."""
        from prep.quantise import quantise

        encoder = self._encoder("dino", recipe)
        facts = {name: getattr(encoder, name) for name in ("width", "registers", "patch_size", "input_scale")}
        with LayerWriter(self.root, unit, recipe, facts) as writer:
            for keys, images in self._images(unit, self.config.dino.batch_size):
                tokens, patches = encoder.encode(images)
                for key, cls, grid in zip(keys, tokens, patches):
                    quantised, scale = quantise(grid.reshape(-1, grid.shape[-1]))
                    arrays = {"cls.npy": cls, "dino.npy": quantised, "dino_scale.npy": scale}
                    members = {name: npy_bytes(array) for name, array in arrays.items()}
                    writer.add(key, members, dino_h=grid.shape[0], dino_w=grid.shape[1])
            writer.commit()

    def pose(self, task: ShardTask, unit: Unit, recipe: dict[str, Any]) -> None:
        """Crops -> the joints of the largest person, and everybody's box."""
        from prep.dwpose import normalise

        encoder, bucket = self._encoder("pose", recipe), Bucket.parse(task.bucket)
        with LayerWriter(self.root, unit, recipe, facts={}) as writer:
            for keys, images in self._images(unit, self.config.pose.batch_size):
                for key, pose in zip(keys, encoder.detect(images)):
                    joints = normalise(pose.keypoints, bucket.width, bucket.height)
                    boxes = [[round(float(value), 3) for value in box] for box in pose.boxes]
                    people = canonical_json({"persons": pose.persons, "boxes": boxes}).encode()
                    writer.add(key, {"pose.npy": npy_bytes(joints), "json": people}, persons=pose.persons)
            writer.commit()

    def _part(self, unit: Unit, layer: str) -> Part:
        upstream = Unit(unit.bucket, unit.shard, layer)
        part = read_part(self.root, upstream)
        if part is None:
            raise DataError(f"{upstream} disappeared while {unit} was computed. Run prep run again to restore it.")
        return part

    def _images(self, unit: Unit, batch_size: int) -> Iterator[tuple[list[str], np.ndarray]]:
        """Batches of the shard's crops: keys, and pixels as uint8 (B, H, W, 3)."""
        for batch in batched(read_members(self.root, self._part(unit, "px"), "webp"), batch_size):
            yield [key for key, _ in batch], np.stack([load_webp(data) for _, data in batch])

    def _encoder(self, layer: str, recipe: dict[str, Any]) -> Any:
        """The encoder of a layer, built once. Raises ConfigError when it is not the one that the plan was made with."""
        if layer not in self._encoders:
            encoder = build_encoder(self.config, layer, self.device)
            if encoder.fingerprint() != recipe["encoder"]:
                raise ConfigError(
                    f"the {layer} encoder of this worker is {encoder.fingerprint()}, the plan was made with "
                    f"{recipe['encoder']}. Give all machines the same models and the same code, and run again"
                )
            self._encoders[layer] = encoder
        return self._encoders[layer]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """``items`` in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
